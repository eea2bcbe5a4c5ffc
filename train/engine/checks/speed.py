"""How fast the run's own loop is, where its time goes, how long the run will take, and what fits into memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from itertools import repeat
from typing import Any, TypeVar

import psutil
import torch
from torch.nn.parallel import DistributedDataParallel

from train.engine.checks.finding import Finding, judge, skip
from train.engine.checks.probe import coming_batches, local_model, probe_loop
from train.engine.checks.subject import Subject, batch_length, trial
from train.engine.contract import Batch, GlobalBatch
from train.engine.loop import Loop
from train.engine.state import capture
from train.engine.tensors import full

WARM_UP, STEPS, FEWEST = 3, 20, 3
PART_STEPS = 8  # below the ten steps in a row that a guard forgives: no process leaves alone
WARM_UP_SECONDS, SECONDS = 5.0, 10.0
SLOW_INPUT = 0.3  # share of a step
NEARLY_FULL = 0.9  # of the memory
DOUBLINGS = 6

Result = TypeVar("Result")


def check_speed(subject: Subject) -> Iterator[Finding]:
    """Time steps of the run's own loop and their parts, estimate the whole run, and look for the largest pass."""
    with trial(subject):
        loop = _standing_loop(subject)
        batches = coming_batches(loop)
        count = _warm_up(subject, loop, batches)
        if subject.runtime.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, waiting = _time_steps(loop, batches, count)
        batch = next(loop.loader.batches(0, 0))  # a full one, where later ones may be the rest of an epoch
        parts = _time_parts(subject, batch, min(count, PART_STEPS))
        if subject.runtime.device.type != "cpu":  # batches are made ready beside the computation: what is left of it
            waiting = max(0.0, seconds - _time_steps(loop, repeat(batch), count)[0])
        yield _judge_speed(subject, seconds, count, {"input": waiting, **parts})
        yield _estimate_duration(subject, seconds)
        yield _find_micro_batch(subject, batch)


def _standing_loop(subject: Subject, **changes: Any) -> Loop:
    """Return a loop whose steps compute as any other but leave the weights where they are."""
    loop = probe_loop(subject, on_nonfinite="skip", **changes)
    loop.schedule = lambda step: 0.0
    return loop


def _wait(subject: Subject) -> None:
    if subject.runtime.device.type != "cpu":
        torch.accelerator.synchronize()


def _warm_up(subject: Subject, loop: Loop, batches: Iterator[GlobalBatch]) -> int:
    """Take the first steps; return how many more fit into the time for them, the same number on all processes."""
    start = time.perf_counter()
    for _ in range(WARM_UP):
        began = time.perf_counter()
        loop.step(next(batches))
        _wait(subject)
        now = time.perf_counter()
        latest, over = subject.runtime.broadcast((now - began, now - start > WARM_UP_SECONDS))
        if over:
            break
    return max(FEWEST, min(STEPS, int(SECONDS / latest)))


def _time_steps(loop: Loop, batches: Iterator[GlobalBatch], count: int) -> tuple[float, float]:
    """Return the mean seconds of a step, and those of them that went by until its batch was there."""
    waiting = 0.0
    if not loop.on_cpu:
        torch.accelerator.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        began = time.perf_counter()
        batch = next(batches)
        waiting += time.perf_counter() - began
        loop.step(batch)
    if not loop.on_cpu:
        torch.accelerator.synchronize()
    return (time.perf_counter() - start) / count, waiting / count


