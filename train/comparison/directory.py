"""Reading a run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from train.comparison.run import Run, parse_time
from train.engine.errors import UsageError
from train.engine.tracking import read_metrics


def read_directory(source: str) -> Run:
    """Read runs/NAME; a run that is still going is read as far as it is.

    Raises:
        UsageError: the folder is no run, or a file of it is damaged.
    """
    path = Path(source)
    if not (path / "run.json").is_file() or not (path / "config.yaml").is_file():
        within = sorted(child.parent.name for child in path.glob("*/run.json"))
        hint = f"; it holds the runs {', '.join(within[:5])}: name those" if within else ""
        raise UsageError(f"{source}: is no run, which has run.json and config.yaml{hint}")
    try:
        identity = json.loads((path / "run.json").read_text(encoding="utf-8"))
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        starts = identity.get("starts", [])
        run = Run(
            name=path.resolve().name,
            source=source,
            config=dict(config),
            lines=[line for line in read_metrics(path / "metrics.jsonl") if isinstance(line, dict) and "step" in line],
            id=identity.get("id"),
            place=str(path.resolve()),
            starts=[parse_time(start["time"]) for start in starts],
            facts=_facts(starts) | _describe_data(path),
        )
        if not starts or any(line.get("time", run.starts[0]) < run.starts[0] for line in run.lines):
            run.starts, run.starts_known = [parse_time(identity["created"])], False  # of an older version
    except OSError as error:
        raise UsageError(f"{error.filename}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise UsageError(f"{source}: run.json or config.yaml is damaged ({error!r})") from error
    written = len((path / "metrics.jsonl").read_bytes().splitlines()) if run.lines else 0
    if written > len(run.lines):
        run.notes.append(f"{source}: metrics.jsonl is torn after line {len(run.lines)}; used up to there")
    return run


def _facts(starts: list[dict[str, Any]]) -> dict[str, str]:
    """Return what the starts ran on and from; where they differ, all of it in order."""
    described = [
        {"commit": start["commit"], **start["versions"], "processes": start["processes"], "device": start["device"]}
        for start in starts
    ]
    names = {name: None for start in described for name in start}
    facts = {name: list(dict.fromkeys(str(start.get(name)) for start in described)) for name in names}
    return {name: " then ".join(values) for name, values in facts.items() if values != ["None"]}


def _describe_data(path: Path) -> dict[str, str]:
    """Return what the newest checkpoint says of data and precision; nothing without a checkpoint."""
    for file in sorted(path.glob("checkpoints/step_*/state.json"), reverse=True):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            return {"data": record["data"]["fingerprint"], "precision": record["precision"]}
        except (OSError, ValueError, KeyError):  # pruned by the run just now, or damaged: the one before
            continue
    return {}
