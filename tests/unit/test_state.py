"""A checkpoint's image of a run is exact: written, read and put back, everything goes on with the same bits."""

import inspect
import json
import random
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from train.engine import storage
from train.engine.averaging import averaged_weights
from train.engine.optimizer import capture_optimizer, restore_optimizer
from train.engine.randomness import capture_rng, restore_rng
from train.engine.reduction import ExactReduction
from train.engine.runtime import Runtime
from train.engine.schedule import EarlyStopping, Plateau
from train.engine.state import Progress, RunState, capture, progress_from_json, restore, restore_model
from train.engine.tensors import full, named_tensors

CPU = torch.device("cpu")

# Said by torch 2.13 of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")


# ---- what the tests share --------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Matrices, vectors and a number."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.second = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        """[B, 5] to [B, 3]."""
        return self.second(torch.tanh(self.first(x))) * self.scale


class Layers1D(Layers):
    """FSDP2 takes no numbers, only vectors and more (torch 2.13)."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5]))


class Embeddings(nn.Module):
    """The one model with sparse gradients."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 3, sparse=True)

    def forward(self, x):
        """[B, 5] to [B, 3]; the row is found from the first column."""
        return self.table((x[:, 0] * 100).long() % 7)


class Matrices(nn.Module):
    """Muon takes nothing but matrices."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 4, bias=False)
        self.second = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        """[B, 5] to [B, 3]."""
        return self.second(torch.tanh(self.first(x)))


class ComplexLayer(nn.Module):
    """A complex matrix."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64))

    def forward(self, x):
        """[B, 5] to [B, 3]."""
        return (x.to(torch.complex64) @ self.weight).abs()


class Convolutions(nn.Module):
    """Filters and batch norm's buffers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 2, 2)

    def forward(self, x):
        """[B, 5] to [B, 2, 2, 2]."""
        return self.last(self.norm(self.conv(x.repeat(1, 15).reshape(-1, 3, 5, 5))))


class ChannelsLast(Convolutions):
    """The same with filters that lie in memory as channels_last."""

    def __init__(self):
        super().__init__()
        self.to(memory_format=torch.channels_last)


class Tied(nn.Module):
    """Two layers that share a matrix."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.outer = nn.Linear(5, 5, bias=False)
        self.outer.weight = self.inner.weight

    def forward(self, x):
        """[B, 5] to [B, 5]."""
        return self.outer(torch.tanh(self.inner(x)))


def build(kind, seed=0):
    torch.manual_seed(seed)
    return kind()


def train(model, optimizer, first, steps):
    """Take optimizer steps whose data depend on their numbers only."""
    for step in range(first, first + steps):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))

        def closure(x=x):
            optimizer.zero_grad()
            loss = model(x).float().square().mean()
            loss.backward()
            return loss

        if optimizer.defaults.get("differentiable"):  # such a step may not change what asks for gradients
            closure()
            model.requires_grad_(False)
            optimizer.step()
            model.requires_grad_(True)
        else:
            optimizer.step(closure)


def bits(tensor):
    """Everything there is to know of a tensor; NaN equals itself."""
    tensor = tensor.detach()
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype), tuple(tensor.shape), tensor.stride(), str(tensor.device), data


