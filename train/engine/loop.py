"""The one sharded training loop, read from top to bottom.

A step uses one global batch: each slot runs forward and backward with its own seed, gradients are summed over slots
and processes, checked, clipped and applied. Everything that can happen between two steps (log, evaluate, save, stop)
happens in `_between_steps`, so that a checkpoint is always the state at a step boundary.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from train.engine.averaging import averaged_weights, update_average
from train.engine.clipping import clip_gradients
from train.engine.contract import GlobalBatch, Loader, Measure, Score, Slot
from train.engine.evaluation import EvaluationStoppedError
from train.engine.freezing import refuse_unused
from train.engine.fused_adam import update_weights
from train.engine.guard import Guard
from train.engine.heartbeat import Heartbeat
from train.engine.preemption import Preemption, Request
from train.engine.profiling import profile_steps
from train.engine.randomness import derive_seed, seed_torch
from train.engine.reduction import ExactReduction, share_buffers
from train.engine.runtime import Runtime
from train.engine.saver import Saver
from train.engine.schedule import build_schedule, count_steps
from train.engine.session import Session
from train.engine.settings import TrainSettings, parse_every
from train.engine.state import RunState
from train.engine.step_sums import StepSums
from train.engine.tensors import named_tensors
from train.engine.tracking import Tracker


@dataclass
class Loop:
    """Trains until the run is finished or asked to stop."""

    settings: TrainSettings
    runtime: Runtime
    session: Session
    state: RunState
    loader: Loader
    measure: Measure
    evaluate: Score  # of the validation split
    tracker: Tracker
    data: dict[str, Any]  # what a run must remember of its data, in plain values

    def __post_init__(self) -> None:
        settings = self.settings
        self.saver = Saver(settings, self.runtime, self.session, self.state, self.tracker, self.data)
        self.steps_per_epoch = -(-self.loader.num_samples // self.loader.batch_size)
        self.total_steps = count_steps(settings, self.steps_per_epoch)
        self.schedule = build_schedule(settings, self.total_steps)
        self.checkpoint_every = parse_every(settings.checkpoint_every)
        self.eval_every = parse_every(settings.eval_every, minutes=False)
        self.parameters = [p for p in self.state.model.parameters() if p.requires_grad]
        self.buffers = list(self.state.model.buffers())
        self.reduction = None
        if settings.reduction == "exact":
            self.reduction = ExactReduction(self.parameters, self.runtime.rank, self.runtime.num_processes)
        self.on_cpu = self.runtime.device.type == "cpu"
        self.live = named_tensors(self.state.model)[0]
        self.sums = StepSums(settings.max_grad_norm, on_cpu=self.on_cpu)
        self.guard = Guard(skip=settings.on_nonfinite == "skip", fp16=self.state.scaler is not None)
        self.heartbeat = Heartbeat()
        self.window_start = time.perf_counter()
        self.window_samples = 0
        self.metric_names: list[str] = []

    # ---- the story ---------------------------------------------------------------------------------------------------

    def train(self) -> Request:
        """Train; return NOTHING when the run is finished, STOP when it was stopped and saved.

        Raises:
            TrainingError: non-finite values that may not be skipped, or a checkpoint that could not be written; the
                checkpoints before are intact.
        """
        progress = self.state.progress
        stopped_early = progress.early_stopping.exhausted(self.settings.early_stopping_patience)
        progress.finished = progress.unlogged is None and (progress.step >= self.total_steps or stopped_early)
        self.state.model.train()
        first = True
        profiling = profile_steps(self.settings, self.runtime, self.session.run)
        with Preemption(self.runtime.control) as preemption, self._progress_bar() as bar, profiling as after_step:
            self.runtime.asked_to_stop = lambda: preemption.agree(at_once=True) >= Request.STOP
            request = Request.NOTHING
            if progress.unlogged is not None:
                request = self._between_steps(request, preemption, bar)
            while not progress.finished and request is not Request.STOP:
                for batch in self.loader.batches(progress.epoch, progress.sample):
                    if first:
                        self._warm_up_buckets(batch)
                    self.step(batch)
                    if first:
                        self.add_up()
                        self.saver.reserve()
                        first = False
                    self.heartbeat.beat(progress.step)
                    after_step()
                    request = preemption.agree()
                    request = self._between_steps(request, preemption, bar)
                    if progress.finished or request is Request.STOP:
                        break
            self.runtime.asked_to_stop = lambda: False
            preemption.settle()
            self.runtime.on_main(self.saver.wait)
            if request is Request.STOP:
                self.runtime.say(f"stopped by {preemption.signal_name or 'another process'} after step {progress.step}")
        return Request.NOTHING if progress.finished else request

    # ---- one step ----------------------------------------------------------------------------------------------------

    def step(self, batch: GlobalBatch) -> None:
        """Use one global batch."""
        state, progress, device = self.state, self.state.progress, self.runtime.device
        rate = self.settings.learning_rate * self.schedule(progress.step) * progress.plateau.scale
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        sums = []
        of_slot_0: list[torch.Tensor] | None = None
        shared = bool(self.buffers) and self.session.batching.slots > 1
        before = [buffer.clone() for buffer in self.buffers]
        for position, slot in enumerate(batch.slots):
            if shared and position > 0:  # every slot sees the buffers of the step's start, as on any other process
                torch._foreach_copy_(self.buffers, before)
            seed_torch(derive_seed(self.settings.seed, progress.step, slot.number), device)
            sums.append(self._forward_backward(slot, batch.size, last=position == len(batch.slots) - 1))
            if shared and slot.number == 0:
                of_slot_0 = [buffer.clone() for buffer in self.buffers]
        if self.reduction is not None:
            self.reduction.finish()
        if shared:
            share_buffers(self.buffers, of_slot_0, self.runtime.num_processes)
        norm = self._apply(before)
        self.sums.keep(sums, sum(slot.count for slot in batch.slots), norm)
        if self.sums.full:
            self.add_up()
        if self.on_cpu:
            self._look_at_norms()
        progress.step += 1
        progress.sample += batch.size
        progress.samples_seen += batch.size
        self.window_samples += batch.size
        if progress.sample >= self.loader.num_samples:
            progress.epoch, progress.sample = progress.epoch + 1, 0

    def _forward_backward(self, slot: Slot, batch_size: int, *, last: bool) -> list[torch.Tensor]:
        """Add one slot's gradient of the mean loss over the global batch; processes exchange on the last slot.

        Returns the sum of each metric over the slot's samples.
        """
        accelerator = self.runtime.accelerator
        alone = last or self.reduction or self.state.zero
        with nullcontext() if alone else accelerator.no_sync(self.state.model):
            values = self.measure(self.state.model, slot.batch)
            if len(values["loss"]) > slot.count:  # fillers; a slice costs a node in the backward pass
                values = {name: value[: slot.count] for name, value in values.items()}
            if not self.metric_names:
                self.metric_names = list(values)
            losses = values["loss"]
            # The wrappers average gradients over processes, hence the factor. x - x is 0, or NaN where a loss is not
            # finite: then gradients are NaN on every process, and all skip the step without exchanging a word.
            fixed = losses.detach()
            averaged = 1 if self.reduction else self.runtime.num_processes
            factors = (fixed - fixed).add_(averaged / batch_size)
            if self.state.scaler is not None:
                losses = self.state.scaler.scale(losses)
            losses.backward(factors)
        if self.reduction is not None:
            self.reduction.add()
        return [value.detach().sum() for value in values.values()]

    def _apply(self, before: list[torch.Tensor]) -> torch.Tensor:
        """Clip the gradients and update the weights; return the norm before.

        If anything is not finite, the weights stay as they are, and the buffers are as `before`.
        """
        state, zero = self.state, self.state.zero
        norm = self._clip() if zero is None else zero.step()
        if zero is None:
            self._update(norm)
        if self.buffers and not (self.on_cpu and norm.isfinite()):  # else batch norm's averages would stay infinite
            for buffer, value in zip(self.buffers, before):
                buffer.copy_(torch.where(norm.isfinite(), buffer, value))
        step = state.progress.step + 1
        if state.ema is not None:
            update_average(state.ema, self.live, self.settings.ema_decay, step)
        self.guard.watch(step, state.optimizer.param_groups[0]["lr"], norm)
        return norm

    def _clip(self) -> torch.Tensor:
        """Clip the gradients and return their norm before."""
        if self.state.scaler is not None:
            self.state.scaler.unscale_(self.state.optimizer)
        if isinstance(self.state.model, DistributedDataParallel) and any(p.grad is None for p in self.parameters):
            refuse_unused(self.state.model.module)
        return clip_gradients(self.parameters, self.settings.max_grad_norm)

    def _update(self, norm: torch.Tensor) -> None:
        """Update the weights if the gradients and so their norm are finite, and drop the gradients."""
        optimizer, scaler = self.state.optimizer, self.state.scaler
        if self.on_cpu and scaler is None:
            if math.isfinite(norm.item()):
                update_weights(optimizer)
        elif scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        elif any(group.get("fused") for group in optimizer.param_groups):
            # The fused kernels leave everything as it is where this is 1.
            optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            optimizer.step()
        elif math.isfinite(norm.item()):  # waits for the device; only optimizers without a fused form pay
            optimizer.step()
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        # optimizer.zero_grad does this and more, in 80 µs of a step of 2 ms with mlp (torch 2.13, one core).
        for group in self.state.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def add_up(self) -> None:
        """Bring the sums in the state up to this step; to be called before the state is read."""
        self.state.window = self.sums.add_to(self.state.window)

    def _look_at_norms(self) -> None:
        for line in self.guard.look(self.state.progress):
            self.runtime.say(line)

    def _warm_up_buckets(self, batch: GlobalBatch) -> None:
        """Run two passes whose gradients are dropped.

        DistributedDataParallel regroups its buckets after the first pass, which changes the order of sums on three
        or more processes (torch 2.13). Afterwards the first step after a restart is as any other.
        """
        if self.runtime.num_processes < 3 or not isinstance(self.state.model, DistributedDataParallel):
            return
        kept = [buffer.clone() for buffer in self.buffers]
        for _ in range(2):
            seed_torch(0, self.runtime.device)
            self._forward_backward(batch.slots[0], batch.size, last=True)
            self._drop_gradients()
        for buffer, value in zip(self.buffers, kept):
            buffer.copy_(value)

    # ---- between two steps -------------------------------------------------------------------------------------------

    def _between_steps(self, request: Request, preemption: Preemption, bar: Any) -> Request:
        """Do what is due at this step: log, evaluate, save, in this order. Return what the processes agreed on.

        An evaluation that a stop signal interrupts is repeated by the next start, before its first step.
        """
        progress, settings = self.state.progress, self.settings
        if request is Request.ABORT:
            self.runtime.on_main(self.saver.wait)
        last = progress.step >= self.total_steps
        evaluate = last or self._due(self.eval_every.in_steps(self.steps_per_epoch))
        log = evaluate or progress.step % settings.log_every == 0
        values: dict[str, float] = {}
        if log:
            self._look_at_norms()
            values = progress.unlogged or self._training_values()
            shown = {"loss": f"{values['train/loss']:.4f}", "lr": f"{values['train/learning_rate']:.2e}"}
            bar.set_postfix(shown, refresh=False)
        improved = False
        if evaluate:
            try:
                evaluation, improved = self._evaluate()
            except EvaluationStoppedError:
                self.runtime.say(f"the evaluation of step {progress.step} was interrupted; the next start repeats it")
                progress.unlogged = values
                self.saver.save()
                return Request.STOP
            progress.unlogged = None
            values |= evaluation
        progress.finished = progress.finished or last
        bar.update(progress.step - bar.n)
        if log:
            self.tracker.log(progress.step, values)
        if evaluate:
            self._say_evaluation(values, bar)
        stop = request in (Request.STOP, Request.SAVE)
        if stop or improved or progress.finished or self._due(self.checkpoint_every.in_steps(self.steps_per_epoch)):
            self._look_at_norms()
            self.add_up()
            self.saver.save()
        if log or evaluate:
            self.window_start, self.window_samples = time.perf_counter(), 0
        self.saver.watch(preemption)
        return request

    def _due(self, every: int | None) -> bool:
        """Say whether an interval of so many steps ends here. Whole epochs end where the epoch does."""
        return every is not None and self.state.progress.step % every == 0

    def _training_values(self) -> dict[str, float]:
        """Return and reset the means since the last line."""
        state = self.state
        self.add_up()
        assert state.window is not None
        *totals, count, norm, clipped, steps = self.runtime.sum(state.window).tolist()
        state.window.zero_()
        now = time.perf_counter()
        state.progress.train_seconds += now - self.window_start
        values = {f"train/{name}": total / max(count, 1) for name, total in zip(self.metric_names, totals)}
        values |= {
            "train/learning_rate": state.optimizer.param_groups[0]["lr"],
            "train/grad_norm": norm / max(steps, 1),
            "train/clip_rate": clipped / max(steps, 1),
            "train/skipped_steps": state.progress.skipped_steps,
            "epoch": state.progress.epoch + state.progress.sample / self.loader.num_samples,
            "perf/samples_per_second": self.window_samples / max(now - self.window_start, 1e-9),
            "perf/memory_mb": psutil.Process().memory_info().rss / 2**20,
        }
        values |= self.saver.values()
        if self.runtime.device.type == "cuda":
            values["perf/device_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
        return values

    def _evaluate(self) -> tuple[dict[str, float], bool]:
        """Evaluate; update best, early stopping and plateau. Return the values and whether they are the best yet."""
        state, settings, progress = self.state, self.settings, self.state.progress
        values = {f"val/{name}": value for name, value in self.evaluate(state.model).items()}
        if state.ema is not None:
            with averaged_weights(state, self.live):
                values |= {f"val/ema_{name}": value for name, value in self.evaluate(state.model).items()}
        score = values[settings.best_metric]
        sign = 1.0 if settings.mode == "min" else -1.0
        best = progress.best_value
        improved = not math.isnan(score) and (best is None or sign * score < sign * best)
        if improved:
            progress.best_value, progress.best_step = score, progress.step
        progress.metrics, progress.metrics_step = values, progress.step
        progress.early_stopping.update(sign * score, settings.early_stopping_min_delta)
        if settings.lr_scheduler == "plateau":
            progress.plateau.update(values["val/loss"], settings.lr_gamma, settings.lr_patience)
        if progress.early_stopping.exhausted(settings.early_stopping_patience):
            self.runtime.say(
                f"early stop: no better {settings.best_metric} in {settings.early_stopping_patience} evaluations"
            )
            progress.finished = True
        return values, improved

    def _say_evaluation(self, values: dict[str, float], bar: Any) -> None:
        if self.runtime.is_main:
            shown = [f"{name} {values[name]:.4f}" for name in values if name.startswith("val/")]
            total = self.settings.num_train_epochs
            bar.write(
                f"step {self.state.progress.step}/{self.total_steps}  epoch {values['epoch']:.2f}/{total}  "
                f"train/loss {values['train/loss']:.4f}  {'  '.join(shown)}  "
                f"{values['perf/samples_per_second']:,.0f} samples/s"
            )

    def _progress_bar(self) -> Any:
        return tqdm(
            total=self.total_steps,
            initial=self.state.progress.step,
            unit="step",
            dynamic_ncols=True,
            disable=None if self.runtime.is_main else True,  # None: off where there is no terminal
        )
