"""Run directories as a training script leaves them, written by hand."""

import json

import yaml

BEGIN = 1_795_341_600  # 2026-11-22T10:00:00+0000
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "accelerate": "1.15.0"}


def time_text(seconds):
    """Return a time so many seconds after BEGIN as run.json has it."""
    return f"2026-11-22T{10 + seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}+0000"


def start(seconds=0, step=0, commit="a" * 40, processes=1):
    """Return the record of a start."""
    return {
        "time": time_text(seconds), "step": step, "commit": commit, "versions": VERSIONS, "processes": processes,
        "device": "cpu",
    }  # fmt: skip


def line(step, seconds, **values):
    """Return a line of metrics.jsonl; val_loss is val/loss."""
    return {"step": step, "time": BEGIN + seconds, **{name.replace("_", "/", 1): x for name, x in values.items()}}


def write_run(path, lines, *, starts=None, fingerprint="f" * 32, **settings):
    """Write a run.

    Args:
        path: its folder.
        lines: of metrics.jsonl; or the accuracies at steps 10, 20 and so on, a second each.
        starts: None for one, at BEGIN.
        fingerprint: of the data; None for a run without a checkpoint.
        settings: beside those that every run has.
    """
    if isinstance(lines[0], float):
        lines = [
            line(10 * n, n, train_loss=1 / n, val_accuracy=value, perf_samples_per_second=100.0)
            for n, value in enumerate(lines, 1)
        ]
    common = {
        "output_dir": "runs", "run_name": path.name, "seed": 0, "dataset": "digits", "learning_rate": 0.001,
        "best_metric": "val/accuracy", "best_mode": "max",
    }  # fmt: skip
    path.mkdir(parents=True)
    identity = {"id": path.name, "created": time_text(0)}
    identity |= {"starts": [start()] if starts is None else starts} if starts != [] else {}
    (path / "run.json").write_text(json.dumps(identity))
    (path / "config.yaml").write_text(yaml.safe_dump(common | settings))
    (path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    if fingerprint is not None:
        checkpoint = path / "checkpoints" / "step_00000010"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(json.dumps({"data": {"fingerprint": fingerprint}, "precision": "no"}))
    return path
