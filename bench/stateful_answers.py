"""What a stateful LSTM answers while it trains, and what with its weights frozen: a picture, and the errors of both.

    python bench/stateful_answers.py runs/WINDOW_1 runs/WINDOW_100 --picture docs/stateful_answers.png

Loads the newest checkpoint of each run, goes on training for an epoch at the latest learning rate, and keeps what the
model answers on the way. Then goes through the same samples with the weights that were loaded.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from data_modules.frequency import make_sinusoids
from models.frequency_lstm import FrequencyLSTM
from train.engine import checkpoint
from train.engine.optimizer import restore_optimizer
from train.engine.state import restore_model
from train.stateful.contract import SUMS, Course
from train.stateful.eager import EagerEngine
from train.stateful.report import predict, score

SHOWN = slice(4000, 5000)  # of each sinusoid's samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--picture", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = make_sinusoids("train")
    figure = Figure(figsize=(6.5 * len(options.runs), 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(data.groups), len(options.runs), squeeze=False, sharey=True)
    for column, path in enumerate(options.runs):
        window, adapting, frozen = _answer_both(path, data)
        for kind, answers in (("weights adapt", adapting), ("weights frozen", frozen)):
            print(f"{path.name}, window {window}, {kind}: {_in_words(score(answers, data.targets, data.groups))}")
        for axes, (name, members) in zip(panels[:, column], data.groups.items()):
            shown = members[SHOWN]
            axes.plot(shown, data.targets[shown, 0], label="target", linewidth=3, color="lightgray")
            axes.plot(shown, adapting[shown, 0], label="while the weights adapt", linewidth=1, color="tab:blue")
            axes.plot(shown, frozen[shown, 0], label="weights frozen", linewidth=1, color="tab:red")
            axes.set_ylim(-1.6, 1.6)
            axes.set_title(f"window {window}, {name}", fontsize=10)
        panels[0, column].legend(fontsize=8, loc="upper right")
        panels[-1, column].set_xlabel("sample")
    figure.savefig(options.picture, dpi=80)


def _answer_both(path: Path, data):
    """Return the window of a run, its answers while it goes on training, and those with frozen weights, both [N, 1]."""
    found, _ = checkpoint.find_newest(path / "checkpoints")
    settings = found.record["config"]
    files = found.load()
    models = []
    for _ in range(2):
        model = FrequencyLSTM(data.inputs.shape[1], settings["hidden_size"])
        restore_model(model, files["model"], {})
        models.append(model)
    frozen = predict(models[1], data.inputs)
    adapting = []
    models[0].register_forward_hook(lambda module, inputs, outputs: adapting.append(outputs[0][0].detach()))
    optimizer = torch.optim.Adam(models[0].parameters())
    restore_optimizer(optimizer, models[0], files["optimizer"], found.record["optimizer"])
    course = Course(models[0], optimizer, data.inputs, data.targets, settings["window"], settings["max_grad_norm"])
    updates = -(-len(data) // settings["window"])
    sums = torch.zeros(SUMS, dtype=torch.float64)
    EagerEngine(course).advance(0, len(data), None, [optimizer.param_groups[0]["lr"]] * updates, sums)
    return settings["window"], torch.cat(adapting), frozen


def _in_words(values) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())


if __name__ == "__main__":
    main()