def plain(value):
    """Turn tensors into their bits and say the type of everything, so that == means the same."""
    if isinstance(value, torch.Tensor):
        return "tensor", bits(value)
    if isinstance(value, dict):
        return "dict", {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [plain(item) for item in value]
    return type(value).__name__, repr(value)


def content(optimizer, model):
    """Return states and settings of an optimizer, by the names of its parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    states = {names[id(parameter)]: values for parameter, values in optimizer.state.items()}
    groups = [
        {**group, "params": [names[id(parameter)] for parameter in group["params"]]} for group in optimizer.param_groups
    ]
    return plain({"states": states, "groups": groups})


def weights(model):
    return plain(dict(model.state_dict()))


def as_file(tensors):
    """Return the bytes that a checkpoint would hold."""
    return b"".join(storage.tensor_chunks({name: full(tensor) for name, tensor in tensors.items()}))


def through_a_file(tensors):
    """Write tensors as a checkpoint does and read them with the library that others would use."""
    return load(as_file(tensors))


def through_json(record):
    return json.loads(json.dumps(record))


def copy_run(model, optimizer, new_model, new_optimizer):
    """Bring a run's model and optimizer into new ones, through the formats of a checkpoint."""
    tensors, aliases = named_tensors(model)
    restore_model(new_model, through_a_file(tensors), through_json(aliases))
    tensors, record = capture_optimizer(optimizer, model)
    restore_optimizer(new_optimizer, new_model, through_a_file(tensors), through_json(record))


def stand_in(rank=0, num_processes=1, others=()):
    """Return a runtime that claims to be one of several processes; `others` are what the other ranks would send."""

    class StandIn(Runtime):
        def gather(self, values):
            return [values, *(other(values) for other in others)]

    place = {"process_index": rank, "num_processes": num_processes, "is_main_process": rank == 0}
    return StandIn(SimpleNamespace(device=CPU, **place), None)


@pytest.fixture
def alone():
    """A process group of one process, in which wrappers wrap."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ---- optimizers ------------------------------------------------------------------------------------------------------

MODELS = {"SparseAdam": Embeddings, "Muon": Matrices}
OPTIONS = {  # beside the defaults: what adds state or settings of another type
    "ASGD": [{"t0": 1.0, "lambd": 0.1}],
    "Adadelta": [{"weight_decay": 0.1}],
    "Adafactor": [{"eps": (1e-6, 1e-3), "weight_decay": 0.1}],
    "Adagrad": [{"initial_accumulator_value": 0.5, "lr_decay": 0.1}],
    "Adam": [{"amsgrad": True}, {"lr": torch.tensor(0.01)}, {"decoupled_weight_decay": True}],
    "AdamW": [{"amsgrad": True}, {"amsgrad": True, "fused": True}, {"amsgrad": True, "maximize": True}],
    "Adamax": [{"weight_decay": 0.1}],
    "LBFGS": [{"history_size": 2, "max_iter": 3}, {"line_search_fn": "strong_wolfe", "max_iter": 3}],
    "Muon": [{"nesterov": False}, {"ns_coefficients": (3.0, -4.0, 2.0), "adjust_lr_fn": "match_rms_adamw"}],
    "NAdam": [{"decoupled_weight_decay": True}],
    "RAdam": [{"decoupled_weight_decay": True}],
    "RMSprop": [{"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True, "foreach": True}],
    "Rprop": [{"etas": (0.4, 1.3)}],
    "SGD": [{"momentum": 0.9}, {"momentum": 0.9, "fused": True}, {"momentum": 0.9, "nesterov": True, "foreach": True}],
    "SparseAdam": [{"betas": (0.8, 0.99)}],
}
KERNELS = ("foreach", "fused", "capturable", "differentiable")


def kinds():
    """Return all optimizers of torch.optim by name."""
    found = {name: getattr(torch.optim, name) for name in torch.optim.__all__}
    return {
        name: kind
        for name, kind in found.items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }


def cases():
    """Return (optimizer, options), with every kernel that an optimizer has."""
    found = []
    for name, kind in kinds().items():
        kernels = [{kernel: True} for kernel in KERNELS if kernel in inspect.signature(kind).parameters]
        for options in [{}, *kernels, *OPTIONS[name]]:
            text = "-".join([name, *(f"{key}={value}" for key, value in options.items())])
            found.append(pytest.param(name, options, id=text))
    return found


def build_optimizer(name, model, options):
    """Two groups with settings of their own, where the optimizer can have them."""
    first, *others = model.parameters()
    groups = [{"params": [first]}, {"params": others, "lr": 0.02}] if others else [{"params": [first]}]
    return kinds()[name]([first, *others] if name == "LBFGS" else groups, **options)


@pytest.mark.parametrize("steps", [0, 2], ids=["before", "after"])
@pytest.mark.parametrize(("name", "options"), cases())
def test_every_optimizer_goes_on_with_the_same_bits(name, options, steps, monkeypatch):
    if options.get("capturable"):  # works on a CPU too, but is not offered there
        for base in kinds()[name].__mro__:
            module = sys.modules[base.__module__]
            monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda **_: ["cpu"], raising=False)
    model = build(MODELS.get(name, Layers))
    optimizer = build_optimizer(name, model, options)
    train(model, optimizer, 0, steps)
    before = content(optimizer, model)

    other = build(MODELS.get(name, Layers), seed=1)
    restored = build_optimizer(name, other, options | {"lr": 0.5})
    train(other, restored, 50, 1)  # what was there must be gone
    copy_run(model, optimizer, other, restored)

    assert content(optimizer, model) == before, "capturing changed the optimizer"
    assert content(restored, other) == before
    train(model, optimizer, steps, 3)
    train(other, restored, steps, 3)
    assert weights(other) == weights(model)
    assert content(restored, other) == content(optimizer, model)


def test_every_optimizer_is_covered_and_keeps_what_it_should():
    assert OPTIONS.keys() == kinds().keys()
    model = build(Layers)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(model, optimizer, 0, 2)
    tensors, record = capture_optimizer(optimizer, model)
    assert tensors == {}
    assert record["groups"][0]["params"] == [name for name, _ in model.named_parameters()]


def test_settings_keep_their_types():
    model = build(Layers)
    optimizer = torch.optim.Adam(model.parameters(), torch.tensor(0.25), (0.8, 0.99))
    optimizer.param_groups[0] |= {"note": "text", "nothing": None, "pairs": [(1, 2.5), True], "deep": {"a": (1,)}}
    other = build(Layers, seed=1)
    restored = torch.optim.Adam(other.parameters())
    copy_run(model, optimizer, other, restored)
    assert content(restored, other) == content(optimizer, model)
    assert restored.param_groups[0]["betas"] == (0.8, 0.99)
    assert type(restored.param_groups[0]["pairs"][0]) is tuple and type(restored.param_groups[0]["pairs"]) is list
    optimizer.param_groups[0]["note"] = object()
    with pytest.raises(ValueError, match=r"note.*object"):
        capture_optimizer(optimizer, model)


def test_kernels_are_the_choice_of_this_run():
    """FSDP2 lacks some of them, and a run may come from there or go there."""
    model, other = build(Layers), build(Layers, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
    train(model, optimizer, 0, 2)
    restored = torch.optim.SGD(other.parameters(), 0.5, foreach=True)
    copy_run(model, optimizer, other, restored)
    group = restored.param_groups[0]
    assert (group["fused"], group["foreach"], group["lr"], group["momentum"]) == (None, True, 0.1, 0.9)
    train(model, optimizer, 2, 3)
    train(other, restored, 2, 3)
    for one, same in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(one, same, rtol=0, atol=1e-6)


class MasterWeights(torch.optim.Optimizer):
    """SGD that keeps weights and averages of bf16 parameters in fp32."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure):
        """Step as SGD with momentum does."""
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {"weights": parameter.float(), "average": torch.zeros_like(parameter, dtype=torch.float32)}
                    state["rows"] = torch.zeros(parameter.shape[:1], dtype=torch.float64)
                state["average"].mul_(0.9).add_(parameter.grad.float())
                state["rows"] += parameter.grad.double().reshape(*parameter.shape[:1], -1).square().sum(-1)
                state["weights"].sub_(group["lr"] * state["average"] / (1 + state["rows"].sum()).float())
                parameter.copy_(state["weights"])


@pytest.mark.parametrize("steps", [0, 2])
def test_bfloat16_parameters_keep_wide_states(steps):
    def pair(seed):
        model = build(Matrices, seed).bfloat16()
        inner = model.forward
        model.forward = lambda x: inner(x.bfloat16())
        return model, MasterWeights(model.parameters())

    model, optimizer = pair(0)
    train(model, optimizer, 0, steps)
    other, restored = pair(1)
    copy_run(model, optimizer, other, restored)
    assert content(restored, other) == content(optimizer, model)
    dtypes = {(key, value.dtype) for values in restored.state.values() for key, value in values.items()}
    wide = {("weights", torch.float32), ("average", torch.float32), ("rows", torch.float64)}
    assert dtypes == (wide if steps else set())
    train(model, optimizer, steps, 3)
    train(other, restored, steps, 3)
    assert weights(other) == weights(model)
    assert {value.dtype for value in other.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("fused", [False, True])
def test_other_dtypes(dtype, fused):
    def pair(seed):
        model = build(Layers, seed).to(dtype)
        inner = model.forward
        model.forward = lambda x: inner(x.to(dtype))
        return model, torch.optim.AdamW(model.parameters(), amsgrad=True, fused=fused)

    model, optimizer = pair(0)
    train(model, optimizer, 0, 2)
    other, restored = pair(1)
    copy_run(model, optimizer, other, restored)
    train(model, optimizer, 2, 3)
    train(other, restored, 2, 3)
    assert weights(other) == weights(model)
    assert content(restored, other) == content(optimizer, model)


def test_complex_parameters():
    model, other = build(ComplexLayer), build(ComplexLayer, seed=1)
    optimizer, restored = (torch.optim.Adam(each.parameters(), amsgrad=True) for each in (model, other))
    train(model, optimizer, 0, 2)
    copy_run(model, optimizer, other, restored)
    train(model, optimizer, 2, 3)
    train(other, restored, 2, 3)
    assert weights(other) == weights(model)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_states_lie_in_memory_as_their_parameters(kind, fused):
    options = {"fused": fused, "momentum": 0.9} if kind is torch.optim.SGD else {"fused": fused}
    model, other = build(ChannelsLast), build(ChannelsLast, seed=1)
    optimizer, restored = (kind(each.parameters(), 0.01, **options) for each in (model, other))
    train(model, optimizer, 0, 2)
    copy_run(model, optimizer, other, restored)
    moment = "exp_avg" if kind is torch.optim.AdamW else "momentum_buffer"
    filters = other.conv.weight
    assert filters.is_contiguous(memory_format=torch.channels_last) and not filters.is_contiguous()
    assert restored.state[filters][moment].stride() == filters.stride()
    assert content(restored, other) == content(optimizer, model)
    train(model, optimizer, 2, 3)
    train(other, restored, 2, 3)
    assert weights(other) == weights(model)


@pytest.mark.parametrize("options", [{}, {"capturable": True}])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.NAdam, torch.optim.RMSprop])
def test_states_lie_on_the_device_of_their_parameters(kind, options, monkeypatch):
    """torch's meta device stands for a GPU: what torch puts there, a number's moments among it, is put there again."""
    monkeypatch.setattr(sys.modules[kind.__module__], "_get_capturable_supported_devices", lambda **_: ["cpu", "meta"])
    here, far = build(Layers), build(Layers).to("meta")
    optimizer, native, restored = (kind(model.parameters(), **options) for model in (here, far, far))
    train(here, optimizer, 0, 1)
    for parameter in far.parameters():
        parameter.grad = torch.zeros_like(parameter)
    native.step()
    tensors, record = capture_optimizer(optimizer, here)
    restore_optimizer(restored, far, through_a_file(tensors), through_json(record))

    def places(optimizer):
        return [{key: value.device.type for key, value in values.items()} for values in optimizer.state.values()]

    assert places(restored) == places(native)


