"""Opening a run: find or make its directory, choose the checkpoint to go on from, and put the state into it.

The order matters and is the same on every start:
1. rank 0 opens and locks the run directory and sweeps leftovers;
2. rank 0 chooses a checkpoint, verifies it and compares its settings with the new ones; all hear the choice;
3. the batch is cut into slots, as the checkpoint has them;
4. model and optimizer are built and wrapped, by the script;
5. all processes load the checkpoint into them;
6. newer checkpoints, which are damaged or of another course, are set aside;
7. metrics.jsonl is cut back to the checkpoint, trackers start.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn

from train.engine import checkpoint, storage
from train.engine.batching import Batching, plan_batching
from train.engine.checkpoint import Checkpoint
from train.engine.cli import settings_to_yaml
from train.engine.contract import Score
from train.engine.deepspeed import Zero
from train.engine.errors import TrainingError, UsageError
from train.engine.initial import Origin, find_fitting, initialise
from train.engine.optimizer import build_optimizer
from train.engine.plots import draw_curves
from train.engine.provenance import record_start
from train.engine.resume import choose_checkpoint, choose_origin, compare_settings, describe_architecture
from train.engine.run_directory import RunDirectory, open_run
from train.engine.runtime import Runtime
from train.engine.settings import RunSettings, TrainSettings
from train.engine.state import Progress, RunState, restore, restore_model
from train.engine.tensors import named_tensors
from train.engine.tracking import Tracker
from train.engine.wandb_tracker import check_variables


def default_run_name(settings: RunSettings, parts: list[str]) -> str:
    """Return a name that is the same for the same command, and another one for other settings.

    Only settings that differ from their defaults and can change the result count, so longer training, say, continues
    the run.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    changed = {
        name: value
        for name, value in sorted(dataclasses.asdict(settings).items())
        if name not in settings.neutral and value != defaults[name]
    }
    digest = hashlib.sha256(json.dumps(changed).encode()).hexdigest()[:6]
    plain = ["".join(letter if letter.isalnum() or letter in "_.=" else "-" for letter in part) for part in parts]
    return "-".join([*(part.strip("-.") for part in plain), digest])


@dataclass(frozen=True)
class Session:
    """One start of a run."""

    run: RunDirectory | None  # None for a dry run; on other ranks than 0 it only names the paths
    found: Checkpoint | None  # where to go on from
    batching: Batching
    origin: Origin | None = None  # of the weights that the run began with
    architecture: dict[str, Any] | None = None  # of a model that carries its own


def check_output(settings: RunSettings) -> None:
    """Refuse an output folder that cannot be written, and a W&B that cannot be set up, before anything is loaded.

    Raises:
        UsageError: says which folder or variable and why.
    """
    folder = Path(settings.output_dir).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        reason = "may not be written" if folder.is_dir() else "is no folder"
        raise UsageError(f"--output_dir {settings.output_dir}: {folder} {reason}; choose another folder")
    check_variables(settings)


