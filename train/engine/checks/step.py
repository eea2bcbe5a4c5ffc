"""Whether one step of the run's own loop does what it should."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from train.engine.checks.finding import Finding, judge, listing, number, skip
from train.engine.checks.loop_gradient import (
    compare_compiled,
    compare_gradients,
    norm_of,
    reference_gradient,
    tolerance,
    trainable,
)
from train.engine.checks.probe import Taken, coming_batches, probe_loop, take_step
from train.engine.checks.subject import Snapshot, Subject, batch_length, trial
from train.engine.contract import GlobalBatch
from train.engine.freezing import stays_in_evaluation
from train.engine.loop import Loop
from train.engine.tensors import Tensors, clean_name, full

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
            yield compare_compiled(subject, batch)
            snapshot.restore()
        reference = None if subject.runtime.accelerator.is_fsdp2 else reference_gradient(subject, batch)
        snapshot.restore()
        before = {name: full(parameter).clone() for name, parameter in trainable(subject).items()}
        averages = _averages(subject)
        first, gradients = _first_step(subject, loop, batch, snapshot)
        yield compare_gradients(subject, first, gradients, reference)
        yield _gradients_cleared(subject)
        if not first.applied:
            return
        yield _step_size(subject, before)
        if gradients:
            yield _step_direction(subject, before, gradients)
        batches = coming_batches(loop)
        steps = [first]
        while len(steps) <= MORE_STEPS and steps[-1].applied:
            steps.append(take_step(loop, next(batches)))
        yield _first_losses(subject, batch, [step.loss for step in steps])
        yield _weights_updated(subject, before, gradients)
        yield from _averages_move(subject, averages)


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
        apart <= tolerance(subject),
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


def _first_step(
    subject: Subject, loop: Loop, batch: GlobalBatch, snapshot: Snapshot
) -> tuple[Taken, dict[str, torch.Tensor]]:
    """Take the first step; return it, and the gradients that the optimizer found, after clipping, on the CPU."""
    gradients: dict[str, torch.Tensor] = {}

    def look(*_: Any) -> None:
        for name, parameter in trainable(subject).items():
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
            "gradients are not dropped after the step: see Loop._drop_gradients, optimizer.zero_grad()",
            "these parameters are trained, but not by this optimizer: it clears its own only",
        ),
        left=left,
    )


def _step_size(subject: Subject, before: dict[str, torch.Tensor]) -> Finding:
    after = trainable(subject)
    moved = norm_of({name: (full(after[name]) - value).double() for name, value in before.items()})
    length = norm_of({name: value.double() for name, value in before.items()})
    size = moved / max(length, 1e-30)
    high = size > LARGEST_STEP
    rate = subject.settings.learning_rate
    used = sorted({group["lr"] for group in subject.state.optimizer.param_groups})
    measured = f"a step at the peak rate {number(rate)} moves the weights by {size:.1e} of their norm"
    if not SMALLEST_STEP <= size <= LARGEST_STEP:
        measured += ": learning rate too high" if high else ": learning rate too low"
    causes: tuple[str, ...] = (
        "--learning_rate: --preflight lr tries rates and suggests one",
        "the initial weights are tiny: use the initialisation of the layer",
        "--max_grad_norm 0 lets a large gradient through: try 1",
    )
    if not high:
        causes = (
            "--learning_rate: --preflight lr tries rates and suggests one",
            "--max_grad_norm is far below the gradient's norm",
        )
    if moved == 0:
        measured = "a step changes nothing"
        causes = (
            "optimizer.step() is not called in each step",
            "the optimizer holds other parameters than the model: build it after the last change of the model",
        )
    if any(not math.isclose(value, rate, rel_tol=1e-6) for value in used):
        measured += f"; the optimizer has the rate {', '.join(map(number, used))}"
        causes = ("the loop sets another rate than --learning_rate: see Loop.step", *causes)
    return judge(
        "step size",
        SMALLEST_STEP <= size <= LARGEST_STEP,
        measured,
        f"{SMALLEST_STEP:.0e} to {number(LARGEST_STEP)}",
        causes,
        size=size,
        learning_rate=rate,
    )


def _step_direction(subject: Subject, before: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> Finding:
    """See that the step goes against the gradient; all optimizers do at their first step."""
    after = trainable(subject)
    slope = sum(
        float(((full(after[name]) - before[name]).to("cpu", torch.float64) * gradient).sum())
        for name, gradient in gradients.items()
    )
    return judge(
        "step direction",
        slope <= 0,
        f"along the first step the loss {'falls' if slope < 0 else 'rises' if slope > 0 else 'stays'}: {slope:.1e}",
        "it does not rise",
        (
            "the optimizer maximises (maximize=True), or the sign of the loss is wrong",
            "--weight_decay is so large that it outweighs the gradient: try a hundredth of it",
        ),
        slope=slope,
    )


def _averages(subject: Subject) -> Tensors:
    """Return copies of what training averages: batch norm's means, and the weights if they are, as one."""
    found = {
        f"{name}.running_mean": module.running_mean.clone()
        for name, module in subject.model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.running_mean is not None
        and not stays_in_evaluation(module)
    }
    if subject.state.ema:
        found["the average of the weights"] = torch.cat(
            [full(value).flatten().float() for value in subject.state.ema.values() if value.is_floating_point()]
        )
    return found


def _averages_move(subject: Subject, before: Tensors) -> Iterator[Finding]:
    """Name averages of training that stay as they were."""
    if not before:
        return
    still = [name for name, value in _averages(subject).items() if value.equal(before[name])]
    yield judge(
        "averages move",
        not still,
        f"unchanged after the first steps: {listing(still)}" if still else f"all {len(before)} do",
        "training updates the averages of batch norm and of the weights",
        (
            "the model is put into evaluation mode while it trains: look for .eval() in the loss or in the loop",
            "the momentum of batch norm is 0, or --ema_decay is 1",
        ),
        unchanged=still,
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
    after = trainable(subject)
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