def test_another_optimizer_is_refused_and_nothing_changes():
    model, other = build(Layers), build(Layers, seed=1)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 0, 2)
    tensors, record = capture_optimizer(optimizer, model)
    wrong = [
        (torch.optim.Adam(other.parameters()), r"AdamW.*Adam$"),
        (torch.optim.AdamW(list(other.parameters())[:-1]), "other parameters"),
    ]
    for target, message in wrong:
        train(other, target, 0, 1)
        before = content(target, other)
        with pytest.raises(ValueError, match=message):
            restore_optimizer(target, other, tensors, record)
        assert content(target, other) == before


# ---- models ----------------------------------------------------------------------------------------------------------


def test_model_with_buffers():
    model, other = build(Convolutions), build(Convolutions, seed=1)
    train(model, torch.optim.SGD(model.parameters(), 0.1), 0, 2)
    before = weights(model)
    tensors, aliases = named_tensors(model)
    assert tensors.keys() == model.state_dict().keys() and aliases == {}
    assert {"norm.running_mean", "norm.num_batches_tracked"} <= tensors.keys()
    restore_model(other, through_a_file(tensors), aliases)
    assert weights(other) == weights(model) == before
    assert int(other.norm.num_batches_tracked) == 2


def test_tied_weights_are_saved_once_and_stay_tied():
    model, other = build(Tied), build(Tied, seed=1)
    optimizer, restored = (torch.optim.Adam(each.parameters()) for each in (model, other))
    train(model, optimizer, 0, 2)
    tensors, aliases = named_tensors(model)
    assert sorted(tensors) == ["inner.bias", "inner.weight"]
    assert aliases == {"outer.weight": "inner.weight"}
    copy_run(model, optimizer, other, restored)
    assert other.outer.weight is other.inner.weight
    train(model, optimizer, 2, 3)
    train(other, restored, 2, 3)
    assert weights(other) == weights(model)
    apart = build(Tied)
    apart.outer.weight = nn.Parameter(apart.outer.weight.detach().clone())
    before = weights(apart)
    with pytest.raises(ValueError, match=r"missing outer\.weight.*tied"):
        restore_model(apart, through_a_file(tensors), aliases)
    assert weights(apart) == before


