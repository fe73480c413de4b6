"""The documented calls, as their users type them."""

import csv
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from pilimit_lib.dendrites import GPA, PBM, UPA, DendriticLayer, DimensionError
from pilimit_lib.dendrites.compat.settings import SETTINGS
from tests.dendrites.helpers import ConvNet, mlp

pytestmark = pytest.mark.usefixtures("facade")


def run(model, scores, arguments=None, scheduler=None):
    """The documented training loop; returns (restructured, complete) for each epoch."""
    tracker = GPA.pai_tracker
    tracker.set_optimizer(torch.optim.Adam)

    def setup():
        optim_args = {"params": model.parameters(), "lr": 1e-2, **(arguments or {})}
        if scheduler is None:
            return tracker.setup_optimizer(model, optim_args)
        tracker.set_scheduler(scheduler[0])
        return tracker.setup_optimizer(model, optim_args, scheduler[1])[0]

    optimizer, seen = setup(), []
    for score in scores:
        model.train()
        x = torch.randn(8, 5)
        optimizer.zero_grad()
        (model(x) - x[:, :3]).square().mean().backward()
        optimizer.step()
        tracker.add_extra_score(score / 2, "train")
        tracker.add_test_score(score - 1, "test")
        model, restructured, complete = tracker.add_validation_score(score, model)
        seen.append((restructured, complete))
        if complete:
            break
        if restructured:
            optimizer = setup()
    return model, seen


def dendrites(model):
    return [len(layer.dendrites) for layer in UPA.get_pai_modules(model)]