def _time_parts(subject: Subject, batch: GlobalBatch, count: int) -> dict[str, float]:
    """Return the mean seconds of the parts of a step, measured on one batch, without exchange but for "exchange"."""
    state = subject.state
    together, _ = _time_steps(_standing_loop(subject), repeat(batch), count)
    # The same loop on this process's own model exchanges nothing.
    alone = replace(subject, state=replace(state, model=local_model(subject)))
    changes = {"reduction": "fast"} if subject.settings.reduction == "exact" else {}
    loop = _standing_loop(alone, **changes)
    _time_steps(loop, repeat(batch), 1)
    local, _ = _time_steps(loop, repeat(batch), count)

    spent = {"forward": 0.0, "optimizer": 0.0}

    def timed(part: str, work: Callable[..., Result]) -> Callable[..., Result]:
        def run(*arguments: Any) -> Result:
            _wait(subject)
            start = time.perf_counter()
            result = work(*arguments)
            _wait(subject)
            spent[part] += (time.perf_counter() - start) / count
            return result

        return run

    loop.measure = timed("forward", loop.measure)
    loop._apply = timed("optimizer", loop._apply)  # type: ignore[method-assign]
    whole, _ = _time_steps(loop, repeat(batch), count)
    exchanges = isinstance(state.model, DistributedDataParallel) or subject.settings.reduction == "exact"
    several = exchanges and subject.runtime.num_processes > 1
    return {
        "forward": spent["forward"],
        "backward": whole - spent["forward"] - spent["optimizer"],
        "optimizer": spent["optimizer"],
        "exchange": max(0.0, together - local) if several else 0.0,
    }


def _judge_speed(subject: Subject, seconds: float, count: int, parts: dict[str, float]) -> Finding:
    batch_size = subject.session.batching.batch_size
    memory = psutil.Process().memory_info().rss / 2**20
    said_memory = f"{memory:,.0f} MB in host memory"
    device_memory = None
    if subject.runtime.device.type == "cuda":
        device_memory = torch.cuda.max_memory_allocated() / 2**20
        said_memory += f", {device_memory:,.0f} MB on the device at the peak"
    whole = sum(parts.values())
    shares = {part: spent / whole for part, spent in parts.items()}
    said_parts = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
    if subject.runtime.accelerator.is_fsdp2:
        said_parts += " (with FSDP, exchange is part of forward and backward)"
    return judge(
        "speed",
        shares["input"] <= SLOW_INPUT,
        f"{batch_size / seconds:,.0f} samples/s, {seconds * 1e3:.1f} ms a step; {said_parts}; {said_memory}",
        f"input at most {SLOW_INPUT:.0%} of a step",
        (
            "input is the bottleneck: --num_workers, see docs/benchmarks.md",
            "expensive random changes: try without --augment",
            "samples are on slow or remote storage: copy them to a local disk",
        ),
        otherwise="warn",
        samples_per_second=batch_size / seconds,
        seconds_a_step=seconds,
        steps=count,
        parts=parts,
        memory_mb=memory,
        device_memory_mb=device_memory,
    )