def compiled(model):
    return torch.compile(model)


def compiled_inside(model):
    for name, child in list(model.named_children()):
        setattr(model, name, torch.compile(child))
    return model


def recomputed(model):
    for name, child in list(model.named_children()):
        setattr(model, name, checkpoint_wrapper(child))
    return model


def both(model):
    return torch.compile(recomputed(model))


def in_parallel(model):
    return DistributedDataParallel(model)


def compiled_in_parallel(model):
    return DistributedDataParallel(torch.compile(model))


def sharded(model):
    return fully_shard(model)


def sharded_by_layer(model):
    recomputed(model)
    for child in model.children():
        fully_shard(child)
    return fully_shard(torch.compile(model))


WRAPPERS = [compiled, compiled_inside, recomputed, both, in_parallel, compiled_in_parallel]


@pytest.mark.parametrize(
    ("kind", "wrap"),
    [(kind, wrap) for kind in (Convolutions, Tied) for wrap in WRAPPERS]
    # FSDP2 takes neither channels_last parameters nor a matrix in two units (torch 2.13).
    + [
        (Convolutions, sharded),
        (Tied, sharded),
        (Convolutions, sharded_by_layer),
        (ChannelsLast, compiled_in_parallel),
    ],
)
def test_wrapped_models_write_the_file_of_the_plain_one(kind, wrap, alone):
    model = build(kind)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 0, 2)
    other = wrap(build(kind, seed=1))
    restored = torch.optim.AdamW(other.parameters(), lr=0.5)
    copy_run(model, optimizer, other, restored)
    assert named_tensors(other)[1] == named_tensors(model)[1]
    assert capture_optimizer(restored, other)[1] == capture_optimizer(optimizer, model)[1]
    for take in (lambda model, _: named_tensors(model), lambda model, optimizer: capture_optimizer(optimizer, model)):
        assert as_file(take(other, restored)[0]) == as_file(take(model, optimizer)[0])


