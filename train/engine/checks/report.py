"""The report of preflight: a table for the terminal, preflight.json, preflight.md and a picture in the run."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train.engine.checks.finding import Finding, Status
from train.engine.errors import see
from train.engine.storage import replace_file

MARKS: dict[Status, str] = {"pass": "pass", "warn": "WARN", "fail": "FAIL", "skip": "skip"}
# Sections of docs/troubleshooting.md on what a run would look like, by the check that finds it before.
SECTIONS = {
    "processes": "training-is-slow",
    "disk space": "the-disk-is-full",
    "inputs": "loss-is-nan-or-infinite",
    "scale": "loss-does-not-fall",
    "labels": "validation-is-no-better-than-chance",
    "gradient flow": "loss-does-not-fall",
    "gradient size": "loss-is-nan-or-infinite",
    "evaluation repeats": "validation-is-no-better-than-chance",
    "evaluation counts all": "validation-is-no-better-than-chance",
    "overfit one batch": "one-batch-cannot-be-learned-by-heart",
    "labels fit inputs": "validation-is-no-better-than-chance",
    "augmentation keeps labels": "validation-is-no-better-than-chance",
    "loss of a sample": "another-number-of-processes-gives-other-numbers",
    "gradient of the loop": "another-number-of-processes-gives-other-numbers",
    "step size": "loss-does-not-fall",
    "step direction": "loss-does-not-fall",
    "first steps": "loss-is-nan-or-infinite",
    "weights updated": "loss-does-not-fall",
    "speed": "training-is-slow",
    "micro batch": "out-of-memory",
    "learning rate": "loss-does-not-fall",
}
MOST_BARS = 60  # parameters in the picture: the last ones


@dataclass(frozen=True)
class Report:
    """What all checks said."""

    mode: str  # of --preflight
    findings: tuple[Finding, ...]
    seconds: float
    start: dict[str, Any] = field(default_factory=dict)  # what was examined: command, settings, processes, versions

    @property
    def failed(self) -> bool:
        """Whether a check failed."""
        return any(finding.status == "fail" for finding in self.findings)

    def verdict(self) -> str:
        """Return one line: how many checks, how they went, how long they took."""
        counts = Counter(finding.status for finding in self.findings)
        words: dict[Status, str] = {"pass": "passed", "warn": "to look at", "fail": "failed", "skip": "skipped"}
        said = ", ".join(
            f"{counts[status]} {word}" for status, word in words.items() if counts[status] or status == "pass"
        )
        return f"preflight {self.mode}: {said}, {self.seconds:.1f} s"

    def summary(self) -> str:
        """Return the verdict, and lines for what is not as expected."""
        lines = [self.verdict()]
        for finding in self.findings:
            if finding.status in ("warn", "fail"):
                lines += [f"  {line}" for line in _paragraph(finding)]
        if len(lines) > 1 and self.mode == "quick":
            lines.append("  --preflight looks closer and ends with 0 or 3; --preflight off leaves these checks out")
        return "\n".join(lines)

    def table(self) -> str:
        """Return all findings as a table for the terminal, with causes below."""
        width = max((len(finding.check) for finding in self.findings), default=0)
        # A terminal is as wide as it is; preflight.md has all of it.
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        lines = [f"{MARKS[finding.status]}  {finding.check:<{width}}  {finding.measured}" for finding in self.findings]
        return "\n".join([*(line[:columns] for line in lines), "", self.summary()])

    def markdown(self) -> str:
        """Return the report as Markdown."""
        lines = [f"# {self.verdict()}", ""]
        lines += [f"- {name}: {value}" for name, value in self.start.items() if name != "settings"]
        lines += ["", "| | check | measured | expected | seconds |", "|---|---|---|---|---|"]
        for finding in self.findings:
            cells = (finding.check, finding.measured, finding.expected)
            row = " | ".join(cell.replace("|", "\\|") for cell in cells)
            lines.append(f"| {MARKS[finding.status]} | {row} | {finding.seconds:.2f} |")
        for finding in self.findings:
            if finding.causes:
                lines += ["", f"## {finding.check}", "", "Likely causes, the likeliest first:", ""]
                lines += [f"{place}. {cause}" for place, cause in enumerate(finding.causes, 1)]
                if finding.check in SECTIONS:
                    lines += ["", f"For more {see(SECTIONS[finding.check])}."]
        return "\n".join([*lines, ""])

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {
            "mode": self.mode,
            "failed": self.failed,
            "seconds": self.seconds,
            "start": self.start,
            "findings": [asdict(finding) for finding in self.findings],
        }


def write_report(report: Report, run: Path) -> list[Path]:
    """Write preflight.json, preflight.md and, where there is something to see, a picture into a run; return paths."""
    name = "preflight_lr" if report.mode == "lr" else "preflight"
    files = {f"{name}.md": report.markdown(), f"{name}.json": json.dumps(report.as_dict(), indent=1) + "\n"}
    for name, text in files.items():
        replace_file(run / name, text)
    picture = run / "plots" / "preflight.png"
    return [run / name for name in files] + ([picture] if draw_report(report, picture) else [])


def draw_report(report: Report, path: Path) -> bool:
    """Draw the gradient of each parameter and how the overfitted batch was learned; False if there is neither."""
    values = {finding.check: finding.values for finding in report.findings}
    norms, curve = values.get("gradient flow", {}).get("norms"), values.get("overfit one batch", {}).get("curve")
    if not norms or not curve:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(norms)[-MOST_BARS:]
    figure = Figure(figsize=(11, 1.6 + 0.2 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    bars, line = figure.subplots(1, 2, width_ratios=(3, 2))
    bars.barh(names, [norms[name] for name in names])
    bars.set_xscale("symlog", linthresh=1e-8)
    bars.invert_yaxis()
    bars.set_xlabel("norm of the gradient before training")
    line.plot(curve)
    line.set_yscale("symlog", linthresh=1e-4)
    line.set_xlabel("step of Adam")
    line.set_ylabel("loss of a few samples, by heart")
    for axes in (bars, line):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return True


def _facts(finding: Finding) -> str:
    return f"{finding.measured}" + (f"  (expected: {finding.expected})" if finding.expected else "")


def _paragraph(finding: Finding) -> list[str]:
    more = f"; {see(SECTIONS[finding.check])}" if finding.check in SECTIONS else ""
    lines = [f"{MARKS[finding.status]} {finding.check}: {_facts(finding)}{more}"]
    return lines + [f"  {place}. {cause}" for place, cause in enumerate(finding.causes, 1)]