DEFAULTS = {
    "switch_mode": 1,
    "n_epochs_to_switch": 10,
    "history_lookback": 1,
    "initial_history_after_switches": 0,
    "fixed_switch_num": 250,
    "first_fixed_switch_num": 0,
    "testing_dendrite_capacity": True,
    "retain_all_dendrites": False,
    "max_dendrites": 100,
    "max_dendrite_tries": 2,
    "improvement_threshold_raw": 1e-5,
    "reset_best_score_on_switch": False,
    "find_best_lr": True,
    "improvement_threshold": 1e-3,
    "dont_give_up_unless_learning_rate_lowered": True,
    "param_vals_setting": 1,
    "input_dimensions": [-1, 0, -1, -1],
    "debugging_input_dimensions": 0,
    "confirm_correct_sizes": False,
    "candidate_weight_initialization_multiplier": 0.01,
    "candidate_weight_init_by_main": False,
    "pai_forward_function": torch.sigmoid,
    "d_type": torch.float32,
    "modules_to_convert": [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear],
    "module_names_to_convert": ["PAISequential"],
    "module_ids_to_convert": [],
    "modules_to_track": [],
    "module_names_to_track": [],
    "module_ids_to_track": [],
    "modules_to_replace": [],
    "replacement_modules": [],
    "modules_with_processing": [],
    "modules_processing_classes": [],
    "module_names_with_processing": [],
    "module_by_name_processing_classes": [],
    "module_names_to_not_save": [".base_model"],
    "unwrapped_modules_confirmed": False,
    "weight_decay_accepted": False,
    "checked_skipped_modules": False,
    "save_name": "PAI",
    "test_saves": True,
    "pai_saves": False,
    "using_safe_tensors": True,
    "drawing_pai": True,
    "save_old_graph_scores": True,
    "silent": False,
    "verbose": False,
    "extra_verbose": False,
    "global_candidates": 1,
    "learn_dendrites_live": False,
    "no_extra_n_modes": True,
    "perforated_backpropagation": False,
    "cap_at_n": False,
    "dendrite_improvement_threshold": 0.1,
    "dendrite_improvement_threshold_raw": 1e-5,
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_documented_setting_has_its_default_and_can_be_set_to_it(name):
    GPA.pc.reset()
    assert getattr(GPA.pc, f"get_{name}")() == DEFAULTS[name]
    getattr(GPA.pc, f"set_{name}")(SETTINGS[name].default)


def test_lists_are_appended_and_live_and_do_not_leak_through_reset():
    GPA.pc.append_module_names_to_convert(["Block"])
    GPA.pc.append_modules_to_convert([nn.GRU])
    GPA.pc.get_modules_to_track().append(nn.LSTM)
    assert (
        GPA.pc.get_module_names_to_convert() == ["PAISequential", "Block"]
        and GPA.pc.get_modules_to_convert()[-1] is nn.GRU
    )
    assert GPA.pc.get_modules_to_track() == [nn.LSTM]
    GPA.pc.reset()
    assert (
        GPA.pc.get_module_names_to_convert() == ["PAISequential"]
        and GPA.pc.get_modules_to_track() == []
    )


def test_a_list_means_one_value_for_each_number_of_dendrites():
    GPA.pc.set_testing_dendrite_capacity(False)
    GPA.pc.set_switch_mode(GPA.pc.DOING_SWITCH_EVERY_TIME)
    GPA.pc.set_n_epochs_to_switch([5, 7])
    assert GPA.pc.get_n_epochs_to_switch() == 5 and GPA.pc.get_improvement_threshold() == 1e-3
    model = UPA.initialize_pai(mlp())
    run(model, [1.0])
    assert GPA.pc.get_n_epochs_to_switch() == 7 and GPA.pc.get_improvement_threshold() == 1e-4


def test_unknown_settings_and_bad_values_are_errors_that_help():
    with pytest.raises(
        AttributeError,
        match="GPA.pc has no 'set_n_epoch_to_swich'; did you mean 'set_n_epochs_to_switch'",
    ):
        GPA.pc.set_n_epoch_to_swich(3)
    with pytest.raises(AttributeError, match="has no 'zzz'"):
        GPA.pc.zzz = 1
    for call, error, text in [
        (lambda: GPA.pc.set_max_dendrites(-1), ValueError, "max_dendrites got -1"),
        (lambda: GPA.pc.set_switch_mode(7), ValueError, "one of \\[0, 1, 2, 3\\]"),
        (lambda: GPA.pc.set_input_dimensions([0, 0]), ValueError, "a single 0"),
        (lambda: GPA.pc.set_silent("yes"), TypeError, "True or False"),
        (lambda: GPA.pc.append_modules_to_convert(["GRU"]), TypeError, "give a list of types"),
        (lambda: GPA.pc.append_module_ids_to_track(["layer1"]), TypeError, "begin with a dot"),
        (lambda: GPA.pc.get_max_dendrites(1, 2), TypeError, "use set_max_dendrites"),
        (lambda: GPA.pc.set_pai_forward_function("sigmoid"), TypeError, "torch.sigmoid"),
    ]:
        with pytest.raises(error, match=text):
            call()
    assert GPA.pc.get_max_dendrites() == 100
    GPA.pc.append_module_names_with_processing(["GRU"])
    with pytest.raises(
        ValueError,
        match="module_names_with_processing has 1 entries and module_by_name_processing_classes "
        "has 0",
    ):
        UPA.initialize_pai(mlp())
    with pytest.warns(UserWarning, match="set_device has no effect here: dendrites follow"):
        GPA.pc.set_device("cuda:0")


def test_documented_misspellings_act_with_one_warning_each():
    def once(act):
        with pytest.warns(DeprecationWarning) as caught:
            act()
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            act()

    once(lambda: GPA.pc.get_retain_all_dendrites(True))
    assert GPA.pc.get_retain_all_dendrites() is True
    once(lambda: GPA.pc.get_module_by_name_processing_classes([PBM.GRUProcessor]))
    assert GPA.pc.get_module_by_name_processing_classes() == [PBM.GRUProcessor] * 2
    once(lambda: GPA.pc.set_dendrite_improvement_thresholdRaw(1e-4))
    assert GPA.pc.get_dendrite_improvement_threshold_raw() == 1e-4
    once(lambda: PBM.multiOutputProcesser)
    assert PBM.MultiOutputProcessor is PBM.MultiOutputProcessor
    once(lambda: GPA.PBSequential)
    once(lambda: GPA.pc.PBSequential([nn.Linear(2, 2)]))
    once(lambda: UPA.convertNetwork)
    once(lambda: UPA.saveSystem)
    once(lambda: UPA.initializePAI)
    GPA.pc.set_switch_mode(GPA.pc.DOING_NO_SWITCH)
    GPA.pc.get_module_by_name_processing_classes().clear()
    model = UPA.initialize_pai(mlp())
    once(lambda: model[0].setThisinput_dimensions([-1, 0]))
    once(lambda: GPA.pai_tracker.addExtraScore(1.0, "train"))
    once(lambda: GPA.pai_tracker.addValidationScore(1.0, model))


def test_module_ids_to_track_in_its_three_old_forms():
    with pytest.warns(DeprecationWarning):
        GPA.moduleIDsToTrack += [".layer1.0.conv1"]
        GPA.pc.moduleIDsToTrack += [".layer1.0.conv2"]
        from pilimit_lib.dendrites.compat.GPA import moduleIDsToTrack

        moduleIDsToTrack += [".0"]  # noqa: F841 - in place, as in the documented line
    assert GPA.pc.get_module_ids_to_track() == [".layer1.0.conv1", ".layer1.0.conv2", ".0"]


def test_the_tracker_says_what_to_call_first_and_what_it_lacks():
    GPA.pai_tracker = type(GPA.pai_tracker)()
    with pytest.raises(RuntimeError, match="UPA.initialize_pai"):
        GPA.pai_tracker.add_validation_score(1.0, mlp())
    model = UPA.initialize_pai(mlp())
    with pytest.raises(RuntimeError, match="set_optimizer\\(torch.optim.Adam\\)"):
        GPA.pai_tracker.setup_optimizer(model, {"lr": 0.1})
    with pytest.raises(TypeError, match="set_optimizer_instance"):
        GPA.pai_tracker.set_optimizer(torch.optim.Adam(model.parameters()))
    GPA.pai_tracker.set_optimizer(torch.optim.Adam)
    with pytest.raises(RuntimeError, match="set_scheduler"):
        GPA.pai_tracker.setup_optimizer(model, {"lr": 0.1}, {"patience": 3})
    with pytest.raises(ValueError, match="4 of the 4 parameters"):
        GPA.pai_tracker.setup_optimizer(model, {"lr": 0.1, "params": mlp().parameters()})
    with pytest.raises(ValueError, match="is not the network that the tracker follows"):
        GPA.pai_tracker.add_validation_score(1.0, mlp())
    with pytest.raises(AttributeError, match="did you mean 'add_validation_score'"):
        GPA.pai_tracker.add_validaton_scores(1.0)


def test_capacity_test_is_the_default_and_adds_three_dendrites():
    model, seen = run(UPA.initialize_pai(mlp()), [1.0, 2.0, 3.0, 4.0, 5.0])
    assert seen == [(True, False)] * 3 + [(True, True)] and dendrites(model) == [3, 3]


def test_more_than_three_dendrites_as_documented():
    GPA.pc.set_testing_dendrite_capacity(False)
    GPA.pc.set_switch_mode(GPA.pc.DOING_SWITCH_EVERY_TIME)
    GPA.pc.set_retain_all_dendrites(True)
    GPA.pc.set_max_dendrites(5)
    model, seen = run(UPA.initialize_pai(mlp()), [1.0] * 9)
    assert (
        len(seen) == 6 and seen[-1][1] and GPA.pai_tracker.member_vars["num_dendrites_added"] == 5
    )


def test_fixed_switch_as_documented():
    GPA.pc.set_testing_dendrite_capacity(False)
    GPA.pc.set_switch_mode(GPA.pc.DOING_FIXED_SWITCH)
    GPA.pc.set_fixed_switch_num(2)
    GPA.pc.set_first_fixed_switch_num(3)
    _, seen = run(UPA.initialize_pai(mlp()), [1, 2, 3, 4, 5, 6, 7])
    assert [i for i, (restructured, _) in enumerate(seen) if restructured] == [2, 4, 6]


@pytest.mark.parametrize("maximizing", [True, False])
def test_history_with_scheduler_search_and_the_best_network_at_the_end(maximizing, tmp_path):
    GPA.pc.set_testing_dendrite_capacity(False)
    GPA.pc.set_n_epochs_to_switch(3)
    GPA.pc.set_max_dendrite_tries(1)
    model = UPA.initialize_pai(mlp(), save_name="exp", maximizing_score=maximizing)
    sign = 1.0 if maximizing else -1.0
    scores = [10 + sign * s for s in (1, 2, 3, *[2.0] * 40)]
    model, seen = run(
        model,
        scores,
        scheduler=(ReduceLROnPlateau, {"mode": "max" if maximizing else "min", "patience": 1}),
    )
    actions = [row["action"] for row in GPA.pai_tracker.growth.records.rows.switches]
    assert actions == ["grow", "lower_rate", "commit_rate", "finish"] and dendrites(model) == [0, 0]
    assert seen[-1] == (True, True) and sum(
        p.numel() for p in model.parameters()
    ) == UPA.count_params(mlp())
    with open(tmp_path / "exp" / "expbestTestScores.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["Param Counts", "Max Valid Scores", "Max Test Scores"]
    assert [int(r["Param Counts"]) for r in rows] == [66, 66 * 2 + 10] and float(
        rows[0]["Max Test Scores"]
    ) == 10 + sign * 3 - 1


def test_doing_pai_false_ends_at_the_plateau_without_dendrites():
    GPA.pc.set_n_epochs_to_switch(2)
    model, seen = run(UPA.initialize_pai(mlp(), doing_pai=False), [1.0] * 9)
    assert len(seen) == 3 and seen[-1][1] and dendrites(model) == [0, 0]


def test_making_graphs_false_leaves_the_csv_files(tmp_path):
    for name, graphs, drawing, pictures in (
        ("quiet", False, True, []),
        ("still", True, False, []),
        ("drawn", True, True, ["drawn.png"]),
    ):
        GPA.pc.set_drawing_pai(drawing)
        run(UPA.initialize_pai(mlp(), save_name=name, making_graphs=graphs), [1.0])
        names = [p.name for p in (tmp_path / name).iterdir()]
        assert f"{name}Scores.csv" in names and [n for n in names if n.endswith(".png")] == pictures


def test_optimizer_instance_of_a_foreign_trainer():
    model = UPA.initialize_pai(mlp())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    GPA.pai_tracker.set_optimizer_instance(optimizer)
    model, restructured, _ = GPA.pai_tracker.add_validation_score(torch.tensor(1.0), model)
    assert (
        restructured
        and len(optimizer.param_groups[0]["params"]) == len(list(model.parameters())) == 4 + 2 * 3
    )


def test_param_groups_survive_setup():
    model = UPA.initialize_pai(mlp())
    GPA.pai_tracker.set_optimizer(torch.optim.SGD)
    optimizer = GPA.pai_tracker.setup_optimizer(
        model,
        {
            "params": [
                {"params": model[0].parameters(), "lr": 0.1},
                {"params": model[2].parameters()},
            ],
            "lr": 0.2,
        },
    )
    assert [(g["lr"], len(g["params"])) for g in optimizer.param_groups] == [(0.1, 2), (0.2, 2)]


@pytest.mark.parametrize(
    "setting, rate", [("PARAM_VALS_BY_UPDATE_EPOCH", 1e-2), ("PARAM_VALS_BY_TOTAL_EPOCH", 1e-3)]
)
def test_scheduler_epochs_start_anew_or_go_on(setting, rate):
    GPA.pc.set_param_vals_setting(getattr(GPA.pc, setting))
    model = UPA.initialize_pai(mlp())
    run(model, [1.0, 2.0], scheduler=(StepLR, {"step_size": 2}))
    assert GPA.pai_tracker.growth.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_the_listing_of_unwrapped_parameters(capsys):
    GPA.pc.set_silent(False)
    GPA.pc.append_modules_to_track([nn.Embedding])
    UPA.initialize_pai(
        nn.ModuleDict({"emb": nn.Embedding(3, 2), "norm": nn.BatchNorm1d(2), "fc": nn.Linear(2, 2)})
    )
    out = capsys.readouterr().out
    wrapped, tracked = out.split("not tracked or wrapped.")
    assert (
        "The following params are not wrapped." in wrapped
        and "emb.weight" in wrapped
        and "norm.weight" in wrapped
    )
    assert (
        "norm.weight" in tracked
        and "emb.weight" not in tracked
        and "outside of dendritic blocks: norm" in tracked
    )
    GPA.pc.set_unwrapped_modules_confirmed(True)
    UPA.initialize_pai(nn.ModuleDict({"emb": nn.Embedding(3, 2), "fc": nn.Linear(2, 2)}))
    assert capsys.readouterr().out == ""


class Pair(nn.Module):
    def __init__(self, netG, netD):
        super().__init__()
        self.netG = netG
        self.netD = netD


def test_pair_of_networks_and_conversion_apart_from_the_tracker():
    model = UPA.initialize_pai(Pair(mlp(), mlp(1)))
    assert len(UPA.get_pai_modules(model.netG)) == len(UPA.get_pai_modules(model.netD)) == 2
    net = UPA.convert_network(mlp())
    GPA.pai_tracker.initialize(doing_pai=True, save_name="two", maximizing_score=True)
    assert GPA.pai_tracker.growth.network is net


class GruNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(5, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        out, _ = self.rnn(x[:, None].expand(-1, 4, -1))
        return self.head(out[:, -1])


def test_gru_with_its_processor_as_documented():
    GPA.pc.append_module_names_to_convert(["GRU"])
    GPA.pc.append_module_names_with_processing(["GRU"])
    GPA.pc.append_module_by_name_processing_classes([PBM.GRUProcessor])
    model = UPA.initialize_pai(GruNet())
    with pytest.raises(
        DimensionError,
        match=r"layer 'rnn' \(GRU\).*\[8, 4, 6\].*model\.rnn\.set_this_input_dimensions\(\[-1, -1, "
        r"0\]\)",
    ):
        model(torch.randn(8, 5))
    model.rnn.set_this_input_dimensions([-1, -1, 0])
    model, seen = run(model, [1.0, 2.0, 3.0, 4.0])
    assert dendrites(model) == [3, 3] and isinstance(
        model.rnn.dendrites[0].processor, PBM.GRUProcessor
    )


def test_replacement_of_a_pretrained_module_as_documented():
    torchvision = pytest.importorskip(
        "torchvision", reason="the documented ResNet replacement needs torchvision"
    )
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    before = resnet(x)
    GPA.pc.append_modules_to_replace([torchvision.models.resnet.ResNet])
    GPA.pc.append_replacement_modules([PBM.ResNetPB])
    model = UPA.initialize_pai(resnet)
    assert isinstance(model, PBM.ResNetPAI) and len(UPA.get_pai_modules(model)) == 1 + 16 + 3 + 1
    torch.testing.assert_close(model(x), before)
    with pytest.raises(TypeError, match="takes a torchvision ResNet; Linear lacks"):
        PBM.ResNetPB(nn.Linear(2, 2))


def test_block_by_pai_sequential_on_pc():
    block = GPA.pc.PAISequential([nn.Linear(5, 3), nn.BatchNorm1d(3)])
    GPA.pc.set_input_dimensions([-1, 0])
    model = UPA.initialize_pai(nn.Sequential(block))
    assert isinstance(model[0], DendriticLayer) and dendrites(run(model, [1.0, 2.0])[0]) == [2]


def test_load_system_latest_and_best_model_continue():
    GPA.pc.set_testing_dendrite_capacity(False)
    GPA.pc.set_n_epochs_to_switch(2)
    model, _ = run(UPA.initialize_pai(mlp(), save_name="r"), [1.0, 1.0, 1.0, 5.0, 4.0])
    x = torch.randn(3, 5)
    latest = model(x)
    shutil.copytree("r", "saved")
    for name, epochs in (("latest", 5), ("best_model", 4)):
        again = UPA.load_system(UPA.initialize_pai(mlp(7), save_name="r"), "saved", name, True)
        assert (
            dendrites(again) == [1, 1] and GPA.pai_tracker.member_vars["num_epochs_run"] == epochs
        )
        assert GPA.pai_tracker.member_vars["global_best_validation_score"] == 5.0
        assert torch.equal(again(x), latest) == (name == "latest")
        GPA.pai_tracker.set_optimizer(torch.optim.Adam)
        optimizer = GPA.pai_tracker.setup_optimizer(
            again, {"params": again.parameters(), "lr": 1e-2}
        )
        assert {int(s["step"]) for s in optimizer.state.values()} == {
            epochs - 3
        }  # moments began anew at the growth after epoch 3
        GPA.pai_tracker.add_validation_score(6.0, again)
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        UPA.load_system(again, "r", "nothing")


def test_a_run_loaded_right_after_growth_goes_on_as_the_one_that_was_not_interrupted():
    GPA.pc.set_testing_dendrite_capacity(False)
    GPA.pc.set_n_epochs_to_switch(1)
    GPA.pc.set_find_best_lr(False)
    schedule = (ReduceLROnPlateau, {"mode": "max", "patience": 0})
    torch.manual_seed(0)
    model, seen = run(UPA.initialize_pai(mlp(), save_name="r"), [1.0, 1.0], scheduler=schedule)
    assert seen[-1] == (True, False)
    shutil.copytree("r", "saved")
    model, _ = run(model, [2.0, 3.0], scheduler=schedule)
    again = UPA.load_system(UPA.initialize_pai(mlp(9), save_name="r3"), "saved", "latest", True)
    again, _ = run(again, [2.0, 3.0], scheduler=schedule)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert GPA.pai_tracker.growth.optimizer.param_groups[0]["lr"] == 1e-2


def test_save_system_load_net_and_the_plain_network():
    model, _ = run(UPA.initialize_pai(mlp(), save_name="r"), [1.0, 2.0])
    x = torch.randn(3, 5)
    UPA.save_system(model, "there", "mine")
    again = UPA.load_system(UPA.initialize_pai(mlp(3), save_name="r2"), "there", "mine")
    assert torch.equal(again(x), model(x))
    UPA.save_net(model, "there", "net")
    for net in (
        UPA.load_net(UPA.convert_network(mlp(4)), "there", "net"),
        UPA.load_net(UPA.convert_network(mlp(4)), "there", "mine"),
        UPA.load_net_from_dict(UPA.convert_network(mlp(5)), model.state_dict()),
        UPA.deep_copy_pai(model),
    ):
        assert torch.equal(net(x), model(x))
    UPA.pai_save_system(model, "there", "final")
    saved = torch.load("there/final_pai.pt", weights_only=True)
    assert sum(v.numel() for v in saved.values()) == UPA.count_params(model)


def test_simulated_cycles_and_a_forced_switch():
    model = UPA.initialize_pai(mlp())
    UPA.simulate_cycles(model, 4)
    assert dendrites(model) == [2, 2]
    model = UPA.initialize_pai(mlp())
    assert dendrites(UPA.change_learning_modes(model, "f", "switched")) == [1, 1]
    GPA.pc.set_testing_dendrite_capacity(False)
    model = UPA.initialize_pai(mlp())
    assert GPA.pai_tracker.add_validation_score(1.0, model, force_switch=True)[1]


def test_tracker_settings_for_data_parallel(tmp_path):
    model = UPA.initialize_pai(ConvNet(nn.Sequential), save_name="dp")
    with pytest.raises(FileNotFoundError, match="save_tracker_settings"):
        GPA.pai_tracker.initialize_tracker_settings()
    model(torch.randn(2, 1, 5, 5)).sum().backward()
    GPA.pai_tracker.save_tracker_settings()
    net = UPA.initialize_pai(ConvNet(nn.Sequential), save_name="dp")
    GPA.pai_tracker.initialize_tracker_settings()
    assert [(layer.neurons, layer.dims) for layer in UPA.get_pai_modules(net)] == [
        (4, (-1, 0, -1, -1))
    ] * 2 + [(3, (-1, 0))]
    wrapped = nn.DataParallel(net)
    model, restructured, _ = GPA.pai_tracker.add_validation_score(1.0, wrapped)
    assert restructured and isinstance(model, nn.DataParallel) and model.module is net


def test_nothing_prompts_exits_or_touches_other_globals():
    code = (
        "import builtins, pdb, sys, torch\n"
        "from torch import nn\n"
        "def no(*a, **k): raise SystemExit('prompt')\n"
        "builtins.input = pdb.set_trace = sys.exit = no\n"
        "from pilimit_lib.dendrites import GPA, UPA\n"
        "GPA.pc.set_drawing_pai(False)\n"
        "model = UPA.initialize_pai(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), "
        "nn.PReLU()))\n"
        "done = False\n"
        "GPA.pai_tracker.set_optimizer(torch.optim.SGD)\n"
        "while not done:\n"
        "    GPA.pai_tracker.setup_optimizer(model, {'lr': 0.1})\n"
        "    model, _, done = GPA.pai_tracker.add_validation_score(0.5, model)\n"
        "print('done', 'matplotlib' in sys.modules, 'torchvision' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {sys.path[0]!r})\n" + code],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip().endswith("done False False")


def test_correlation_training_through_the_facade():
    GPA.pc.set_testing_dendrite_capacity(False)
    GPA.pc.set_perforated_backpropagation(True)
    GPA.pc.set_cap_at_n(True)
    GPA.pc.set_n_epochs_to_switch(2)
    GPA.pc.set_dendrite_improvement_threshold(0.1)
    GPA.pc.get_p_epochs_to_switch()
    model, seen = run(UPA.initialize_pai(mlp(), save_name="pb"), [1.0] * 12)
    phases = [r["phase"] for r in GPA.pai_tracker.growth.records.rows.epochs]
    assert phases[:8] == ["n"] * 3 + ["p"] * 3 + ["n"] * 2


class Tagger(nn.Module):
    """Tokens [b t n] through Linear layers, then one row per sequence through another."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(7, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, tokens):
        return self.head(torch.relu(self.inner(self.embed(tokens))).mean(1))


def test_input_dimensions_of_transformers_reach_linear_layers_of_any_rank():
    GPA.pc.set_input_dimensions([-1, -1, 0])
    tokens = torch.randint(0, 7, (4, 9))
    model = UPA.initialize_pai(Tagger())
    before = model(tokens)
    model, restructured, _ = GPA.pai_tracker.add_validation_score(1.0, model)
    assert restructured and dendrites(model) == [1, 1]
    torch.testing.assert_close(model(tokens), before, atol=1e-6, rtol=0)
    assert model.inner.dims == (-1, -1, 0) and model.head.dims == (-1, 0)
    GPA.pc.set_input_dimensions([-1, 0, -1, -1])
    with pytest.raises(DimensionError, match="inner.set_this_input_dimensions\\(\\[-1, -1, 0\\]"):
        UPA.initialize_pai(Tagger())(tokens)


def test_a_block_of_a_linear_layer_and_its_norm_converts():
    block = GPA.pc.PAISequential([nn.Linear(5, 4), nn.BatchNorm1d(4)])
    model = UPA.initialize_pai(nn.Sequential(block, nn.ReLU(), nn.Linear(4, 3)))
    x = torch.randn(6, 5)
    before = model(x)
    model, _, _ = GPA.pai_tracker.add_validation_score(1.0, model)
    assert dendrites(model) == [1, 1]
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=0)


class Two(nn.Module):
    """Two networks in one module that is never called itself."""

    def __init__(self):
        super().__init__()
        self.one, self.other = mlp(0), mlp(1)


@pytest.mark.parametrize("build, called", [(mlp, lambda m: m), (Two, lambda m: m.other)])
def test_debugging_dimensions_names_all_layers_at_the_first_forward_pass(build, called):
    GPA.pc.set_debugging_input_dimensions(1)
    model = UPA.initialize_pai(build())
    with pytest.raises(DimensionError, match="2 layers have wrong dimensions") as caught:
        called(model)(torch.randn(2, 3, 5))
    assert str(caught.value).count("set_this_input_dimensions([-1, -1, 0])") == 2
    assert called(model)(torch.randn(2, 5)).shape == (2, 3)