def test_capturing_after_an_evaluation_finds_the_shards(alone):
    """After a forward pass without backward FSDP2 keeps the root's parameters whole; they are other tensors then."""
    model = fully_shard(build(Layers1D))
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 0, 2)
    before = as_file(named_tensors(model)[0]), as_file(capture_optimizer(optimizer, model)[0])
    with torch.no_grad():
        model(torch.ones(6, 5))
    assert as_file(capture_optimizer(optimizer, model)[0]) == before[1]
    assert as_file(named_tensors(model)[0]) == before[0]


def test_averaged_weights_are_seen_and_leave_no_trace(alone):
    model = fully_shard(build(Layers1D))
    live = named_tensors(model)[0]
    average = {name: value.detach() + 1 for name, value in live.items()}
    x = torch.ones(6, 5)
    with torch.no_grad():
        before = plain(model(x))
        with averaged_weights(RunState(model, None, Progress(1), ema=average), live):
            inside = plain(model(x))
        after = plain(model(x))
    expected = build(Layers1D)
    for parameter in expected.parameters():
        parameter.data += 1
    assert inside == plain(expected(x).detach())
    assert after == before


class Another(Layers):
    """As Layers, with another shape, one layer less and one more."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(4, 2)
        del self.scale
        self.third = nn.Linear(1, 1, bias=False)


def test_a_model_that_does_not_fit_is_refused_and_stays_as_it_is():
    saved = through_a_file(named_tensors(build(Layers))[0])
    model = build(Another, seed=1)
    before = weights(model)
    with pytest.raises(ValueError, match="does not fit the model") as refused:
        restore_model(model, saved, {})
    assert weights(model) == before
    for text in ("missing third.weight", "unknown scale", "second.weight is (3, 4), the model wants (2, 4)"):
        assert text in str(refused.value)
    assert "first" not in str(refused.value)


class Talkative(nn.Linear):
    """A layer that keeps a text."""

    def get_extra_state(self):
        """Return what is no tensor."""
        return "text"


def test_a_model_that_keeps_more_than_tensors_is_refused():
    with pytest.raises(ValueError, match=r"0\._extra_state.*no tensor"):
        named_tensors(nn.Sequential(Talkative(2, 2)))


# ---- progress, generators, the whole ---------------------------------------------------------------------------------


def progress():
    """Return a progress in which nothing has its default."""
    return Progress(
        slots=8,
        step=12345678901,
        epoch=3,
        sample=77,
        samples_seen=10**12,
        skipped_steps=2,
        skipped_in_a_row=1,
        best_value=0.1 + 0.2,
        best_step=1200,
        metrics={"val/loss": 1e-300, "val/accuracy": 1 / 3, "val/ema_loss": float("nan")},
        metrics_step=1300,
        metrics_bytes=4567,
        stream={"size": 64, "block": 3, "state": {"epoch": 0}},
        train_seconds=1234.5678901234567,
        unlogged={"train/loss": 0.1},
        finished=True,
        early_stopping=EarlyStopping(best=-0.7, bad_evaluations=3),
        plateau=Plateau(scale=0.125, best=5e-324, bad_evaluations=1),
    )


def test_progress_is_the_same_after_json():
    before = progress()
    fresh = Progress(slots=1)
    assert all(value != getattr(fresh, name) for name, value in vars(before).items()), "a default proves nothing"
    after = progress_from_json(through_json(asdict(before)))
    assert plain(asdict(after)) == plain(asdict(before))
    assert isinstance(after.plateau, Plateau) and isinstance(after.early_stopping, EarlyStopping)
    assert progress_from_json(through_json(asdict(fresh))) == fresh


@pytest.mark.parametrize("place", [(), ("plateau",), ("early_stopping",)])
def test_progress_of_another_version_is_refused(place):
    def values():
        whole = inner = asdict(progress())
        for name in place:
            inner = inner[name]
        return whole, inner

    whole, inner = values()
    inner["flux"] = 1
    with pytest.raises(ValueError, match="flux"):
        progress_from_json(whole)
    whole, inner = values()
    del inner["best" if place else "best_step"]
    with pytest.raises(ValueError, match="best"):
        progress_from_json(whole)


def draw():
    """Draw from all generators, an odd number of normal numbers among them, which leaves one in store."""
    return [
        random.random(),
        random.gauss(0, 1),
        *np.random.rand(2).tolist(),
        np.random.standard_normal(),
        torch.rand(3).tolist(),
        torch.randn(1).tolist(),
    ]


@pytest.mark.parametrize("draws", range(4))
def test_generators_go_on_where_they_were(draws):
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    for _ in range(draws):
        draw()
    states = through_a_file(capture_rng(CPU))
    expected = [draw() for _ in range(5)]
    random.seed(4)
    np.random.seed(5)
    torch.manual_seed(6)
    draw()
    restore_rng(states, CPU)
    assert [draw() for _ in range(5)] == expected


def a_run(seed, *, scaler=True):
    model = build(Convolutions, seed)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    train(model, optimizer, 0, 2)
    state = RunState(model, optimizer, Progress(slots=4))
    state.ema = {
        name: value.detach() * 0.5 for name, value in named_tensors(model)[0].items() if value.is_floating_point()
    }
    state.ema["norm.num_batches_tracked"] = torch.tensor(seed)
    if scaler:
        state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    return state


def scale(state, steps):
    """Take steps with loss scaling, one of which overflows, and return the scales."""
    state.optimizer.zero_grad()
    scales = []
    for step in range(steps):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step)) * (1e38 if step == 1 else 1)
        state.scaler.scale(state.model(x).square().mean()).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        scales.append(state.scaler.get_scale())
    return scales


def save(state, runtime):
    files, record = capture(state, runtime)
    return {name: through_a_file(tensors) for name, tensors in files.items()}, through_json(record)


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_a_whole_run_goes_on_with_the_same_bits(used):
    state, runtime = a_run(0), stand_in()
    state.progress = progress()
    state.window = torch.tensor([1.5, 2.0, 3.0], dtype=torch.float64)
    if used:
        assert len(set(scale(state, 5))) > 1
    files, record = save(state, runtime)
    expected = draw()

    other = a_run(1)
    scale(other, 2 if used else 0)
    restore(other, runtime, files, record)
    assert draw() == expected
    assert plain(asdict(other.progress)) == plain(asdict(state.progress))
    assert plain(other.ema) == plain(state.ema)
    assert plain(other.window) == plain(state.window)
    assert other.scaler.state_dict() == state.scaler.state_dict()
    assert content(other.optimizer, other.model) == content(state.optimizer, state.model)
    assert scale(other, 5) == scale(state, 5)
    assert weights(other.model) == weights(state.model)
    again, _ = save(other, runtime)
    assert again.keys() == files.keys() == {"model", "optimizer", "ema", "rng"}


def test_a_run_without_the_optional_parts():
    state, other = a_run(0, scaler=False), a_run(1, scaler=False)
    state.ema = other.ema = None
    files, record = save(state, stand_in())
    assert files.keys() == {"model", "optimizer", "rng"} and record["scaler"] is None
    other.window = torch.ones(3)
    restore(other, stand_in(), files, record)
    assert other.window is None and other.ema is None
    assert weights(other.model) == weights(state.model)


def test_generators_and_windows_of_several_processes():
    """Each of as many processes finds its own; on another number the sums are kept, by rank 0."""
    state = a_run(0)
    state.window = torch.tensor([1.0, 2.0])
    torch.manual_seed(9)
    others = iter([*capture_rng(CPU).values(), torch.tensor([10.0, 20.0])])  # in the order in which they are asked for
    expected = [torch.rand(3).tolist()]
    torch.manual_seed(8)
    files, record = save(state, stand_in(0, 2, [lambda _: next(others)]))
    expected.insert(0, torch.rand(3).tolist())

    def restored(rank, num_processes):
        torch.manual_seed(0)
        other = a_run(1)
        restore(other, stand_in(rank, num_processes), files, record)
        return other.window.tolist(), torch.rand(3).tolist()

    assert [restored(rank, 2) for rank in range(2)] == [([1, 2], expected[0]), ([10, 20], expected[1])]
    assert [restored(rank, 4)[0] for rank in range(4)] == [[11, 22], [0, 0], [0, 0], [0, 0]]
    assert restored(0, 1)[0] == [11, 22]


# ---- gradients with the same bits ------------------------------------------------------------------------------------


def fake_gradients(parameters, slot):
    """Gradients of very different sizes, so that the order of sums shows."""
    generator = torch.Generator().manual_seed(slot)
    return [
        torch.randn(parameter.shape, generator=generator) * 10.0 ** torch.randint(-4, 5, (), generator=generator)
        for parameter in parameters
    ]


def balanced(values):
    """Add up from the leaves of a balanced tree."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return balanced(values[:half]) + balanced(values[half:])