def open_session(
    settings: RunSettings,
    runtime: Runtime,
    data: dict[str, Any],
    model: nn.Module,
    plan: Callable[..., Batching] = plan_batching,
) -> Session:
    """Open the run on rank 0, choose the checkpoint to resume, if any, and cut the batch; the same on all processes.

    Args:
        settings: the run's.
        runtime: of this start.
        data: what a run must remember of its data, in plain values.
        model: as it was built, before anything wraps it.
        plan: cuts the batch; takes the arguments of `plan_batching`.

    Raises:
        UsageError: on all processes: the folder cannot be written or is in use, the checkpoint asked for does not
            exist or is damaged, settings that change the result differ, --init_from does not fit, or the batch does
            not divide. Nothing was changed.
    """
    architecture = describe_architecture(model)

    def begin() -> tuple[Batching, Origin | None]:
        origin = choose_origin(settings, None)
        if origin is not None:
            find_fitting(model, origin)
        return plan(settings, runtime.num_processes), origin

    if settings.dry_run:
        return Session(None, None, *runtime.on_main(begin), architecture)
    assert settings.run_name is not None
    path = Path(settings.output_dir) / settings.run_name
    mine: list[RunDirectory] = []

    def choose() -> tuple[Checkpoint | None, Batching, Origin | None, list[str]]:
        if settings.only_preflight:  # the run as it would start; its checkpoints stay as they are
            batching, origin = begin()
            mine.append(open_run(path))
            notes = []
            if checkpoint.list_steps(mine[0].checkpoints):
                notes.append(f"{path} has checkpoints; a fresh start is examined, and they stay as they are")
                found, _ = checkpoint.find_newest(mine[0].checkpoints)
                try:
                    notes += [] if found is None else compare_settings(settings, runtime, data, architecture, found)
                except UsageError as error:
                    notes.append(f"training would be refused: {error}")
            return None, batching, origin, notes
        if not checkpoint.list_steps(path / "checkpoints"):  # refuse before a folder is made
            begin()
            if settings.resume in ("latest", "best"):
                raise UsageError(f"--resume {settings.resume}: {path} has no checkpoint")
        mine.append(open_run(path))
        found, messages = choose_checkpoint(settings, mine[0])
        saved_slots = None
        origin = choose_origin(settings, found)
        if found is not None:
            messages += compare_settings(settings, runtime, data, architecture, found)
            messages += [f"resuming {path} from step {found.step} ({found.path})"]
            saved_slots = found.record["progress"]["slots"]
        return found, plan(settings, runtime.num_processes, saved_slots), origin, messages

    found, batching, origin, messages = runtime.on_main(choose)
    for message in messages:
        runtime.say(message)
    return Session(mine[0] if mine else RunDirectory(path), found, batching, origin, architecture)


def prepare_state(settings: TrainSettings, runtime: Runtime, session: Session, model: nn.Module) -> RunState:
    """Wrap the model for training, build its optimizer, and load the checkpoint into both.

    Raises:
        UsageError: the checkpoint, or what --init_from names, does not fit the model.
    """
    accelerator = runtime.accelerator
    sharded = accelerator.is_fsdp2
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if session.found is None and session.origin is not None:
        initialise(model, session.origin, runtime)
    if settings.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    zero = Zero(settings, accelerator, model) if deepspeed else None
    with warnings.catch_warnings():
        # accelerate 1.15 passes broadcast_buffers on, which torch 2.13 calls deprecated.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        if zero is not None:
            model, optimizer = zero.engine, zero.optimizer
        elif settings.reduction == "exact":  # the loop exchanges gradients itself
            model = accelerator.prepare_model(model, evaluation_mode=True)
            optimizer = accelerator.prepare(build_optimizer(settings, model)).optimizer
        else:
            optimizer = build_optimizer(settings, model, sharded=sharded)
            try:
                model, optimizer = accelerator.prepare(model, optimizer)
            except NotImplementedError as error:  # FSDP2 takes no channels_last parameters (torch 2.13)
                raise UsageError(f"the model cannot be sharded: {error}") from error
            optimizer = optimizer.optimizer
    state = RunState(model, optimizer, Progress(session.batching.slots), accelerator.scaler, zero)
    if settings.ema_decay > 0:
        state.ema = {name: value.detach().clone() for name, value in named_tensors(model)[0].items()}
    load_found(settings, runtime, session, state)
    return state


def load_found(settings: RunSettings, runtime: Runtime, session: Session, state: RunState) -> None:
    """Load the checkpoint that the session found, if any, into the state.

    Raises:
        UsageError: the checkpoint does not fit the model.
    """
    if session.found is None:
        return
    try:
        restore(state, runtime, session.found.load(), session.found.record, settings.allow_changes)
    except ValueError as error:
        raise UsageError(f"{session.found.path}: {error}") from error
    state.progress.slots = session.batching.slots


