"""The settings that training scripts share. A script adds its own fields by inheriting.

Each field becomes a flag and a recipe key of the same name. `neutral` names the fields that cannot change the
trained weights; every other one must keep its value when a run is resumed.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from train.engine.errors import UsageError

_LOWER = re.compile(r"(ema_)?(.*_)?(loss|mse|mae|rmse|error|perplexity|kl|divergence)")


def lower_is_better(metric: str) -> bool:
    """Say whether a metric is, by its name, one of those that fall as a model gets better."""
    return _LOWER.fullmatch(metric.split("/")[1] if "/" in metric else metric) is not None


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where a run lives, how it starts, and what it reports."""

    output_dir: str = "runs"
    """Folder that holds the runs."""
    run_name: str | None = None
    """Folder of this run in output_dir. Default: made from the data set, the model and the other settings, so
    that the same command continues the same run."""
    config: str | None = None
    """YAML recipe with defaults for these settings; flags win over it."""
    resume: str = "auto"
    """auto: continue if the run has a valid checkpoint, else start. never: start, refuse if the run exists.
    latest, best or the path of a checkpoint: continue from there or refuse."""
    allow_changes: tuple[str, ...] = ()
    """Settings that may differ from those of the resumed checkpoint although they change the result."""
    seed: int = 0
    """Seed of everything random."""
    deterministic: bool = False
    """Deterministic algorithms only (slower on a GPU)."""
    tracker: tuple[Literal["wandb", "tensorboard", "none"], ...] = ("wandb",)
    """Where metrics go beside metrics.jsonl: one or more. wandb works offline when there is no key."""
    wandb_project: str | None = None
    """Project in W&B. Default: the variable WANDB_PROJECT, or exact-training."""
    wandb_artifact: bool = False
    """Store the best and the final checkpoint in W&B when the run is finished."""
    log_every: int = 50
    """Optimizer steps between two lines of training metrics."""
    checkpoint_every: str = "1 epoch"
    """'500' optimizer steps, '2 epochs' or '10 minutes'. A new best and the end of the run are saved besides."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep; the best is kept besides."""
    dry_run: bool = False
    """Check everything, do one step and one evaluation batch, write nothing."""
    verify_resume: bool = False
    """Run a few steps straight, and killed and restarted, compare all tensors, and leave with 0 if equal, else 3."""

    neutral: ClassVar[frozenset[str]] = frozenset({
        "output_dir", "run_name", "config", "resume", "allow_changes", "tracker", "wandb_project", "wandb_artifact",
        "log_every", "checkpoint_every", "keep_checkpoints", "dry_run", "verify_resume",
    })  # fmt: skip

    @property
    def precision(self) -> str | None:
        """Mixed precision; None: what the launcher says."""
        return "no"

    @property
    def timeout_seconds(self) -> int:
        """How long processes wait for each other."""
        return 1800

    @property
    def sharded(self) -> bool:
        """Whether every process writes its part of a checkpoint."""
        return False

    @property
    def only_preflight(self) -> bool:
        """Whether this start examines the run instead of training."""
        return False

    @property
    def origin(self) -> str | None:
        """What the weights of a fresh run come from; None: they are random."""
        return None

    def conditions(self) -> Iterator[tuple[bool, str, str]]:
        """Yield, for each rule, whether it holds, the setting, and what it must be."""
        yield self.log_every >= 1, "log_every", "1 or more"
        yield self.keep_checkpoints >= 1, "keep_checkpoints", "1 or more"
        yield 0 <= self.seed < 2**32, "seed", "between 0 and 2**32 - 1"  # torch's CPU generator takes 32 bits
        yield "none" not in self.tracker or self.tracker == ("none",), "tracker", "none alone, or other names"
        missing = "tensorboard" in self.tracker and importlib.util.find_spec("tensorboard") is None
        yield not missing, "tracker", "used with TensorBoard installed: pip install tensorboard"
        name = self.run_name
        plain = name is None or re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*", name) is not None
        yield plain, "run_name", "a plain folder name of letters, digits and _ . + = -"
        known = {field.name for field in fields(self)} | {"data", "precision", "architecture"}
        unknown = [name for name in self.allow_changes if name not in known]
        yield (
            not unknown,
            "allow_changes",
            f"names of settings, data, precision or architecture; there is no {' '.join(unknown)}",
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings(RunSettings):
    """How long a run trains, at which learning rate, and how often it is evaluated."""

    num_train_epochs: int = 10
    """Passes over the training split."""
    max_train_steps: int | None = None
    """Optimizer steps after which training ends, if that is sooner."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    lr_scheduler: Literal["constant", "step", "linear", "cosine", "one_cycle", "plateau"] = "constant"
    """Shape of the learning rate over the optimizer steps."""
    warmup_steps: int = 0
    """Optimizer steps of rising rate at the start."""
    lr_step_size: int = 1000
    """step: optimizer steps between two reductions."""
    lr_gamma: float = 0.5
    """step, plateau: factor of one reduction."""
    lr_patience: int = 10
    """plateau: evaluations without improvement before a reduction."""
    max_grad_norm: float = 1.0
    """Clip gradients to this global norm; 0 switches clipping off."""
    eval_every: str = "1 epoch"
    """'500' optimizer steps or '2 epochs' between two evaluations. The end of the run is evaluated besides."""

    neutral: ClassVar[frozenset[str]] = RunSettings.neutral | frozenset(["num_train_epochs", "max_train_steps"])

    def conditions(self) -> Iterator[tuple[bool, str, str]]:
        """Yield, for each rule, whether it holds, the setting, and what it must be."""
        yield from super().conditions()
        for name in ("num_train_epochs", "lr_step_size", "max_train_steps"):
            value = getattr(self, name)
            yield value is None or value >= 1, name, "1 or more"
        for name in ("warmup_steps", "lr_patience", "max_grad_norm"):
            yield 0 <= getattr(self, name) < float("inf"), name, "0 or more and finite"
        yield 0 < self.learning_rate < float("inf"), "learning_rate", "above 0 and finite"
        yield 0 < self.lr_gamma <= 1, "lr_gamma", "above 0 and at most 1"


@dataclass(frozen=True, kw_only=True)
class TrainSettings(ScheduleSettings):
    """Optimisation with the sharded loop."""

    mixed_precision: Literal["no", "bf16", "fp16", "fp8"] | None = None
    """Default: what the launcher says."""
    checkpoint_format: Literal["whole", "sharded"] = "whole"
    """whole: rank 0 writes one file each for model and optimizer. sharded: every process writes its part, for large
    states on a file system that all share. Either resumes on any number of processes."""
    preflight: Literal["quick", "full", "lr", "off"] = "quick"
    """--preflight, or full: check everything before a run, write preflight.md, and leave with 0, or with 3 if a check
    fails. quick: a few seconds of checks at a fresh start, which only warn. lr: try learning rates, draw the curve."""
    batch_size: int = 64
    """Samples per optimizer step over all processes."""
    micro_batch_size: int | None = None
    """Samples that one process takes in one forward pass; the rest is accumulated. Default: batch_size divided
    by the processes."""
    slots: int | None = None
    """Parts of a batch with randomness of their own. Set it at the start to a multiple of all process counts to
    be used later, and even dropout masks stay the same. Default: processes times accumulation."""
    reduction: Literal["fast", "exact"] = "fast"
    """exact: gradients are summed in one fixed order, so that 1, 2, 4 and 8 processes with the same slots give the
    same bits; slots must be a power of two."""
    optimizer: Literal["adamw", "adam", "sgd", "muon"] = "adamw"
    """sgd is with Nesterov momentum 0.9. muon is for hidden matrices, with adamw for all other parameters."""
    weight_decay: float = 0.0
    """Weight decay of matrices and filters, not of biases and norms (decoupled for adamw and muon)."""
    init_from: str | None = None
    """Start from the weights of a run's folder (its best ones), a checkpoint's folder or a .safetensors file. Those
    whose names and shapes agree are taken, the others are listed."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that stay as they are, such as: 'features.*'."""
    ema_decay: float = 0.0
    """Decay of the running average of the weights; 0 switches it off."""
    best_metric: str = "val/accuracy"
    """Evaluation metric that decides which checkpoint is best and when training stops early."""
    best_mode: Literal["max", "min"] | None = None
    """Whether higher or lower values of best_metric are better. Default: min for losses and errors, max for others."""
    early_stopping_patience: int = 0
    """Evaluations without improvement before training ends; 0 switches early stopping off."""
    early_stopping_min_delta: float = 0.0
    """Smallest change that counts as improvement for early stopping."""
    on_nonfinite: Literal["skip", "stop"] = "stop"
    """What to do with a step whose loss or gradient is NaN or infinite. Such a step never reaches the weights."""
    num_workers: int = 0
    """Processes that load samples; 0 holds the decoded data in memory."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool = False
    """Keep the weights of convolutions with their channels last, which GPUs with mixed precision like best."""
    gradient_checkpointing: bool = False
    """Compute blocks of convolutions again in the backward pass instead of keeping what they gave: less memory, more
    time, the same bits."""
    profile: bool = False
    """Profile a few steps: a trace in the run's folder, and a table of the ten dearest operations."""
    collective_timeout_seconds: int = 1800
    """How long processes wait for each other in training until they give one of them up for lost."""

    neutral: ClassVar[frozenset[str]] = ScheduleSettings.neutral | frozenset(
        [
            "checkpoint_format", "preflight", "micro_batch_size", "slots", "num_workers",
            "collective_timeout_seconds", "gradient_checkpointing", "profile",
        ]
    )  # fmt: skip

    @property
    def precision(self) -> str | None:
        """Mixed precision; None: what the launcher says."""
        return self.mixed_precision

    @property
    def timeout_seconds(self) -> int:
        """How long processes wait for each other."""
        return self.collective_timeout_seconds

    @property
    def sharded(self) -> bool:
        """Whether every process writes its part of a checkpoint."""
        return self.checkpoint_format == "sharded"

    @property
    def only_preflight(self) -> bool:
        """Whether this start examines the run instead of training."""
        return self.preflight in ("full", "lr")

    @property
    def origin(self) -> str | None:
        """What the weights of a fresh run come from; None: they are random."""
        return self.init_from

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether higher or lower values of best_metric are better."""
        return self.best_mode or ("min" if lower_is_better(self.best_metric) else "max")

    def conditions(self) -> Iterator[tuple[bool, str, str]]:
        """Yield, for each rule, whether it holds, the setting, and what it must be."""
        yield from super().conditions()
        for name in ("batch_size", "micro_batch_size", "slots", "collective_timeout_seconds"):
            value = getattr(self, name)
            yield value is None or value >= 1, name, "1 or more"
        for name in ("early_stopping_patience", "num_workers", "weight_decay", "early_stopping_min_delta"):
            yield 0 <= getattr(self, name) < float("inf"), name, "0 or more and finite"
        yield 0 <= self.ema_decay < 1, "ema_decay", "0 or more and below 1"
        yield not (self.profile and self.dry_run), "profile", "left out of a dry run, which takes one step"
        both = self.gradient_checkpointing and self.compile
        yield not both, "gradient_checkpointing", "left out with compile, which decides by itself what to keep"


@dataclass(frozen=True)
class Every:
    """A parsed interval: a count of optimizer steps, epochs or minutes."""

    count: float
    unit: Literal["steps", "epochs", "minutes"]

    def in_steps(self, steps_per_epoch: int) -> int | None:
        """Return the interval in optimizer steps, None for minutes."""
        if self.unit == "minutes":
            return None
        return int(self.count) * (steps_per_epoch if self.unit == "epochs" else 1)


_UNITS = {
    "": "steps", "step": "steps", "steps": "steps", "ep": "epochs", "epoch": "epochs", "epochs": "epochs",
    "min": "minutes", "minute": "minutes", "minutes": "minutes",
}  # fmt: skip


def parse_every(text: str, *, minutes: bool = True) -> Every:
    """Parse '500', '2 epochs' or '10 minutes'.

    Raises:
        ValueError: for anything else, with what is accepted.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text)
    unit = _UNITS.get(match[2]) if match else None
    count = float(match[1]) if match else 0.0
    whole = unit == "minutes" or count.is_integer()
    if unit is None or count <= 0 or not whole or (unit == "minutes" and not minutes):
        choices = "'500' (optimizer steps), '1 epoch'" + (" or '10 minutes'" if minutes else "")
        raise ValueError(f"{text!r} is no interval; write {choices}")
    return Every(count, unit)  # type: ignore[arg-type]


def _show(value: object) -> object:
    """Return a value as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def check_settings(settings: RunSettings) -> list[str]:
    """Return all problems with the settings that can be seen without data, model or processes."""
    problems = [
        f"--{name} {_show(getattr(settings, name))}: must be {wanted}"
        for sound, name, wanted in settings.conditions()
        if not sound
    ]
    for name in ("checkpoint_every", "eval_every"):
        try:
            parse_every(getattr(settings, name, "1"), minutes=name == "checkpoint_every")
        except ValueError as error:
            problems.append(f"--{name}: {error}")
    return problems


def check_best_metric(settings: TrainSettings, metrics: Sequence[str]) -> None:
    """Refuse a best_metric that evaluation will not give.

    Args:
        settings: the run's.
        metrics: names that the script measures, such as "loss".

    Raises:
        UsageError: names those there are.
    """
    known = [f"val/{name}" for name in metrics]
    if settings.ema_decay > 0:
        known += [f"val/ema_{name}" for name in metrics]
    if settings.best_metric not in known:
        raise UsageError(f"--best_metric {settings.best_metric}: evaluation gives {', '.join(known)}")