@pytest.mark.parametrize("slots", [1, 2, 4, 8])
def test_exact_reduction_adds_in_a_balanced_tree(slots):
    model = build(ChannelsLast)
    parameters = list(model.parameters())
    reduction = ExactReduction(parameters, rank=0, num_processes=1)
    for step in range(3):  # buffers are used again
        gradients = [fake_gradients(parameters, 100 * step + slot) for slot in range(slots)]
        for slot in range(slots):
            for parameter, gradient in zip(parameters, gradients[slot]):
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
            reduction.add()
            assert all(parameter.grad is None for parameter in parameters)
        reduction.finish()
        for position, parameter in enumerate(parameters):
            values = [gradient[position] for gradient in gradients]
            assert torch.equal(parameter.grad, balanced(values))
            assert parameter.grad.stride() == parameter.stride()
        if slots > 2:
            differs = [
                not torch.equal(sum(gradient[position] for gradient in gradients), parameter.grad)
                for position, parameter in enumerate(parameters)
            ]
            assert any(differs), "another order must show"
        for parameter in parameters:
            parameter.grad = None


def test_exact_reduction_takes_a_missing_gradient_as_zero():
    model = build(Layers)
    parameters = list(model.parameters())
    reduction = ExactReduction(parameters, rank=0, num_processes=1)
    for slot in range(4):
        for parameter, gradient in zip(parameters[:-1], fake_gradients(parameters, slot)):
            parameter.grad = gradient if slot != 2 else None
        parameters[-1].grad = torch.ones_like(parameters[-1]) if slot == 2 else None
        reduction.add()
    reduction.finish()
    assert torch.equal(parameters[-1].grad, torch.ones_like(parameters[-1]))
    first = [fake_gradients(parameters, slot)[0] for slot in range(4)]
    assert torch.equal(parameters[0].grad, (first[0] + first[1]) + (0 + first[3]))
