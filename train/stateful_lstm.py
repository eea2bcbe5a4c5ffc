"""Train an LSTM that carries its state through one long sequence: python train/stateful_lstm.py [--FLAG VALUE ...].

One process by design: every sample needs the state that the one before it left.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from data_modules.errors import DataError
from train.engine.cli import run_script
from train.engine.errors import EXIT_DONE, EXIT_STOPPED, UsageError
from train.engine.launched import find_several
from train.engine.settings import ScheduleSettings

if TYPE_CHECKING:  # torch takes seconds to import: --help and refused flags answer without it
    from torch import nn

    from data_modules.frequency import Sequence

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class StatefulSettings(ScheduleSettings):
    """Settings of the stateful LSTM. A step is an update: of one sample, or of a window of them."""

    data: str | None = None
    """.npy array or .csv file, a sample in each row: input columns, and the target as the last one. Default: four noisy
    sinusoids, mixed, of which a one-hot code selects one."""
    validation_data: str | None = None
    """File with other samples of the same columns, for the score with frozen weights while training goes on."""
    test_data: str | None = None
    """File with other samples of the same columns, for the score with frozen weights at the end."""
    hidden_size: int = 64
    """Numbers in h, and in c."""
    window: int = 1
    """Samples of one update. The gradient flows back through these; the state is carried through all."""
    engine: Literal["auto", "eager", "fused"] = "auto"
    """eager: plain PyTorch. fused: the same arithmetic in one compiled kernel, or in a CUDA graph. auto: fused if it is
    to be had."""
    log_every: int = 1000
    """Updates between two lines of training metrics."""

    neutral: ClassVar[frozenset[str]] = ScheduleSettings.neutral | frozenset(["engine", "validation_data", "test_data"])

    def conditions(self) -> Iterator[tuple[bool, str, str]]:
        """Yield, for each rule, whether it holds, the setting, and what it must be."""
        yield from super().conditions()
        yield 1 <= self.hidden_size <= 16384, "hidden_size", "between 1 and 16384"
        yield self.window >= 1, "window", "1 or more"
        for name in ("validation_data", "test_data"):
            yield self.data is not None or getattr(self, name) is None, name, "left out, or given beside --data"
        falls = self.lr_scheduler != "plateau" or self.data is None or self.validation_data is not None
        yield falls, "lr_scheduler", "another one, or given beside --validation_data: plateau follows its loss"


def refuse_several_processes() -> None:
    """Refuse to be one of several processes.

    Raises:
        UsageError: says who asked for them and what to run.
    """
    asked = find_several(os.environ)
    if asked is not None:
        raise UsageError(
            f"{asked}, but the state is carried from sample to sample, so training is one process by design: run "
            "python train/stateful_lstm.py by itself, in a SLURM job with --ntasks=1"
        )


def load_splits(settings: StatefulSettings) -> dict[str, Sequence]:
    """Return the sequences there are, by split.

    Raises:
        DataError: a file cannot be read, holds something else than finite numbers, or has other columns than --data.
    """
    from data_modules.frequency import load_sequence, make_sinusoids

    if settings.data is None:
        return {split: make_sinusoids(split) for split in SPLITS}
    paths = dict(zip(SPLITS, (settings.data, settings.validation_data, settings.test_data)))
    data = {split: load_sequence(path) for split, path in paths.items() if path is not None}
    columns = data["train"].inputs.shape[1]
    for split, sequence in data.items():
        if sequence.inputs.shape[1] != columns:
            raise DataError(
                f"{paths[split]}: has {sequence.inputs.shape[1]} input columns, {settings.data} has {columns}"
            )
    return data


def describe(data: dict[str, Sequence], name: str) -> dict[str, Any]:
    """Return what a run must remember of its data, in plain values."""
    splits = {
        split: {"samples": len(sequence), "columns": sequence.inputs.shape[1], "fingerprint": sequence.fingerprint()}
        for split, sequence in data.items()
    }
    return {"name": name, "fingerprint": splits["train"]["fingerprint"], "splits": splits}


def main(settings: StatefulSettings) -> int:
    """Train, or go on training, and return the exit code."""
    refuse_several_processes()

    import torch

    from models.frequency_lstm import FrequencyLSTM
    from train.engine import session as sessions
    from train.engine.batching import Batching
    from train.engine.preemption import Request
    from train.engine.randomness import seed_all
    from train.engine.runtime import start_runtime
    from train.engine.state import Progress, RunState
    from train.stateful import report
    from train.stateful.choice import choose_engine
    from train.stateful.contract import Course
    from train.stateful.loop import StatefulLoop

    sessions.check_output(settings)
    runtime = start_runtime(settings)
    data = load_splits(settings)
    name = "sinusoids" if settings.data is None else Path(settings.data).stem
    described = describe(data, name)
    # By its content: another way to write its path is not another run.
    by_content = dataclasses.replace(settings, data=settings.data and described["fingerprint"])
    run_name = settings.run_name or sessions.default_run_name(by_content, ["stateful_lstm", name])
    seed_all(settings.seed)
    model = FrequencyLSTM(data["train"].inputs.shape[1], settings.hidden_size).to(runtime.device)
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate, fused=True)
    inputs, targets = (part.to(runtime.device) for part in (data["train"].inputs, data["train"].targets))
    course = Course(model, optimizer, inputs, targets, settings.window, settings.max_grad_norm)
    chosen, build_engine, reason = choose_engine(settings.engine, course)
    settings = dataclasses.replace(settings, run_name=run_name, engine=chosen)

    session = sessions.open_session(settings, runtime, described, model, lambda *_: Batching(1, 1, 1))
    state = RunState(model, optimizer, Progress(slots=1))
    sessions.load_found(settings, runtime, session, state)
    tracker = sessions.start_tracking(settings, runtime, session)
    runtime.say(f"{name}: {' + '.join(f'{len(part):,} {split}' for split, part in data.items())} samples in order")
    runtime.say(f"{model.summary()}, {runtime.device}, an update every {settings.window} sample(s)")
    runtime.say(reason)

    def answer(split: str) -> tuple[torch.Tensor, dict[str, float]]:
        part = data[split]
        answers = report.predict(model, part.inputs.to(runtime.device))
        return answers, report.score(answers, part.targets, part.groups)

    def score_test(_: nn.Module) -> dict[str, float]:
        answers, values = answer("test")
        assert session.run is not None
        picture = session.run.plots / "answers.png"
        report.draw_answers(picture, answers, data["test"].targets, data["test"].groups, f"{run_name}, test split")
        return values

    loop = StatefulLoop(
        settings=settings,
        runtime=runtime,
        session=session,
        state=state,
        course=course,
        engine=build_engine(course),
        evaluate=(lambda: answer("validation")[1]) if "validation" in data else None,
        tracker=tracker,
        data=described,
    )
    request = loop.train()
    epochs = [] if session.run is None else report.write_history(session.run)
    results = sessions.finish(runtime, session, state, tracker, score_test if "test" in data else None, "val/loss")
    if results and epochs:
        loss = epochs[-1]["loss"]
        runtime.say(
            f"training loss of epoch {len(epochs)}: {loss:.4f}, measured while the weights followed the samples"
        )
    runtime.close()
    if request is Request.STOP:
        print(f"saved at update {state.progress.step}; run the same command again to go on")
        return EXIT_STOPPED
    return EXIT_DONE


def run() -> None:
    """Run from the command line."""
    run_script(main, StatefulSettings, __doc__ or "", bad_input=DataError)


if __name__ == "__main__":
    run()
