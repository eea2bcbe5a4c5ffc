"""What a stateful run is worth: answers with frozen weights, their error by group, pictures, the history of epochs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from models.frequency_lstm import FrequencyLSTM, State
from train.engine import storage
from train.engine.run_directory import RunDirectory
from train.engine.tracking import read_metrics

STRETCH = 8192  # samples of one forward pass; bounds its memory, changes no result
SHOWN = 1000  # samples in a picture
SETTLED = 1000  # samples that the state is given to follow a change of group, before a picture begins


@torch.no_grad()
def predict(model: FrequencyLSTM, inputs: torch.Tensor) -> torch.Tensor:
    """Return the answers [N, 1] to a sequence [N, F] on the CPU; weights are frozen, the state is carried from zero."""
    state: State | None = None
    answers = []
    for part in inputs.split(STRETCH):
        outputs, state = model(part[None], state)
        answers.append(outputs[0])
    return torch.cat(answers).cpu()


def score(answers: torch.Tensor, targets: torch.Tensor, groups: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the mean squared error of answers [N, 1], as "loss", and of each group, as "loss/NAME"."""
    errors = (answers.double() - targets.double()).square().squeeze(1)
    values = {"loss": float(errors.mean())}
    for name, members in groups.items():
        values["loss/" + name.replace(" ", "_")] = float(errors[members].mean())
    return values


def draw_answers(
    path: Path, answers: torch.Tensor, targets: torch.Tensor, groups: Mapping[str, torch.Tensor], title: str
) -> None:
    """Draw answers beside targets, both [N, 1], a panel for each group.

    A panel begins after the state has had time to follow the change of group.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = groups or {"all samples": torch.arange(len(targets))}
    values = score(answers, targets, panels)
    figure = Figure(figsize=(10, 1.9 * len(panels) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (name, members) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items()):
        begin = SETTLED if len(members) >= SETTLED + SHOWN else 0
        shown = members[begin : begin + SHOWN]
        axes.plot(shown, targets[shown, 0], label="target", linewidth=2.2, color="tab:gray")
        axes.plot(shown, answers[shown, 0], label="answer, weights frozen", linewidth=1.0, color="tab:red")
        axes.set_title(f"{name}: mean squared error {values['loss/' + name.replace(' ', '_')]:.4f}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper right")
    axes.set_xlabel("sample")
    figure.savefig(path, dpi=100)


def write_history(run: RunDirectory) -> list[dict[str, float]]:
    """Write training_history.json: loss and seconds of each finished epoch, from metrics.jsonl; return the epochs."""
    epochs = []
    seconds_before = 0.0
    for line in read_metrics(run.metrics):
        if "train/epoch_loss" in line:
            seconds = line["perf/train_seconds"]
            entry = {"epoch": round(line["epoch"]), "loss": line["train/epoch_loss"]}
            entry["seconds"] = seconds - seconds_before
            seconds_before = seconds
            if "val/loss" in line:
                entry["val_loss"] = line["val/loss"]
            epochs.append(entry)
    storage.replace_file(run.path / "training_history.json", json.dumps({"epochs": epochs}, indent=1) + "\n")
    return epochs
