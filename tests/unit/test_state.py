"""A checkpoint's image of a run is exact: written, read and put back, everything goes on with the same bits."""

import copy
import inspect
import json
import math
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
from train.engine.randomness import capture_rng, restore_rng
from train.engine.runtime import Runtime
from train.engine.schedule import EarlyStopping, Plateau
from train.engine.state import (
    Progress,
    RunState,
    capture,
    capture_optimizer,
    full,
    named_tensors,
    progress_from_json,
    restore,
    restore_model,
    restore_optimizer,
)

CPU = torch.device("cpu")


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
    """Batch norm's buffers, and filters that lie in memory as channels_last."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 2, 2)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        """[B, 5] to [B, 2, 2, 2]."""
        images = x.repeat(1, 15).reshape(-1, 3, 5, 5).contiguous(memory_format=torch.channels_last)
        return self.last(self.norm(self.conv(images)))


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
    data = tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
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
    optimizer = torch.optim.Adam(model.parameters(), torch.tensor(0.25), (0.8, 0.99), foreach=False)
    optimizer.param_groups[0] |= {"note": "text", "nothing": None, "pairs": [(1, 2.5), True], "deep": {"a": (1,)}}
    _, record = capture_optimizer(optimizer, model)
    other = build(Layers, seed=1)
    restored = torch.optim.Adam(other.parameters())
    copy_run(model, optimizer, other, restored)
    assert content(restored, other) == content(optimizer, model)
    assert restored.param_groups[0]["betas"] == (0.8, 0.99)
    assert type(restored.param_groups[0]["pairs"][0]) is tuple and type(restored.param_groups[0]["pairs"]) is list
    optimizer.param_groups[0]["note"] = object()
    with pytest.raises(ValueError, match=r"note.*object"):
        capture_optimizer(optimizer, model)


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
    model, other = build(Convolutions), build(Convolutions, seed=1)
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


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"capturable": True}, {"fused": True}])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.NAdam, torch.optim.RMSprop])
def test_states_lie_on_the_device_of_their_parameters(kind, options, monkeypatch):
    """torch's meta device stands for a GPU: what torch puts there, a number's moments among it, is put there again."""
    options = {key: value for key, value in options.items() if key in inspect.signature(kind).parameters}
    monkeypatch.setattr(sys.modules[kind.__module__], "_get_capturable_supported_devices", lambda **_: ["meta"])
    model, far = build(Layers), build(Layers).to("meta")
    optimizer = kind(model.parameters(), **{**options, "capturable": False})
    train(model, optimizer, 0, 1)
    optimizer.param_groups[0] |= options
    native, restored = (kind(far.parameters(), **options, **slow) for slow in ({}, {}))
    for parameter in far.parameters():
        parameter.grad = torch.zeros_like(parameter)
    native.step()
    tensors, record = capture_optimizer(optimizer, model)
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
        (torch.optim.AdamW([{"params": [parameter]} for parameter in other.parameters()]), "other parameters"),
        (torch.optim.AdamW(list(other.parameters())[::-1]), "other parameters"),
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


WRAPPERS = [compiled, compiled_inside, recomputed, both, in_parallel, compiled_in_parallel, sharded]


@pytest.mark.parametrize(
    ("kind", "wrap"),
    [(kind, wrap) for kind in (Convolutions, Tied) for wrap in WRAPPERS] + [(Convolutions, sharded_by_layer)],
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