def _estimate_duration(subject: Subject, seconds: float) -> Finding:
    """Add up steps, evaluations and saves of the whole run."""
    loop = probe_loop(subject)
    start = time.perf_counter()
    subject.evaluate(subject.state.model)
    evaluation = time.perf_counter() - start
    start = time.perf_counter()
    for tensors in capture(subject.state, subject.runtime)[0].values():
        for tensor in tensors.values():
            full(tensor).to("cpu", copy=True)
    copy = time.perf_counter() - start  # for which a save holds up the run
    eval_every = loop.eval_every.in_steps(loop.steps_per_epoch)
    assert eval_every is not None, "evaluations are never by the minute"
    evaluations = -(-loop.total_steps // eval_every)
    scores = evaluations * (1 if subject.state.ema is None else 2)
    training = loop.total_steps * seconds + scores * evaluation
    save_every = loop.checkpoint_every.in_steps(loop.steps_per_epoch)
    saves = int(training / 60 / loop.checkpoint_every.count if save_every is None else loop.total_steps / save_every)
    total = training + (saves + 1) * copy
    return judge(
        "duration",
        True,
        f"about {timedelta(seconds=round(total))} for {loop.total_steps:,} steps of {seconds * 1e3:.1f} ms, "
        f"{scores} evaluations of {evaluation:.2f} s, {saves + 1} saves of {copy:.3f} s",
        "",
        seconds=total,
        steps=loop.total_steps,
        evaluations=scores,
        evaluation_seconds=evaluation,
        saves=saves + 1,
        save_seconds=copy,
    )


# ---- memory ----------------------------------------------------------------------------------------------------------


def _find_micro_batch(subject: Subject, batch: GlobalBatch) -> Finding:
    """Estimate the largest pass that memory holds; on a GPU, try it.

    Backward needs what forward kept, and the gradients. More than that, such as what a layer needs while it computes,
    is not in the estimate.
    """
    name = "micro batch"
    if subject.runtime.accelerator.is_fsdp2:
        return skip(name, "not measured with FSDP, which frees and fetches weights as it goes")
    samples = batch.slots[0].batch
    present = batch_length(samples)
    each = _kept_per_sample(subject, samples)
    gradients = sum(p.numel() * p.element_size() for p in subject.model.parameters() if p.requires_grad)
    left = _memory_left(subject) - gradients
    fits = _power_of_two(int(left / each))
    most = subject.session.batching.batch_size // subject.runtime.num_processes
    largest, how = min(fits, most), "estimated"
    if subject.runtime.device.type == "cuda":
        tried = _try_passes(subject, samples, most)
        if tried < largest:  # the search is bounded; or the estimate was too hopeful
            largest, how = tried, "tried"
    if largest == most:
        how = f"all that a process has of a batch; memory would hold {fits:,}"
    return judge(
        name,
        present * each <= NEARLY_FULL * left and largest >= present,
        f"up to {largest:,} samples in a pass ({how}), now {present:,}: {each / 2**10:,.1f} KB kept of each, "
        f"{left / 2**20:,.0f} MB left",
        f"now at most {NEARLY_FULL:.0%} of what is left",
        (
            f"--micro_batch_size {_power_of_two(max(1, present // 2))} halves the pass; the batch stays as it is",
            "another program uses the memory: see nvidia-smi, or top",
        ),
        otherwise="warn",
        largest=largest,
        memory_holds=fits,
        present=present,
        bytes_a_sample=each,
        bytes_left=left,
    )


def _power_of_two(number: int) -> int:
    """Return the largest power of two that is not above a number; 0 for less than 1."""
    return 1 << (number.bit_length() - 1) if number >= 1 else 0


def _kept_per_sample(subject: Subject, samples: Batch) -> float:
    """Return the bytes that forward keeps for backward, for each further sample."""
    many = batch_length(samples)
    few = many // 2
    kept = _kept_bytes(subject, samples, many) - (_kept_bytes(subject, samples, few) if few else 0)
    return max(kept, 1) / (many - few)


def _kept_bytes(subject: Subject, samples: Batch, count: int) -> int:
    model = subject.model
    batch = {name: value[:count].clone() for name, value in samples.items()}  # a view's storage is the whole tensor
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = subject.losses(batch)["loss"].sum()  # keeps alive what was packed: no storage is used twice
    del loss
    return sum(kept.values())


def _memory_left(subject: Subject) -> float:
    """Return the bytes that this process may still use where it computes."""
    if subject.runtime.device.type == "cuda":
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return float(torch.cuda.mem_get_info()[0] + held)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", subject.runtime.num_processes))
    return psutil.virtual_memory().available / here


def _try_passes(subject: Subject, samples: Batch, most: int) -> int:
    """Return the largest pass that ran, doubled from the present one; 0 if not even that did."""
    model = local_model(subject)
    size, largest = batch_length(samples), 0
    for _ in range(DOUBLINGS + 1):
        if size > most:
            break
        try:
            copies = -(-size // batch_length(samples))
            batch = {name: value.repeat(copies, *(1,) * (value.ndim - 1))[:size] for name, value in samples.items()}
            with subject.runtime.accelerator.autocast():
                loss = subject.measure(model, batch)["loss"].mean()
            with _no_gradients_left(subject):
                loss.backward()
            largest = size
        except torch.OutOfMemoryError:
            break
        finally:
            batch = loss = None  # type: ignore[assignment]
            torch.cuda.empty_cache()
        size *= 2
    return largest


@contextmanager
def _no_gradients_left(subject: Subject) -> Iterator[None]:
    try:
        yield
    finally:
        for parameter in subject.model.parameters():
            parameter.grad = None
