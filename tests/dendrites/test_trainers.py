"""Growth inside a Lightning Trainer and a Hugging Face Trainer."""

import warnings

import pytest
import torch
from torch import nn

from pilimit_lib.dendrites import DendriteConfig, EveryEpoch, Fixed, dendritic, dendritic_layers
from tests.dendrites.helpers import mlp

CONFIG = DendriteConfig(switch=EveryEpoch(), max_dendrites=2, retain_all=True)


def grown(net):
    return [len(layer.dendrites) for _, layer in dendritic_layers(net)]


def lightning_parts(tmp_path, restart=True):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl = pytest.importorskip("lightning.pytorch", reason="needs the extra 'dendrites'")
        from pilimit_lib.dendrites.integrations.lightning import DendriteCallback
    torch.manual_seed(0)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = dendritic(mlp(), CONFIG)

        def step(self, batch):
            return (self.net(batch[0]) - batch[0][:, :3]).square().mean()

        def training_step(self, batch, index):
            return self.step(batch)

        def validation_step(self, batch, index):
            self.log("val_loss", -self.step(batch))

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.01)

    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(32, 5)), batch_size=8
    )
    callback = DendriteCallback("val_loss", CONFIG, restart=restart)

    def trainer(epochs, **kwargs):
        return pl.Trainer(
            max_epochs=epochs,
            callbacks=kwargs.pop("callbacks", [callback]),
            default_root_dir=tmp_path,
            logger=False,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=1,
            **kwargs,
        )

    return Module, callback, trainer, data


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("restart", [True, False])
def test_lightning_grows_trains_and_stops(tmp_path, restart):
    Module, callback, trainer, data = lightning_parts(tmp_path, restart)
    module, run = Module(), trainer(9)
    run.fit(module, data, data)
    assert (
        callback.last.complete
        and run.current_epoch < 9
        and grown(module) in ([2, 2], [1, 1], [0, 0])
    )
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert max(row["dendrites"] for row in callback.growth.records.rows.epochs) == 2


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_a_grown_network(tmp_path):
    Module, callback, trainer, data = lightning_parts(tmp_path)
    module, run = Module(), trainer(1)
    run.fit(module, data, data)
    assert grown(module) == [1, 1]
    run.save_checkpoint(tmp_path / "c.ckpt")
    Module, again, trainer, data = lightning_parts(tmp_path)
    fresh, run = Module(), trainer(2)
    run.fit(fresh, data, data, ckpt_path=tmp_path / "c.ckpt", weights_only=True)
    assert grown(fresh) == [2, 2] and again.growth.plateau.state.epoch == 2


@pytest.mark.filterwarnings("ignore")
def test_lightning_says_which_metrics_there_are(tmp_path):
    Module, callback, trainer, data = lightning_parts(tmp_path)
    callback.monitor = "val_accuracy"
    with pytest.raises(
        KeyError, match="'val_accuracy' was not logged; the module logged \\['val_loss'\\]"
    ):
        trainer(1).fit(Module(), data, data)


