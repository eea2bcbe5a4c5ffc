"""The gradient that the loop computes, beside one that is computed here."""

from __future__ import annotations

import math

import torch
from torch import nn

from train.engine.checks.finding import Finding, judge, listing, number, skip
from train.engine.checks.probe import Taken, local_model
from train.engine.checks.subject import Subject
from train.engine.contract import GlobalBatch, Slot
from train.engine.randomness import derive_seed, seed_torch
from train.engine.tensors import Tensors, named_tensors


def trainable(subject: Subject) -> Tensors:
    return {name: value for name, value in named_tensors(subject.state.model)[0].items() if value.requires_grad}


def tolerance(subject: Subject) -> float:
    """Return the relative difference that two computations of the same numbers may have."""
    if subject.runtime.accelerator.mixed_precision != "no":
        return 0.05
    return 1e-3 if subject.runtime.device.type == "cpu" else 0.01  # TF32 has ten bits


def reference_gradient(subject: Subject, batch: GlobalBatch) -> dict[str, torch.Tensor]:
    """Return the gradient of the mean of the losses over the global batch, float64 on the CPU, by parameter."""
    totals = {name: torch.zeros_like(parameter) for name, parameter in trainable(subject).items()}
    model, runtime = local_model(subject), subject.runtime
    buffers = [buffer.clone() for buffer in model.buffers()]
    for slot in batch.slots:
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), buffers):
                buffer.copy_(value)
        seed_torch(derive_seed(subject.settings.seed, subject.state.progress.step, slot.number), runtime.device)
        for name, gradient in _gradient(subject, model, slot, batch.size).items():
            totals[name] += gradient
    return {name: runtime.sum(total) for name, total in totals.items()}


def _gradient(subject: Subject, model: nn.Module, slot: Slot, size: int) -> dict[str, torch.Tensor]:
    """Return the gradient of a slot's part of the mean loss over `size` samples, by parameter; zeros where none is."""
    parameters = trainable(subject)
    with subject.runtime.accelerator.autocast():
        loss = subject.measure(model, slot.batch)["loss"][: slot.count].sum() / size
    # What fp16 cannot hold would come out as 0.
    scale = 1.0 if subject.state.scaler is None else 1024.0
    found = torch.autograd.grad(loss * scale, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return {name: gradient / scale for name, gradient in zip(parameters, found)}


def compare_compiled(subject: Subject, batch: GlobalBatch) -> Finding:
    """Compare the compiled model's gradient with the plain one's, parameter by parameter."""
    slot = batch.slots[0]
    gradients = []
    for seed, model in ((0, subject.model), (1, subject.model), (0, local_model(subject))):
        subject.seed(seed)
        gradients.append(_gradient(subject, model, slot, slot.count))
    plain, other, compiled = gradients
    # Dropout draws other numbers when compiled, so that with it sizes can be compared, but not values.
    random = any(not plain[name].equal(other[name]) for name in plain)
    smallest = 1e-3 * norm_of(plain)  # below which a gradient is rounding errors
    wrong = []
    for name, wanted in plain.items():
        one, two, apart = (float(tensor.norm()) for tensor in (wanted, compiled[name], wanted - compiled[name]))
        if max(one, two) <= smallest:
            continue
        if not (one / 3 <= two <= one * 3 if random else apart <= 10 * tolerance(subject) * one):
            wrong.append(f"{name} ({number(two)} for {number(one)})")
    return judge(
        "compiled gradient",
        not wrong,
        f"differs from the plain model's in {listing(wrong)}"
        if wrong
        else f"as the plain model's in all {len(plain)} parameters",
        "the same size, with dropout, for each parameter" if random else "the same for each parameter",
        (
            "torch.compile makes a wrong backward pass of this model here: leave --compile out",
            "another version of torch may compile it rightly",
        ),
        wrong=wrong,
    )


def compare_gradients(
    subject: Subject, taken: Taken, gradients: dict[str, torch.Tensor], reference: dict[str, torch.Tensor] | None
) -> Finding:
    name, expected = "gradient of the loop", "the gradient of the mean loss over the global batch"
    if not taken.applied:
        return judge(
            name,
            False,
            "the loss or a gradient of the first batch is NaN or infinite",
            "finite",
            (
                "samples hold NaN or infinity, or are not normalised: see the checks of inputs and of features",
                "a logarithm, root or division by 0 in the loss or in the model: use the forms of torch.nn.functional "
                "that work on logits, or add a small number",
                "the precision cannot hold the numbers: try --mixed_precision no",
            ),
            stop=True,
        )
    if reference is None:
        return skip(name, "with FSDP no process holds a whole gradient to compare")
    clipped = norm_of(gradients)
    factor = taken.norm / clipped if clipped else 0.0
    nothing = torch.zeros((), dtype=torch.float64)
    wanted = norm_of(reference)
    distance = norm_of({key: gradients.get(key, nothing) * factor - value for key, value in reference.items()})
    apart = distance / wanted if wanted else 1.0
    if not gradients:  # the optimizer was not asked for a step
        apart = abs(taken.norm / wanted - 1) if wanted else 1.0
    return judge(
        name,
        apart <= tolerance(subject),
        f"norm {number(taken.norm)}; computed anew it is {number(wanted)}, the two are {apart:.1e} apart",
        f"{expected}, to {tolerance(subject):.0e}",
        _causes_of_difference(subject, taken.norm / wanted if wanted else 1.0),
        norm=taken.norm,
        reference=wanted,
        apart=apart,
    )


def norm_of(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors.values()))


def _causes_of_difference(subject: Subject, ratio: float) -> tuple[str, ...]:
    """Return what makes a gradient `ratio` times as large as it should be, the factor that fits best first."""
    batching = subject.session.batching
    passes, processes = batching.accumulation, batching.num_processes
    share = batching.batch_size // processes
    candidates = {
        f"the loss is divided by the {passes} passes once more: the loop divides by --batch_size, once; "
        f"compare with --micro_batch_size {share}": 1 / passes,
        f"each of the {passes} passes is averaged by itself and then added; compare with --micro_batch_size {share}": (
            passes
        ),
        f"the {processes} processes average their gradients twice: try one process": 1 / processes,
        f"the {processes} processes add their gradients where they should average: try one process": processes,
        "the processes do not exchange gradients, or only of the last pass (no_sync): try one process": 1.0,
        "gradients of an earlier step are left: call optimizer.zero_grad() after every step": 2.0,
        "the model draws random numbers that no seed reaches: use torch's own generators in forward": 1.0,
        "gradients are changed between backward and the step: see Loop._apply": 1.0,
    }
    possible = {
        text: value
        for text, value in candidates.items()
        if (passes > 1 or "passes" not in text) and (processes > 1 or "process" not in text)
    }
    wanted = math.log(ratio) if ratio > 0 else -math.inf
    return tuple(sorted(possible, key=lambda text: abs(math.log(possible[text]) - wanted)))
