"""Where gradients flow, who would use them, and whether samples of a batch stay apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from statistics import median

import torch
from torch import nn

from train.engine.checks.finding import Finding, judge, listing, number, skip
from train.engine.checks.subject import Subject, batch_length, trial
from train.engine.contract import Batch
from train.engine.tensors import clean_name, full

SAMPLES = 64
FEW = 8  # samples that are looked at one by one
EXPLODING = 1000.0  # times the loss that theory expects; sound layers have about as much as the loss, or less
STEPS = 3  # of Adam, after which a layer that starts from zero has a gradient


def check_gradients(subject: Subject) -> Iterator[Finding]:
    """Name parameters with zero, non-finite or exploding gradient of the training loss."""
    norms = _gradient_norms(subject)
    silent = [name for name, norm in norms.items() if norm == 0]
    if silent and subject.settings.preflight == "full":
        # Weights that start at zero (a zero-initialised residual branch, say) silence others for a step.
        silent = [name for name in silent if name in _silent_after_steps(subject)]
    broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
    usual = median(norms.values()) if norms else 0.0
    limit = EXPLODING * max(1.0, subject.task.untrained_loss(subject.samples(SAMPLES)))
    exploding = [name for name, norm in norms.items() if norm > limit]
    total = math.sqrt(sum(norm * norm for norm in norms.values()))
    yield judge(
        "gradient flow",
        not silent and bool(norms),
        f"zero in {len(silent)} of {len(norms)} parameters: {listing(silent)}"
        if silent
        else f"all {len(norms)} parameters have one",
        "every trainable parameter has a gradient",
        (
            "something cuts the graph behind these layers: .detach(), .data, .item(), torch.no_grad(), argmax",
            "these layers are not used in forward: use them or remove them",
            "an activation is dead for all samples: check inputs and initial weights",
        ),
        norms=norms,
        zero=silent,
    )
    yield judge(
        "gradient size",
        not broken and not exploding,
        f"not finite in {listing(broken)}"
        if broken
        else f"{number(total)} in total, {number(usual)} in the middle"
        + (f", exploding in {listing([f'{name} ({number(norms[name])})' for name in exploding])}" if exploding else ""),
        f"finite, below {number(limit)}",
        (
            "inputs are not normalised: see the check of inputs",
            "initial weights too large: use the layer's default, or scale by 1/sqrt(inputs of the layer)",
            "a division, logarithm or square root of something that can be 0 in the model or the loss: add an epsilon",
        ),
        total=total,
        nonfinite=broken,
        exploding=exploding,
    )


def _gradient_norms(subject: Subject) -> dict[str, float]:
    """Return the norm of the mean loss's gradient for each trainable parameter."""
    batch = subject.samples(SAMPLES, epoch=0)
    model = subject.model
    model.train()
    subject.seed(0)
    # What fp16 cannot hold would look like no gradient: the loop scales the loss up, too.
    scale = 1.0 if subject.state.scaler is None else 1024.0
    (subject.losses(batch)["loss"].float().mean() * scale).backward()
    return {
        clean_name(name): float(full(parameter.grad).float().norm()) / scale if parameter.grad is not None else 0.0
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _silent_after_steps(subject: Subject) -> list[str]:
    """Return the parameters that still have no gradient after a few steps of Adam."""
    with trial(subject):
        trainable = [parameter for parameter in subject.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trainable, 1e-3)
        for _ in range(STEPS):
            _gradient_norms(subject)
            optimizer.step()
            optimizer.zero_grad()
        return [name for name, norm in _gradient_norms(subject).items() if norm == 0]


def check_optimizer(subject: Subject) -> Iterator[Finding]:
    """Compare the trainable parameters with those that the optimizer has; list the frozen ones."""
    named = {clean_name(name): parameter for name, parameter in subject.model.named_parameters()}
    held = {id(parameter) for group in subject.state.optimizer.param_groups for parameter in group["params"]}
    left_out = [name for name, parameter in named.items() if parameter.requires_grad and id(parameter) not in held]
    strangers = len(held - {id(parameter) for parameter in named.values()})
    wanted = subject.settings.freeze  # these are no finding
    frozen = [
        name
        for name, parameter in named.items()
        if not parameter.requires_grad and not any(fnmatchcase(name, pattern) for pattern in wanted)
    ]
    total = sum(parameter.numel() for parameter in named.values())
    share = sum(named[name].numel() for name in frozen) / max(total, 1)
    yield judge(
        "optimizer",
        not left_out and not strangers,
        f"has {len(held)} parameters"
        + (f", lacks {listing(left_out)}" if left_out else "")
        + (f", and {strangers} that are not the model's" if strangers else ""),
        "has every trainable parameter of this model, and no other",
        (
            "the optimizer was built before the model, or a layer of it, was replaced: build it afterwards",
            "the groups of build_optimizer leave them out",
        ),
        lacks=left_out,
        strangers=strangers,
    )
    hidden = _hidden_parameters(subject)
    yield judge(
        "hidden parameters",
        not hidden,
        f"{len(hidden)} that the model uses and does not have, of shapes {listing([str(shape) for shape in hidden])}"
        if hidden
        else "none",
        "all that the loss depends on is in model.parameters()",
        (
            "layers are in a list or dict that nn.Module does not see: use nn.ModuleList, nn.ModuleDict; until then "
            "they are neither trained nor saved",
        ),
        shapes=hidden,
    )
    asked = " but for what --freeze names" if wanted else ""
    # A frozen table of positions is common; most of a network that stands still is more often an accident.
    yield judge(
        "frozen parameters",
        not frozen,
        f"{share:.0%} of the parameters are frozen: {listing(frozen)}" if frozen else f"none{asked}",
        f"none{asked}",
        (
            "requires_grad was left off after loading or copying weights: model.requires_grad_(True)",
            "you froze them on purpose: then all is well; --freeze does it without a finding",
        ),
        otherwise="fail" if share > 0.5 else "warn",
        frozen=frozen,
        share=share,
    )


def _hidden_parameters(subject: Subject) -> list[list[int]]:
    """Return the shapes of the leaves of the loss's graph that are no parameters of the model."""
    if subject.runtime.accelerator.is_fsdp2:  # the graph has whole copies of its shards
        return []
    subject.state.model.train()
    loss = subject.losses(subject.samples(FEW))["loss"]
    own = {id(parameter) for parameter in subject.model.parameters()}
    found: dict[int, torch.Tensor] = {}
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of AccumulateGrad
        if leaf is not None and id(leaf) not in own:
            found[id(leaf)] = leaf
        nodes += [following for following, _ in node.next_functions]
    return [list(leaf.shape) for leaf in found.values()]


def check_samples_apart(subject: Subject) -> Iterator[Finding]:
    """Change one sample of a batch at a time, then only the answers, and see which outputs change."""
    batch = subject.samples(FEW)
    count = batch_length(batch)
    if count < 2:
        yield skip("samples apart", "there is one sample only")
        return
    subject.state.model.eval()
    before = subject.outputs(batch)
    size = max(float(before.abs().max()), 1e-12)
    mixed = []
    for changed in range(count):
        outputs = subject.outputs(_with_another(batch, subject.task.inputs, changed))
        moved = (outputs - before).abs().flatten(1).amax(dim=1) > 1e-5 * size
        mixed += [(changed, other) for other in moved.nonzero().flatten().tolist() if other != changed]
    text = ", ".join(f"{changed} changes {other}" for changed, other in mixed[:4])
    yield judge(
        "samples apart",
        not mixed,
        f"samples of a batch change each other's outputs: {text}" + (" ..." if len(mixed) > 4 else "")
        if mixed
        else f"each of {count} samples changes its own output only",
        "no sample changes another one's output in evaluation",
        (
            "view or reshape where transpose or permute was meant: the batch dimension is mixed with another",
            "batch norm with track_running_stats=False, or left in training mode: its averages are of the batch",
            "a softmax, mean or attention runs over the batch dimension: check dim=",
        ),
        mixed=mixed,
    )
    if subject.task.targets:
        turned = batch | {name: batch[name].roll(1, dims=0) for name in subject.task.targets}
        same = torch.equal(_seen_by_loss(subject, batch), _seen_by_loss(subject, turned))
        yield judge(
            "labels out of sight",
            same,
            "outputs do not change with the labels" if same else "outputs change with the labels",
            "the model cannot see the answer",
            ("a label enters the model: pass it the inputs only",),
        )


def _with_another(batch: Batch, inputs: tuple[str, ...], changed: int) -> Batch:
    """Return the batch with another sample in one place."""
    other = (changed + 1) % batch_length(batch)
    result = dict(batch)
    for name in inputs:
        result[name] = batch[name].clone()
        result[name][changed] = batch[name][other]
    return result


def _seen_by_loss(subject: Subject, batch: Batch) -> torch.Tensor:
    """Return what the model gives to the loss for a batch."""
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, arguments: object, output: torch.Tensor) -> None:
        seen.append(output.detach())

    handle = subject.model.register_forward_hook(keep)
    try:
        with torch.no_grad():
            subject.losses(batch)
    finally:
        handle.remove()
    return seen[-1]
