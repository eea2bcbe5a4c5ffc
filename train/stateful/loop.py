"""The loop of a stateful model: an engine takes a stretch of updates, and what is due happens between two stretches.

A stretch ends where something is due: a line of metrics, an evaluation, a checkpoint, the end of an epoch; or after a
fraction of a second, for a signal to be heard. How the sequence is cut into stretches changes no bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from tqdm import tqdm

from models.frequency_lstm import State
from train.engine.errors import TrainingError, UsageError, see
from train.engine.preemption import Preemption, Request
from train.engine.runtime import Runtime
from train.engine.saver import Saver
from train.engine.schedule import build_schedule, count_steps
from train.engine.session import Session
from train.engine.settings import ScheduleSettings, parse_every
from train.engine.state import RunState
from train.engine.tracking import Tracker
from train.stateful.contract import SUMS, Course, DivergedError, Engine

# A tanh beyond this, or the argument of one, hardly passes a gradient on: its slope is below a tenth.
SATURATED = 0.95
SILENCE_SECONDS = 30  # after which a line of metrics is printed, too


@dataclass
class StatefulLoop:
    """Trains until the run is finished or asked to stop. Steps are updates, of a window of samples each."""

    settings: ScheduleSettings
    runtime: Runtime
    session: Session
    state: RunState
    course: Course
    engine: Engine
    evaluate: Callable[[], dict[str, float]] | None  # with frozen weights on the validation split, if there is one
    tracker: Tracker
    data: dict[str, Any]  # what a run must remember of its data, in plain values

    def __post_init__(self) -> None:
        settings = self.settings
        self.saver = Saver(settings, self.runtime, self.session, self.state, self.tracker, self.data)
        self.num_samples = len(self.course.inputs)
        sample = self.state.progress.sample
        if sample >= self.num_samples or sample % self.course.window:
            raise UsageError(
                f"the checkpoint is at sample {sample} of an epoch, where no update begins with {self.num_samples} "
                f"samples and --window {self.course.window}: choose another --run_name"
            )
        self.steps_per_epoch = -(-self.num_samples // self.course.window)
        self.total_steps = count_steps(settings, self.steps_per_epoch)
        self.schedule = build_schedule(settings, self.total_steps)
        self.checkpoint_every = parse_every(settings.checkpoint_every).in_steps(self.steps_per_epoch)
        self.eval_every = parse_every(settings.eval_every, minutes=False).in_steps(self.steps_per_epoch)
        if self.state.window is None:
            self.state.window = torch.zeros(SUMS, dtype=torch.float64)
        if self.state.carried is None:  # zeros are what an epoch starts from
            zeros = torch.zeros(1, 1, self.course.model.lstm.hidden_size, device=self.runtime.device)
            epoch = torch.zeros(SUMS, dtype=torch.float64)  # sums of this epoch up to the last line of metrics
            self.state.carried = {"hidden": zeros, "cell": zeros.clone(), "epoch": epoch}
        self.window_start = self.said = time.perf_counter()

    def train(self) -> Request:
        """Train; return NOTHING when the run is finished, STOP when it was stopped and saved.

        Raises:
            TrainingError: an update is not finite, or a checkpoint could not be written; the checkpoints before are
                intact.
        """
        progress = self.state.progress
        progress.finished = progress.step >= self.total_steps
        first = True
        with Preemption(None) as preemption, self._progress_bar() as bar:
            request = Request.NOTHING
            while not progress.finished and request is not Request.STOP:
                self._advance()
                if first:
                    self.saver.reserve()
                    first = False
                request = preemption.agree()
                self._between_stretches(request, preemption, bar)
            self.saver.wait()
            if request is Request.STOP:
                self.runtime.say(f"stopped by {preemption.signal_name} after sample {progress.samples_seen:,}")
        return Request.NOTHING if progress.finished else request

    def _advance(self) -> None:
        """Let the engine take the updates up to where something is due."""
        progress, carried, window = self.state.progress, self.state.carried, self.state.window
        assert carried is not None and window is not None
        updates = self._updates_until_due()
        start = progress.sample
        stop = min(start + updates * self.course.window, self.num_samples)
        peak = self.settings.learning_rate * progress.plateau.scale
        rates = [peak * self.schedule(step) for step in range(progress.step, progress.step + updates)]
        state: State = (carried["hidden"], carried["cell"])
        try:
            carried["hidden"], carried["cell"] = self.engine.advance(start, stop, state, rates, window)
        except DivergedError as error:
            row = start + error.updates * self.course.window
            raise TrainingError(
                f"update {progress.step + error.updates + 1}, from row {row} of the data on: the loss or a gradient is "
                f"NaN or infinite (learning rate {rates[error.updates]:.3g}); not applied. The learning rate is too "
                "high, or the data holds numbers far beyond 1: scale it. Start anew with another --run_name, or "
                "go on from the latest checkpoint with a lower --learning_rate (and --allow_changes learning_rate); "
                f"{see('loss-is-nan-or-infinite')}"
            ) from error
        progress.step += updates
        progress.sample = stop % self.num_samples
        progress.samples_seen += stop - start
        progress.epoch += stop == self.num_samples

    def _updates_until_due(self) -> int:
        progress = self.state.progress
        intervals = [self.settings.log_every, self.eval_every, self.checkpoint_every]
        until_due = [every - progress.step % every for every in intervals if every is not None]
        left = -(-(self.num_samples - progress.sample) // self.course.window)
        in_time = max(1, self.engine.most_samples // self.course.window)
        return min(*until_due, left, in_time, self.total_steps - progress.step)

    # ---- between two stretches ---------------------------------------------------------------------------------------

    def _between_stretches(self, request: Request, preemption: Preemption, bar: Any) -> None:
        """Do what is due: log, evaluate, save, in this order."""
        progress = self.state.progress
        progress.finished = progress.step >= self.total_steps
        epoch_ended = progress.sample == 0
        evaluate = self.evaluate is not None and (progress.finished or self._due(self.eval_every))
        log = evaluate or epoch_ended or progress.finished or self._due(self.settings.log_every)
        values: dict[str, float] = {}
        if log:
            values |= self._training_values(epoch_ended)
            memory = f"{values['perf/memory_mb']:.0f} MB"
            bar.set_postfix(loss=f"{values['train/loss']:.5f}", memory=memory, refresh=False)
        improved = False
        if evaluate:
            evaluation, improved = self._evaluate()
            values |= evaluation
        bar.update(progress.samples_seen - bar.n)
        if log:
            self.tracker.log(progress.step, values)
            self._say(values, bar)
        stop = request in (Request.STOP, Request.SAVE)
        if stop or improved or progress.finished or self._due(self.checkpoint_every):
            self.saver.save()
        if log:
            self.window_start = time.perf_counter()
        self.saver.watch(preemption)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.state.progress.step % every == 0

    def _training_values(self, epoch_ended: bool) -> dict[str, float]:
        """Return and reset the means since the last line; at the end of an epoch, those of the epoch too."""
        progress, carried, window = self.state.progress, self.state.carried, self.state.window
        assert carried is not None and window is not None
        errors, samples, norms, clipped, updates = window.tolist()
        carried["epoch"] += window
        window.zero_()
        now = time.perf_counter()
        progress.train_seconds += now - self.window_start
        values = {
            "train/loss": errors / max(samples, 1),
            "train/learning_rate": self.state.optimizer.param_groups[0]["lr"],
            "train/grad_norm": norms / max(updates, 1),
            "train/clip_rate": clipped / max(updates, 1),
            "epoch": progress.epoch + progress.sample / self.num_samples,
            "perf/samples_per_second": samples / max(now - self.window_start, 1e-9),
            "perf/memory_mb": psutil.Process().memory_info().rss / 2**20,
            "perf/train_seconds": progress.train_seconds,
        }
        if epoch_ended:
            values["train/epoch_loss"] = float(carried["epoch"][0] / carried["epoch"][1])
            carried["epoch"].zero_()
        for name, value, bounded in (
            ("hidden", carried["hidden"], carried["hidden"]),
            ("cell", carried["cell"], carried["cell"].tanh()),
        ):
            values |= {
                f"state/{name}_mean": float(value.mean()),
                f"state/{name}_std": float(value.std(correction=0)),
                f"state/{name}_max": float(value.abs().max()),
                f"state/{name}_saturation": float((bounded.abs() > SATURATED).float().mean()),
            }
        return values | self.saver.values()

    def _evaluate(self) -> tuple[dict[str, float], bool]:
        """Evaluate; update best and plateau. Return the values and whether they are the best yet."""
        progress, settings = self.state.progress, self.settings
        assert self.evaluate is not None
        values = {f"val/{name}": value for name, value in self.evaluate().items()}
        score = values["val/loss"]
        improved = math.isfinite(score) and (progress.best_value is None or score < progress.best_value)
        if improved:
            progress.best_value, progress.best_step = score, progress.step
        progress.metrics, progress.metrics_step = values, progress.step
        if settings.lr_scheduler == "plateau":
            progress.plateau.update(score, settings.lr_gamma, settings.lr_patience)
        return values, improved

    def _say(self, values: dict[str, float], bar: Any) -> None:
        """Print a line at the end of each epoch, where there is an evaluation, and when there was none for long."""
        now = time.perf_counter()
        told = {"train/epoch_loss", "val/loss"} & values.keys() or self.state.progress.finished
        if not told and now - self.said < SILENCE_SECONDS:
            return
        self.said = now
        names = ("train/loss", "train/epoch_loss", "val/loss")
        shown = [f"{name} {values[name]:.4f}" for name in names if name in values]
        bar.write(
            f"epoch {values['epoch']:.2f}/{self.settings.num_train_epochs}  {'  '.join(shown)}  "
            f"{values['perf/samples_per_second']:,.0f} samples/s  {values['perf/memory_mb']:.0f} MB"
        )

    def _progress_bar(self) -> Any:
        return tqdm(
            total=min(self.total_steps * self.course.window, self.settings.num_train_epochs * self.num_samples),
            initial=self.state.progress.samples_seen,
            unit="sample",
            dynamic_ncols=True,
            disable=None,  # off where there is no terminal
        )
