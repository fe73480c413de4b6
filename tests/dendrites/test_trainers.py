"""Growth inside a Lightning Trainer and a Hugging Face Trainer."""

import warnings

import pytest
import torch
from torch import nn

from pilimit_lib.dendrites import DendriteConfig, EveryEpoch, dendritic, dendritic_layers
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
            callbacks=[callback],
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


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_trainer_grows_a_transformer(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason="needs the extra 'dendrites'")
        pytest.importorskip("accelerate", reason="needs the extra 'dendrites'")
        from pilimit_lib.dendrites.integrations.huggingface import DendriteCallback
    torch.manual_seed(0)

    def build():
        config = transformers.BertConfig(
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
        return dendritic(transformers.BertForSequenceClassification(config), CONFIG)

    tokens = torch.randint(1, 20, (48, 6))
    data = [{"input_ids": t, "labels": (t[0] > 10).long()} for t in tokens]
    model, callback = build(), DendriteCallback("eval_accuracy", CONFIG)
    before = model(tokens).logits
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=8,
        per_device_train_batch_size=16,
        eval_strategy="epoch",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
    )
    trainer = transformers.Trainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[callback],
        compute_metrics=lambda p: {
            "accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())
        },
    )
    trainer.train()
    assert (
        callback.last.complete
        and max(row["dendrites"] for row in callback.growth.records.rows.epochs) == 2
    )
    assert not torch.equal(model(tokens).logits, before)
    fresh = build()
    fresh.load_state_dict(model.state_dict())
    model.eval(), fresh.eval()
    torch.testing.assert_close(fresh(tokens).logits, model(tokens).logits)


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