def show_inputs(
    runtime: Runtime, session: Session, look: Callable[[Path | None], None], preprocessing: dict[str, Any]
) -> None:
    """At a fresh start, let rank 0 look at the data, and keep what it takes to treat new samples alike.

    Args:
        runtime: of this start.
        session: of this start.
        look: prints, and writes into the run's folder if there is one.
        preprocessing: plain values for preprocessing.json.

    Raises:
        TrainingError: the run cannot be written.
    """

    def work() -> None:
        run = session.run
        try:
            look(None if run is None else run.path)
            if run is not None:
                storage.replace_file(run.path / "preprocessing.json", json.dumps(preprocessing))
        except OSError as error:
            raise TrainingError(f"{error.filename or run}: cannot be written ({error.strerror})") from error

    if session.found is None:
        runtime.on_main(work)


def describe_start(runtime: Runtime, session: Session, model: nn.Module) -> str:
    """Return a line on what computes what."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    still = f" ({frozen:,} of them frozen)" if frozen else ""
    precision = runtime.accelerator.mixed_precision
    precision = "fp32" if precision == "no" else precision
    return f"{parameters:,} parameters{still}, {runtime.device}, {precision}, {session.batching}"


def start_tracking(settings: RunSettings, runtime: Runtime, session: Session) -> Tracker:
    """Make the directory ready for this start, on rank 0: set newer checkpoints aside, cut metrics back, track."""
    run, found = session.run, session.found
    if run is None or not runtime.is_main or settings.only_preflight:
        return Tracker(None)
    moved = checkpoint.set_aside_newer(run.checkpoints, None if found is None else found.step)
    if moved:
        print(f"set aside in {run.checkpoints / 'set_aside'}: {', '.join(moved)}")
    storage.replace_file(run.path / "config.yaml", settings_to_yaml(settings))
    start = record_start(runtime, 0 if found is None else found.step)
    run.remember(starts=[*run.identity.get("starts", []), start])
    tracker = Tracker(run, 0 if found is None else found.record["progress"]["metrics_bytes"])
    tracker.start(run, settings, start)
    runtime.accelerator.trackers = tracker.others  # for accelerator.get_tracker
    return tracker


def best_weights(runtime: Runtime, session: Session, state: RunState, best_metric: str) -> int:
    """Put the weights of the best checkpoint into the model, on all processes, and return their step."""
    assert session.run is not None
    folder = session.run.checkpoints
    best, damages = runtime.on_main(lambda: checkpoint.find_best(folder))
    for damage in damages:
        runtime.say(f"skipped a checkpoint: {damage}")
    if best is None:
        return state.progress.step
    files = best.load()
    averaged = best_metric.startswith("val/ema_")
    restore_model(state.model, files["ema" if averaged else "model"], best.record["aliases"])
    return best.step


def finish(
    runtime: Runtime,
    session: Session,
    state: RunState,
    tracker: Tracker,
    test: Score | None,
    best_metric: str,
) -> dict[str, float]:
    """Score the best weights on the test split, draw the curves, close the run, and say where everything is."""
    progress = state.progress
    results: dict[str, float] = {}
    if progress.finished and session.run is not None:
        best_step = best_weights(runtime, session, state, best_metric)
        if test is not None:
            results = {f"test/{name}": value for name, value in test(state.model).items()}
            tracker.summarize(progress.step, results)
            shown = "  ".join(f"{name} {value:.4f}" for name, value in results.items())
            why = f", best {best_metric}" if progress.best_step is not None else ""
            runtime.say(f"\n{shown}   (weights of step {best_step}{why})")
    run = session.run
    if run is not None and runtime.is_main:
        curves = run.plots / "curves.png"
        draw_curves(run.metrics, curves, run.path.name)
        if progress.finished:
            run.remember(result={**progress.metrics, **results, "step": progress.step, "best_step": progress.best_step})
            steps = {"final": progress.step, "best": progress.best_step or progress.step}
            tracker.show({name: run.checkpoints / checkpoint.step_name(step) for name, step in steps.items()})
        print(f"run     {run.path}\ncurves  {curves}", flush=True)
    tracker.close()
    if run is not None:
        run.close()
    return results
