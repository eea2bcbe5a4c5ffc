"""What a run starts from and what of it is trained: --init_from and --freeze."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models.cnn import FastCNN, SimpleCNN
from models.mlp import MLP
from tests.subjects import classify_subject, statuses
from train.engine.checks.gradients import check_gradients, check_optimizer
from train.engine.checks.outputs import check_initial_loss
from train.engine.checks.step import check_step
from train.engine.errors import UsageError
from train.engine.freezing import freeze
from train.engine.initial import find_origin, initialise


class Alone:
    """A runtime of one process that keeps what is said."""

    def __init__(self):
        self.said = []

    def share(self, value):
        return [value]

    def say(self, text):
        self.said.append(text)


def write(path, model, **changes):
    """Write the model's tensors, some of them changed or, for None, left out."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()} | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    return path


def test_tensors_that_agree_are_taken_and_all_others_listed(tmp_path):
    torch.manual_seed(0)
    there, here = SimpleCNN((1, 8, 8), 3), SimpleCNN((1, 8, 8), 10)
    before = {name: value.clone() for name, value in here.state_dict().items()}
    changes = {"features.0.bias": None, "extra.weight": torch.ones(2, 3), "features.3.bias": torch.ones(64).int()}
    file = write(tmp_path / "weights.safetensors", there, **changes)
    runtime = Alone()
    initialise(here, find_origin(str(file)), runtime)
    taken = {"features.0.weight", "features.3.weight", "classifier.1.weight", "classifier.1.bias"}
    for name, value in here.state_dict().items():
        assert value.equal(there.state_dict()[name] if name in taken else before[name]), name
    assert runtime.said == [
        f"weights of {file}: 4 of the model's 8 tensors taken",
        "  features.3.bias: (64,) here, (64,) of torch.int32 there",
        "  classifier.3.weight: (10, 128) here, (3, 128) there",
        "  classifier.3.bias: (10,) here, (3,) there",
        "  features.0.bias: (32,) here, not there",
        "  extra.weight: not here, (2, 3) there",
    ]


def test_names_of_compiled_models_and_smaller_types_fit(tmp_path):
    there, here = MLP(), MLP()
    file = tmp_path / "half.safetensors"
    save_file({f"_orig_mod.{name}": value.half() for name, value in there.state_dict().items()}, file)
    initialise(here, find_origin(str(file)), Alone())
    for name, value in here.state_dict().items():
        assert value.equal(there.state_dict()[name].half().float())


def test_nothing_in_common_is_an_error_that_lists_both_sides(tmp_path):
    file = write(tmp_path / "mlp.safetensors", MLP())
    with pytest.raises(UsageError, match=r"none of its 4 tensors fits(.|\n)*features.0.weight(.|\n)*layers.1.weight"):
        initialise(SimpleCNN((1, 8, 8)), find_origin(str(file)), Alone())


def test_a_file_that_changes_between_finding_and_loading_is_refused(tmp_path):
    origin = find_origin(str(write(tmp_path / "mlp.safetensors", MLP())))
    write(tmp_path / "mlp.safetensors", MLP())
    with pytest.raises(UsageError, match="another file"):
        initialise(MLP(), origin, Alone())


@pytest.mark.parametrize("name", ["nothing", "notes.txt", "cut.safetensors", "empty_run"])
def test_what_holds_no_weights_is_refused(tmp_path, name):
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "cut.safetensors").write_bytes(b"short")
    (tmp_path / "empty_run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UsageError, match="--init_from"):
        initialise(MLP(), find_origin(str(tmp_path / name)), Alone())


# ---- freezing --------------------------------------------------------------------------------------------------------


def test_frozen_layers_have_no_gradient_and_their_norms_stay_in_evaluation():
    model = FastCNN()
    freeze(model, ["features.[0-6].*"])
    model.train()
    still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    parts = ("0.weight", "2.weight", "2.bias", "4.weight", "6.weight", "6.bias")
    assert still == {f"features.{part}" for part in parts}
    norms = {name: module.training for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert norms == {"features.2": False, "features.6": False, "features.9": True}
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(torch.randn(4, 1, 28, 28)).sum().backward()
    moved = {name for name, value in model.named_buffers() if not value.equal(before[name])}
    assert {name.rsplit(".", 1)[0] for name in moved} == {"features.9"}


def test_a_norm_is_trained_as_long_as_a_part_of_it_is():
    model = FastCNN()
    freeze(model, ["features.2.bias"])
    assert model.train().features[2].training


def test_a_norm_without_parameters_is_frozen_by_the_name_of_its_averages():
    norms = [nn.BatchNorm1d(3, affine=False) for _ in range(2)]
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 3), norms[0]), norms[1], nn.Linear(3, 1))
    freeze(model, ["0.*"])
    model.train()
    assert [norm.training for norm in norms] == [False, True]


@pytest.mark.parametrize(
    ("patterns", "said"), [(["nothing.*"], "'nothing"), (["*"], "nothing is left"), (["layers.1.*", "x"], "'x'")]
)
def test_patterns_that_match_nothing_or_all_list_the_names(patterns, said):
    model = MLP()
    with pytest.raises(UsageError, match=rf"--freeze.*{said}(.|\n)*layers.1.weight\n  layers.1.bias"):
        freeze(model, patterns)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """Weights of a network that has learned the digits a little."""
    folder = tmp_path_factory.mktemp("origin")
    subject = classify_subject(folder, model="simple_cnn")
    optimizer = torch.optim.Adam(subject.model.parameters(), 1e-3)
    for first in range(40):
        optimizer.zero_grad()
        subject.losses(subject.samples(64, first=64 * first))["loss"].mean().backward()
        optimizer.step()
    return write(folder / "origin.safetensors", subject.model)


def test_preflight_takes_a_frozen_pretrained_run_for_what_it_is(tmp_path, origin):
    subject = classify_subject(
        tmp_path, model="simple_cnn", init_from=str(origin), freeze=("features.*",), learning_rate=1e-3
    )
    found = [*check_initial_loss(subject), *check_gradients(subject), *check_optimizer(subject), *check_step(subject)]
    assert set(statuses(found).values()) == {"pass"}, statuses(found)
    assert sum(len(group["params"]) for group in subject.state.optimizer.param_groups) == 4


def small_norms(name, inputs, num_classes):
    blocks = [nn.Sequential(nn.Conv2d(before, 8, 3), nn.BatchNorm2d(8), nn.GELU()) for before in (1, 8)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(8 * 16, num_classes))


@pytest.mark.parametrize("frozen", [(), ("0.*",)])
def test_the_averages_of_batch_norm_move_but_not_where_it_is_frozen(tmp_path, frozen):
    subject = classify_subject(tmp_path, build=small_norms, freeze=frozen, learning_rate=1e-3)
    (found,) = [finding for finding in check_step(subject) if finding.check == "averages move"]
    assert found.status == "pass" and found.measured == f"all {1 if frozen else 2} do"


def test_a_frozen_part_is_bit_for_bit_that_of_the_file(tmp_path, origin):
    subject = classify_subject(tmp_path, model="simple_cnn", init_from=str(origin), freeze=("features.*",))
    saved = load_file(origin)
    live = dict(subject.model.named_parameters())
    subject.losses(subject.samples(8))["loss"].mean().backward()
    subject.state.optimizer.step()
    assert all(live[name].equal(saved[name]) == name.startswith("features") for name in saved)
