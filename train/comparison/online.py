"""Reading runs that W&B has: files of offline runs, and its public API."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from train.comparison.run import Run, parse_time
from train.engine.errors import UsageError
from train.engine.wandb_service import drop_empty_variables

INSPECT_SECONDS = 300
ANSWER_SECONDS = 20  # of one request; W&B's own default is about as long


def read_file(source: str) -> Run:
    """Read the .wandb file of an offline run, or the folder that holds it.

    Raises:
        UsageError: W&B cannot read it, or there is no run in it.
    """
    path = Path(source)
    file = path if path.is_file() else next(path.glob("*.wandb"))
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=INSPECT_SECONDS, check=True)
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise UsageError(f"{source}: W&B cannot read {file.name} ({said})") from error
    records: dict[str, list[dict[str, Any]]] = {}
    for line in answer.stdout.splitlines():
        record = json.loads(line)
        records.setdefault(record["type"], []).append(record.get(record["type"], {}))
    if "run" not in records:
        raise UsageError(f"{source}: {file.name} is a torn fragment: its start was killed before W&B wrote anything")
    (described, *_) = records["run"]
    changes = [described.get("config", {}), *records.get("config", [])]
    run = Run(
        name=described.get("display_name", described["run_id"]),
        source=source,
        id=described["run_id"],
        config=_settings({name: value for change in changes for name, value in change.get("update", {}).items()}),
        lines=[_as_line(row["item"]) for row in records.get("history", []) if "_step" in row.get("item", {})],
        starts=[parse_time(described["start_time"])],
        facts=_commit(described.get("git", {}).get("commit")),
    )
    _add_results(run, {name: value for part in records.get("summary", []) for name, value in part["update"].items()})
    if "exit" not in records:
        run.notes.append(f"{source}: {file.name} has no end: that start was killed or is still going")
    return run


def read_online(source: str) -> Run:
    """Ask W&B for the run entity/project/run.

    Raises:
        UsageError: there is no key, no answer, or no such run.
    """
    import wandb

    drop_empty_variables()
    try:
        wandb.setup(wandb.Settings(silent=True))
        if not wandb.login(prompt=False):
            raise UsageError(
                f"{source}: no such folder; and W&B, which might know it as entity/project/run, is not asked without "
                "a key (wandb login, or WANDB_API_KEY) or with WANDB_MODE=offline"
            )
        found = wandb.Api(timeout=ANSWER_SECONDS).run(source)
        run = Run(
            name=found.name or found.id,
            source=source,
            id=found.id,
            config=_settings(found.config),
            lines=[_as_line(row) for row in found.scan_history() if "_step" in row],
            starts=[parse_time(found.created_at)],
            starts_known=False,
            facts=_commit(found.commit),
        )
        _add_results(run, dict(found.summary_metrics))
    except (wandb.errors.Error, ValueError, OSError) as error:
        if isinstance(error, UsageError):
            raise
        reason = str(error).splitlines()[0]
        raise UsageError(f"{source}: no such folder, and W&B gives no such run ({reason})") from error
    return run


def join_parts(parts: list[Run]) -> Run:
    """Return the one run whose starts W&B wrote into a file each."""
    parts = sorted(parts, key=lambda part: part.starts)
    last = parts[-1]
    lines = sorted((line for part in parts for line in part.lines), key=lambda line: (line["step"], line["time"]))
    facts: dict[str, list[str]] = {}
    for part in parts:
        for name, value in part.facts.items():
            facts.setdefault(name, []).append(value)
    return Run(
        name=last.name,
        source=" + ".join(part.source for part in parts),
        id=last.id,
        config=last.config,
        lines=lines,
        starts=[start for part in parts for start in part.starts],
        facts={name: " then ".join(dict.fromkeys(values)) for name, values in facts.items()},
        notes=[note for part in parts for note in part.notes],
    )


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in a config; `start` is what our tracker adds of the machine."""
    return {name: value for name, value in config.items() if not name.startswith("_") and name != "start"}


def _as_line(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of W&B's history as a line of metrics.jsonl."""
    values = {name: value for name, value in row.items() if not name.startswith("_")}
    return {"step": row["_step"], "time": row.get("_timestamp", 0.0), **values}


def _add_results(run: Run, summary: dict[str, Any]) -> None:
    results = {name: value for name, value in summary.items() if name.startswith("test/")}
    if results:
        run.lines.append({"step": run.steps, "time": 0.0, **results})


def _commit(commit: str | None) -> dict[str, str]:
    return {} if commit is None else {"commit": commit}
