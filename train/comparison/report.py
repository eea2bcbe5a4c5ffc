"""A comparison as tables of text, for a terminal, for Markdown and for programs."""

from __future__ import annotations

import html
import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from train.comparison import analysis
from train.comparison.analysis import Difference, Group, Measured, Mode, show_setting
from train.comparison.run import Run
from train.comparison.verdict import pass_verdict, shorten_fact, show_number, warn
from train.engine.errors import UsageError

WIDTH = 120  # columns of a terminal
WIDEST_CELL = 44  # in a terminal; a longer text loses its middle


@dataclass(frozen=True)
class Table:
    """Cells of text; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Report:
    """All there is to say."""

    metric: str
    mode: Mode
    equal_step: int | None
    measured: list[Measured]
    groups: list[Group]
    differences: list[Difference]
    warnings: list[str]
    verdict: list[str]
    tables: list[Table]
    same: str  # about the settings that are the same

    @property
    def runs(self) -> list[Run]:
        return [one.run for one in self.measured]

    @property
    def title(self) -> str:
        count = "one run" if len(self.runs) == 1 else f"{len(self.runs)} runs"
        return f"{count}, {self.metric} ({'higher' if self.mode == 'max' else 'lower'} is better)"


def build_report(runs: Sequence[Run], notes: Sequence[str], metric: str | None, mode: Mode | None) -> Report:
    """Compare runs.

    Args:
        runs: at least one.
        notes: about the sources.
        metric: None: the best_metric of the runs.
        mode: None: as the metric's name says.

    Raises:
        UsageError: no run has an evaluation, one has not this metric, or nobody says which direction is better.
    """
    empty = [f"{run.source}: has no evaluation yet, nothing to compare" for run in runs if not run.metrics]
    runs = [run for run in runs if run.metrics]
    if not runs:
        raise UsageError(empty)
    notes = [*notes, *empty]
    metric = analysis.choose_metric(runs, metric)
    mode = analysis.choose_mode(runs, metric, mode)
    measured, equal_step = analysis.measure(runs, metric, mode)
    step = analysis.step_to_compare(runs, equal_step)
    groups, left_out = analysis.form_groups(measured, mode, step)
    differences = analysis.find_differences(groups)
    what = f"the last {metric}" if step is None else f"{metric} at step {step}"
    warnings = [*notes, *warn(runs, groups, metric, step, equal_step), *left_out]
    differing = analysis.differing_settings(runs)
    total = len({name for run in runs for name in run.config} - {"run_name", "output_dir", "config"})
    return Report(
        metric=metric,
        mode=mode,
        equal_step=equal_step,
        measured=measured,
        groups=groups,
        differences=differences,
        warnings=warnings,
        verdict=pass_verdict(groups, differences, what),
        tables=[table for table in _tables(measured, groups, equal_step, what) if len(table.header) > 1 and table.rows],
        same=f"{total - len(differing)} settings are the same in all" if len(runs) > 1 else "",
    )


def _tables(measured: Sequence[Measured], groups: Sequence[Group], step: int | None, what: str) -> list[Table]:
    runs = [one.run for one in measured]
    names = [run.name for run in runs]
    differing, facts = analysis.differing_settings(runs), analysis.differing_facts(runs)
    tests = list(dict.fromkeys(name for run in runs for name in run.test))
    equal = [] if step is None else [f"at step {step}"]
    header = ["run", "best", "of step", "last", "of step", *equal, *tests, "steps", "training", "samples/s", "starts"]
    rows = [
        [
            one.run.name,
            *(["-", "-"] if one.best is None else [show_number(one.best[1]), str(one.best[0])]),
            show_number(one.last[1]),
            str(one.last[0]),
            *([] if step is None else [show_number(one.at_equal)]),
            *(show_number(one.run.test.get(name)) for name in tests),
            str(one.run.steps),
            _show_time(one.run),
            "-" if one.run.samples_per_second is None else f"{one.run.samples_per_second:,.0f}",
            str(len(one.run.starts)) if one.run.starts_known else "-",
        ]
        for one in measured
    ]
    return [
        Table("Runs", header, rows),
        Table(
            "Settings that differ",
            ["run", *differing],
            [[name, *map(show_setting, row)] for name, row in zip(names, zip(*differing.values()))],
        ),
        Table(
            "Code, versions and machines that differ",
            ["run", *facts],
            [
                [name, *("-" if value is None else shorten_fact(value) for value in row)]
                for name, row in zip(names, zip(*facts.values()))
            ],
        ),
        Table(
            f"Groups of the same settings but for the seed: {what}",
            ["group", "runs", "mean", "standard deviation", "min", "max"],
            [
                [group.label, str(len(group.values)), *map(show_number, _statistics(group).values())]
                for group in groups
                if group.values
            ],
        ),
    ]


def _statistics(group: Group) -> dict[str, float | None]:
    values = group.values
    return {
        "mean": group.mean if values else None,
        "standard_deviation": group.deviation,
        "min": min(values, default=None),
        "max": max(values, default=None),
    }


def _show_time(run: Run) -> str:
    if run.seconds is None:
        return "-"
    seconds = round(run.seconds)
    text = f"{run.seconds:.1f} s" if seconds < 120 else f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return text if run.starts_known else f"<= {text}"


# ---- for a terminal --------------------------------------------------------------------------------------------------


def to_text(report: Report) -> str:
    """Return the report in 120 columns. Tables that are wider go on below, with the first column repeated."""
    blocks = [report.title]
    for table in report.tables:
        blocks.append("\n".join([table.title, *_lay_out(table)]))
        if table.title.startswith("Settings"):
            blocks[-1] += f"\n({report.same})"
    if not any(table.title.startswith("Settings") for table in report.tables):
        blocks.append(report.same)
    blocks += [_wrap(f"warning: {line}") for line in report.warnings]
    blocks.append("\n".join(_wrap(line) for line in report.verdict))
    return "\n\n".join(block for block in blocks if block)


def _wrap(text: str) -> str:
    return textwrap.fill(make_plain(text), WIDTH, subsequent_indent="  ")


def _lay_out(table: Table) -> list[str]:
    columns = [[_shorten(cell) for cell in column] for column in zip(table.header, *table.rows)]
    widths = [max(map(len, column)) for column in columns]
    first, rest = columns[0], list(zip(columns[1:], widths[1:]))
    lines: list[str] = []
    while rest:
        room = WIDTH - widths[0]
        taken = []
        while rest and room >= rest[0][1] + 2:
            room -= rest[0][1] + 2
            taken.append(rest.pop(0))
        lines += [""] if lines else []
        for row, name in enumerate(first):
            cells = [f"  {column[row]:>{width}}" for column, width in taken]
            lines.append(f"{name:<{widths[0]}}{''.join(cells)}".rstrip())
    return lines


def _shorten(cell: str) -> str:
    cell, half = make_plain(cell), WIDEST_CELL // 2
    return cell if len(cell) <= WIDEST_CELL else f"{cell[: half - 1]}…{cell[-half:]}"


def make_plain(text: str) -> str:
    """Return a text in one line without control characters: names come from anywhere."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


