"""Tables for people, which are Markdown, and for programs: CSV, Parquet and JSON Lines."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.engine import storage
from train.engine.errors import UsageError

MOST_CLASSES = 40  # that are shown with their scores
MOST_IN_MATRIX = 20  # classes of a confusion matrix that is shown
SHOWN = 20  # of more classes, or of confusions


def to_markdown(report: Mapping[str, Any]) -> str:
    """Return the report of an evaluation as Markdown that is readable in a terminal."""
    lines = [f"# {report['dataset']}, {report['split']}: {report['samples']:,} samples", ""]
    weights = "averaged weights" if report["weights"] == "ema" else "weights"
    lines += [f"{weights} of step {report['step']} of {report['run']}", ""]
    rows = [[name, *_value_and_interval(entry)] for name, entry in report["metrics"].items()]
    if "calibration" in report:
        rows.append(["expected calibration error", f"{report['calibration']['ece']:.4f}", ""])
    lines += [*_table(["metric", "value", "95 % interval"], rows), ""]
    for name, tell in (("classes", _tell_classes), ("confusion_matrix", _tell_confusions)):
        if name in report:
            lines += [*tell(report), ""]
    return "\n".join(lines[:-1]) + "\n"


def _tell_classes(report: Mapping[str, Any]) -> list[str]:
    classes, title = report["classes"], []
    if len(classes) > MOST_CLASSES:
        title = [f"the {SHOWN} of {len(classes):,} classes with the lowest F1; all are in evaluation.json", ""]
        classes = sorted((one for one in classes if one["support"]), key=lambda one: one["f1"]["value"])[:SHOWN]
    rows = []
    for one in classes:
        scores = [_value_and_interval(one[name]) for name in ("precision", "recall", "f1")]
        rows.append([one["name"], *(value for value, _ in scores), scores[2][1], f"{one['support']:,}"])
    return [*title, *_table(["class", "precision", "recall", "F1", "95 % interval of F1", "samples"], rows)]


def _tell_confusions(report: Mapping[str, Any]) -> list[str]:
    counts, names = report["confusion_matrix"], [one["name"] for one in report["classes"]]
    if len(names) <= MOST_IN_MATRIX:
        rows = [[name, *map(str, row)] for name, row in zip(names, counts)]
        return _table(["true \\ predicted", *names], rows)
    wrong = [(count, i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if count and i != j]
    wrong.sort(key=lambda entry: (-entry[0], *entry[1:]))
    rows = [[names[i], names[j], f"{count:,}"] for count, i, j in wrong[:SHOWN]]
    return _table(["true class", "taken for", "samples"], rows)


def _value_and_interval(entry: Mapping[str, Any]) -> tuple[str, str]:
    interval = entry["interval"]
    return f"{entry['value']:.4f}", "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[make_plain(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) + " |"
        for row in cells
    ]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return [lines[0], rule, *lines[1:]]


def make_plain(text: str) -> str:
    """Return text in one line, without a terminal's control characters."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def check_table_file(flag: str, path: Path, suffixes: Sequence[str]) -> None:
    """Refuse a file for a table that could not be written, before anything is computed.

    Raises:
        UsageError: its name ends otherwise, or its folder is not there.
    """
    if path.suffix not in suffixes:
        raise UsageError(f"{flag} {path}: must end in {' or '.join(suffixes)}")
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise UsageError(f"{flag} {path}: is a folder, or lies in none; make the folder, or name a file")


def write_table(path: Path, columns: Mapping[str, Any], *, say: bool = True) -> None:
    """Write equally long columns to a file that is whole or not there, in the format that its name says, and say so.

    Raises:
        UsageError: it cannot be written; what was there before is still there.
    """
    import pyarrow as pa
    from pyarrow import csv, parquet

    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        if path.suffix == ".csv":
            csv.write_csv(table, temporary)
        elif path.suffix == ".parquet":
            parquet.write_table(table, temporary)
        else:
            with open(temporary, "w", encoding="utf-8") as file:
                for row in table.to_pylist():
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        storage.remove_tree(temporary)
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from error
    if say:
        print(f"wrote {path}")


def tabulate_probabilities(probabilities: Any, class_names: Sequence[str]) -> dict[str, Any]:
    """Return a column for each class of probabilities [N, K]."""
    return {f"probability_{name}": probabilities[:, number] for number, name in enumerate(class_names)}
