"""Whether one step of the run's own loop does what it should."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from train.engine.checks.finding import Finding, judge, listing, number, skip
from train.engine.checks.probe import Taken, coming_batches, local_model, probe_loop, take_step
from train.engine.checks.subject import Snapshot, Subject, batch_length, trial
from train.engine.contract import GlobalBatch, Slot
from train.engine.loop import Loop
from train.engine.randomness import derive_seed, seed_torch
from train.engine.tensors import Tensors, clean_name, full, named_tensors

MORE_STEPS = 10
FP16_ATTEMPTS = 40  # the scale of the loss starts at 65,536 and halves until the gradient is finite
# Norm of a step by norm of the weights. The recipes have 0.009 to 0.33 at their peak rates; 1,000 times those rates
# give 9 to 120, and a millionth of them 7e-9 to 3e-7.
SMALLEST_STEP, LARGEST_STEP = 1e-6, 1.0
EXPLODED = 3.0  # times the loss at the start


def check_step(subject: Subject) -> Iterator[Finding]:
    """Compare the loop's gradient with one that is computed here, and look at what the first steps do to the run."""
    strangers = _strangers(subject)
    if strangers:  # no copy of such a run can be taken, and no checkpoint of it written
        yield _judge_updates(
            f"the optimizer holds {strangers} parameter(s) that are not the model's", ["all"], stop=True
        )
        return
    with trial(subject) as snapshot:
        loop = probe_loop(subject, lr_scheduler="constant", warmup_steps=0, on_nonfinite="stop")
        batch = next(coming_batches(loop))
        yield _loss_of_a_sample(subject, batch)
        if subject.settings.compile and not subject.runtime.accelerator.is_fsdp2:
            yield _compiled_gradient(subject, batch)
            snapshot.restore()
        reference = None if subject.runtime.accelerator.is_fsdp2 else _reference_gradient(subject, batch)
        snapshot.restore()
        before = {name: full(parameter).clone() for name, parameter in _trainable(subject).items()}
        first, gradients = _first_step(subject, loop, batch, snapshot)
        yield _compare_gradients(subject, first, gradients, reference)
        yield _gradients_cleared(subject)
        if not first.applied:
            return
        yield _step_size(subject, before)
        batches = coming_batches(loop)
        steps = [first]
        while len(steps) <= MORE_STEPS and steps[-1].applied:
            steps.append(take_step(loop, next(batches)))
        yield _first_losses(subject, batch, [step.loss for step in steps])
        yield _weights_updated(subject, before, gradients)


def _trainable(subject: Subject) -> Tensors:
    return {name: value for name, value in named_tensors(subject.state.model)[0].items() if value.requires_grad}


def _strangers(subject: Subject) -> int:
    """Return the number of parameters that the optimizer has and the model has not."""
    own = {id(parameter) for parameter in subject.model.parameters()}
    return sum(
        id(parameter) not in own for group in subject.state.optimizer.param_groups for parameter in group["params"]
    )