# ---- for files -------------------------------------------------------------------------------------------------------


def to_markdown(report: Report) -> str:
    """Return the report as Markdown."""

    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(map(_escape, cells))} |"

    blocks = [f"# {_escape(report.title)}", *(f"- {_escape(line)}" for line in report.verdict)]
    blocks += [f"> warning: {_escape(line)}" for line in report.warnings]
    for table in report.tables:
        lines = [row(table.header), "|" + " --- |" * len(table.header), *map(row, table.rows)]
        blocks += [f"## {_escape(table.title)}", "\n".join(lines)]
    return "\n\n".join([*blocks, report.same]).rstrip() + "\n"


def _escape(text: str) -> str:
    return html.escape(make_plain(text), quote=False).replace("|", "\\|")


def to_json(report: Report) -> str:
    """Return the report for programs; NaN and infinity are null."""
    of_run = {one.run.name: group.label for group in report.groups for one in group.members}
    content = {
        "metric": report.metric,
        "mode": report.mode,
        "equal_step": report.equal_step,
        "runs": [
            {
                **{name: value for name, value in asdict(one.run).items() if name not in ("lines", "starts")},
                "group": of_run.get(one.run.name),
                **{
                    name: None if point is None else {"step": point[0], "value": point[1]}
                    for name, point in (("best", one.best), ("last", one.last))
                },
                "at_equal_step": one.at_equal,
                "test": one.run.test,
                "steps": one.run.steps,
                "training_seconds": one.run.seconds,
                "samples_per_second": one.run.samples_per_second,
                "starts": len(one.run.starts) if one.run.starts_known else None,
            }
            for one in report.measured
        ],
        "settings_that_differ": analysis.differing_settings(report.runs),
        "facts_that_differ": analysis.differing_facts(report.runs),
        "groups": [
            {"label": group.label, "runs": [one.run.name for one in group.members], "n": len(group.values)}
            | _statistics(group)
            for group in report.groups
        ],
        "differences": [
            {
                "better": each.better.label,
                "worse": each.worse.label,
                "difference": each.value,
                "interval": each.interval,
            }
            for each in report.differences
        ],
        "warnings": report.warnings,
        "compared_at_step": analysis.step_to_compare(report.runs, report.equal_step),
        "verdict": report.verdict,
    }
    return json.dumps(_without_nan(content), indent=1, allow_nan=False, default=str) + "\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