def moments(module, optimizer):
    """Adam's first moment of every parameter, by name."""
    names = {p: n for n, p in module.named_parameters()}
    return {names[p]: state["exp_avg"].clone() for p, state in optimizer.state.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("restart", [True, False])
def test_lightning_resumes_with_every_moment_on_its_own_parameter(tmp_path, restart):
    Module, callback, trainer, data = lightning_parts(tmp_path, restart)
    module, run = Module(), trainer(2)
    run.fit(module, data, data)
    run.save_checkpoint(tmp_path / "c.ckpt")
    saved = moments(module, run.optimizers[0])
    Module, again, trainer, data = lightning_parts(tmp_path, restart)
    found = {}

    class Look(type(again).__mro__[1]):
        def on_train_start(self, trainer, pl_module):
            found.update(moments(pl_module, trainer.optimizers[0]))

    fresh, run = Module(), trainer(3, callbacks=[again, Look()])
    run.fit(fresh, data, data, ckpt_path=tmp_path / "c.ckpt", weights_only=True)
    assert found.keys() == saved.keys() and (restart or "net.0.neuron.weight" in saved)
    assert all(torch.equal(saved[name], found[name]) for name in saved)


@pytest.mark.filterwarnings("ignore")
def test_lightning_tests_the_best_checkpoint_of_a_smaller_network(tmp_path):
    Module, callback, trainer, data = lightning_parts(tmp_path)
    from lightning.pytorch.callbacks import ModelCheckpoint

    Module.test_step = Module.validation_step
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss", mode="min")
    module, run = Module(), trainer(4, callbacks=[callback, best])
    run.fit(module, data, data)
    assert callback.last.added or grown(module) != [0, 0]
    run.test(module, data, ckpt_path="best", weights_only=True)
    state = torch.load(best.best_model_path, weights_only=False)["state_dict"]
    assert all(torch.equal(state[k], v) for k, v in module.state_dict().items())


def hugging_face_parts(tmp_path, config=CONFIG):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason="needs the extra 'dendrites'")
        pytest.importorskip("accelerate", reason="needs the extra 'dendrites'")
        from pilimit_lib.dendrites.integrations.huggingface import DendriteCallback
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 20, (48, 6), generator=generator)
    data = [{"input_ids": t, "labels": (t[0] > 10).long()} for t in tokens]

    def build():
        torch.manual_seed(0)
        bert = transformers.BertConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=8,
            num_labels=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return dendritic(transformers.BertForSequenceClassification(bert), config)

    def trainer(epochs, model=None, folder="run", **kwargs):
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder),
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            eval_strategy="epoch",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            **{"save_strategy": "no", **kwargs},
        )
        callback = DendriteCallback("eval_accuracy", config)
        return callback, transformers.Trainer(
            model or build(),
            args,
            train_dataset=data,
            eval_dataset=data,
            callbacks=[callback],
            compute_metrics=lambda p: {
                "accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())
            },
        )

    return build, trainer, tokens


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_trainer_grows_a_transformer(tmp_path):
    build, trainer, tokens = hugging_face_parts(tmp_path)
    model = build()
    before = model(tokens).logits
    callback, run = trainer(8, model)
    run.train()
    rows = callback.growth.records.rows.epochs
    assert callback.last.complete and max(row["dendrites"] for row in rows) == 2
    assert not torch.equal(model(tokens).logits, before)
    fresh = build()
    fresh.load_state_dict(model.state_dict())
    model.eval(), fresh.eval()
    torch.testing.assert_close(fresh(tokens).logits, model(tokens).logits)


NEVER_DONE = DendriteConfig(switch=Fixed(every=2), max_dendrites=9, retain_all=True, seed=0)


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_resumes_a_grown_run_as_if_it_had_not_stopped(tmp_path):
    build, trainer, tokens = hugging_face_parts(tmp_path, NEVER_DONE)
    whole, run = trainer(6, folder="whole")
    run.train()
    expected = run.model.state_dict()
    first, run = trainer(6, save_strategy="epoch", folder="parts")
    stop = type(first).on_evaluate

    def three_epochs(self, args, state, control, **kwargs):
        stop(self, args, state, control, **kwargs)
        control.should_training_stop = state.epoch >= 3

    first.on_evaluate = three_epochs.__get__(first)
    run.train()
    assert sum(grown(run.model))
    again, run = trainer(6, save_strategy="epoch", folder="parts")
    run.train(resume_from_checkpoint=True)
    assert again.growth.plateau.state_dict() == whole.growth.plateau.state_dict()
    found = run.model.state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)
    decayed = {id(p) for p in run.optimizer.param_groups[0]["params"]}
    names = dict(run.model.named_parameters())
    assert all(
        (id(p) in decayed) == ("bias" not in n) for n, p in names.items() if ".dendrites." in n
    )


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_loads_the_best_model_at_the_end_without_later_dendrites(tmp_path):
    build, trainer, tokens = hugging_face_parts(tmp_path, NEVER_DONE)
    callback, run = trainer(
        4,
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_epoch",
        greater_is_better=False,  # the first epoch is the best
    )
    run.compute_metrics = lambda p: {"accuracy": 0.5, "epoch": run.state.epoch}
    run.train()
    assert callback.growth.plateau.state.dendrites == 2 and not any(grown(run.model))


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_says_which_folder_the_state_of_growth_should_be_in(tmp_path):
    build, trainer, tokens = hugging_face_parts(tmp_path, NEVER_DONE)
    _, run = trainer(1, save_strategy="epoch", folder="here")
    run.train()
    moved = (tmp_path / "here" / "checkpoint-3").rename(tmp_path / "elsewhere")
    callback, run = trainer(2, folder="there")
    with pytest.raises(FileNotFoundError, match="resume_from=folder"):
        run.train(resume_from_checkpoint=str(moved))
    callback, run = trainer(2, folder="there")
    callback.resume_from = moved
    run.train(resume_from_checkpoint=str(moved))
    assert callback.growth.plateau.state.epoch == 2


def test_a_transformer_block_keeps_its_function_when_it_grows():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Embedding(11, 8),
        nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
        nn.Linear(8, 3),
    )
    net = dendritic(net)
    x = torch.randint(0, 11, (4, 6))
    before = net(x)
    for _, layer in dendritic_layers(net):
        layer.grow(torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(x), before, atol=1e-6, rtol=0)