def _loss_of_a_sample(subject: Subject, batch: GlobalBatch) -> Finding:
    """Compare the losses of samples that are measured together and in two halves."""
    name = "loss of a sample"
    samples = batch.slots[0].batch
    count = batch_length(samples) // 2 * 2
    if count == 0:
        return skip(name, "a pass holds one sample only")
    parts = (slice(0, count), slice(0, count // 2), slice(count // 2, count))
    subject.model.eval()  # batch norm and dropout in training mode see the other samples
    with torch.no_grad():
        together, *halves = (
            subject.losses({key: value[part] for key, value in samples.items()})["loss"].double() for part in parts
        )
    subject.model.train()
    ratio = float(torch.cat(halves).sum() / together.sum()) if float(together.sum()) else 1.0
    apart = float((torch.cat(halves) - together).norm() / together.norm()) if float(together.norm()) else 0.0
    if not math.isfinite(apart):
        return skip(name, "the loss is not finite")
    divided = abs(math.log(ratio) - math.log(2)) < 0.01 if ratio > 0 else False
    return judge(
        name,
        apart <= _tolerance(subject),
        f"losses of {count} samples and of their halves differ by {apart:.1e}"
        + (", those of the halves are twice as large" if divided else ""),
        "the same loss, whatever else is in the batch",
        (
            "the loss is divided by the size of the batch, or is its mean: return one loss for each sample, such as "
            "with reduction='none'; the loop divides by --batch_size",
            "the loss of a sample depends on the other samples (contrastive, or a norm over the batch): then the "
            "number of processes and --micro_batch_size change the result",
        ),
        otherwise="fail" if divided else "warn",
        ratio=ratio,
        apart=apart,
    )


def _tolerance(subject: Subject) -> float:
    """Return the relative difference that two computations of the same numbers may have."""
    if subject.runtime.accelerator.mixed_precision != "no":
        return 0.05
    return 1e-3 if subject.runtime.device.type == "cpu" else 0.01  # TF32 has ten bits


def _reference_gradient(subject: Subject, batch: GlobalBatch) -> dict[str, torch.Tensor]:
    """Return the gradient of the mean of the losses over the global batch, float64 on the CPU, by parameter."""
    totals = {name: torch.zeros_like(parameter) for name, parameter in _trainable(subject).items()}
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
    parameters = _trainable(subject)
    with subject.runtime.accelerator.autocast():
        loss = subject.measure(model, slot.batch)["loss"][: slot.count].sum() / size
    # What fp16 cannot hold would come out as 0.
    scale = 1.0 if subject.state.scaler is None else 1024.0
    found = torch.autograd.grad(loss * scale, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return {name: gradient / scale for name, gradient in zip(parameters, found)}


def _compiled_gradient(subject: Subject, batch: GlobalBatch) -> Finding:
    """Compare the compiled model's gradient with the plain one's, parameter by parameter."""
    slot = batch.slots[0]
    gradients = []
    for seed, model in ((0, subject.model), (1, subject.model), (0, local_model(subject))):
        subject.seed(seed)
        gradients.append(_gradient(subject, model, slot, slot.count))
    plain, other, compiled = gradients
    # Dropout draws other numbers when compiled, so that with it sizes can be compared, but not values.
    random = any(not plain[name].equal(other[name]) for name in plain)
    smallest = 1e-3 * _norm(plain)  # below which a gradient is rounding errors
    wrong = []
    for name, wanted in plain.items():
        one, two, apart = (float(tensor.norm()) for tensor in (wanted, compiled[name], wanted - compiled[name]))
        if max(one, two) <= smallest:
            continue
        if not (one / 3 <= two <= one * 3 if random else apart <= 10 * _tolerance(subject) * one):
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


def _first_step(
    subject: Subject, loop: Loop, batch: GlobalBatch, snapshot: Snapshot
) -> tuple[Taken, dict[str, torch.Tensor]]:
    """Take the first step; return it, and the gradients that the optimizer found, after clipping, on the CPU."""
    gradients: dict[str, torch.Tensor] = {}

    def look(*_: Any) -> None:
        for name, parameter in _trainable(subject).items():
            if parameter.grad is not None:
                gradients[name] = full(parameter.grad).to("cpu", torch.float64, copy=True)

    hook = subject.state.optimizer.register_step_pre_hook(look)
    scaler = subject.state.scaler
    try:
        taken = take_step(loop, batch)
        for _ in range(FP16_ATTEMPTS if scaler is not None else 0):
            if taken.applied:
                break
            lowered = scaler.state_dict()
            snapshot.restore()
            scaler.load_state_dict(lowered)
            taken = take_step(loop, batch)
    finally:
        hook.remove()
    return taken, gradients


def _compare_gradients(
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
    clipped = _norm(gradients)
    factor = taken.norm / clipped if clipped else 0.0
    nothing = torch.zeros((), dtype=torch.float64)
    wanted = _norm(reference)
    distance = _norm({key: gradients.get(key, nothing) * factor - value for key, value in reference.items()})
    apart = distance / wanted if wanted else 1.0
    return judge(
        name,
        apart <= _tolerance(subject),
        f"norm {number(taken.norm)}; computed anew it is {number(wanted)}, the two are {apart:.1e} apart",
        f"{expected}, to {_tolerance(subject):.0e}",
        _causes_of_difference(subject, taken.norm / wanted if wanted else 1.0),
        norm=taken.norm,
        reference=wanted,
        apart=apart,
    )


def _norm(tensors: dict[str, torch.Tensor]) -> float:
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
    }
    possible = {
        text: value
        for text, value in candidates.items()
        if (passes > 1 or "passes" not in text) and (processes > 1 or "process" not in text)
    }
    wanted = math.log(ratio) if ratio > 0 else -math.inf
    return tuple(sorted(possible, key=lambda text: abs(math.log(possible[text]) - wanted)))


def _gradients_cleared(subject: Subject) -> Finding:
    left = [
        clean_name(name)
        for name, parameter in subject.model.named_parameters()
        if parameter.grad is not None and bool(full(parameter.grad).count_nonzero())
    ]
    return judge(
        "gradients cleared",
        not left,
        f"after a step, gradients are left in {listing(left)}" if left else "none is left after a step",
        "every step starts from zero",
        (
            "optimizer.zero_grad() is not called after the step",
            "these parameters are trained, but not by this optimizer: it clears its own only",
        ),
        left=left,
    )


def _step_size(subject: Subject, before: dict[str, torch.Tensor]) -> Finding:
    after = _trainable(subject)
    moved = _norm({name: (full(after[name]) - value).double() for name, value in before.items()})
    length = _norm({name: value.double() for name, value in before.items()})
    size = moved / max(length, 1e-30)
    high = size > LARGEST_STEP
    rate = subject.settings.learning_rate
    measured = f"a step at the peak rate {number(rate)} moves the weights by {size:.1e} of their norm"
    if not SMALLEST_STEP <= size <= LARGEST_STEP:
        measured += ": learning rate too high" if high else ": learning rate too low"
    causes = (
        "--learning_rate: --preflight lr tries rates and suggests one",
        "the initial weights are tiny: use the initialisation of the layer",
        "--max_grad_norm 0 lets a large gradient through: try 1",
    )
    if not high:
        causes = (
            "--learning_rate: --preflight lr tries rates and suggests one",
            "the optimizer holds other parameters than the model: build it after the last change of the model",
            "--max_grad_norm is far below the gradient's norm",
        )
    return judge(
        "step size",
        SMALLEST_STEP <= size <= LARGEST_STEP,
        measured,
        f"{SMALLEST_STEP:.0e} to {number(LARGEST_STEP)}",
        causes,
        size=size,
        learning_rate=rate,
    )


def _first_losses(subject: Subject, batch: GlobalBatch, losses: list[float]) -> Finding:
    start = max(losses[0], subject.task.untrained_loss(batch.slots[0].batch))
    finite = all(math.isfinite(loss) for loss in losses)
    worst = max(loss for loss in losses if math.isfinite(loss))
    said = f"loss {number(losses[0])} at first, {number(losses[-1])} after {len(losses) - 1} steps at the peak rate"
    return judge(
        "first steps",
        finite and worst <= EXPLODED * start,
        said + (f", {number(worst)} at worst" if worst > max(losses[0], losses[-1]) else ""),
        f"finite and below {number(EXPLODED * start)}",
        (
            f"--learning_rate is too high: try {number(subject.settings.learning_rate / 10)}, or --preflight lr",
            "the run starts at its peak rate: try --warmup_steps 100",
            "samples are not normalised: see the check of inputs",
            "gradients are not clipped: try --max_grad_norm 1",
        ),
        losses=[loss if math.isfinite(loss) else None for loss in losses],
    )


def _weights_updated(subject: Subject, before: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> Finding:
    """Name parameters that got a gradient and stay as they are.

    A bias before batch norm, say, has a gradient of rounding errors, which SGD adds without changing a bit.
    """
    after = _trainable(subject)
    expected, still = [], []
    for name, value in before.items():
        if name not in gradients or not value.numel():
            continue
        largest = float(gradients[name].abs().max())
        change = subject.settings.learning_rate * largest
        if change > 4 * torch.finfo(value.dtype).eps * float(value.abs().max()):
            expected.append(name)
            if full(after[name]).equal(value):
                still.append(name)
    if not expected:
        return skip("weights updated", "gradient times learning rate is below what the weights' precision can hold")
    said = f"all {len(expected)} parameters with a gradient changed"
    if still:
        said = f"unchanged after the first steps although they have a gradient: {listing(still)}"
    return _judge_updates(said, still)


def _judge_updates(measured: str, unchanged: list[str], *, stop: bool = False) -> Finding:
    return judge(
        "weights updated",
        not unchanged,
        measured,
        "every parameter with a gradient changes",
        (
            "the optimizer holds other parameters: it was built before the model, or a part of it, was replaced",
            "the optimizer's groups leave these parameters out",
        ),
        stop=stop,
        unchanged=unchanged,
    )
