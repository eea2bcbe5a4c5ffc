"""Compare runs: python train/compare.py RUN RUN ... [--metric val/accuracy --mode max] [--html FILE].

RUN is the folder of a run, an offline .wandb file or its folder, or entity/project/run of W&B.
Exit codes: 0 done; 2 bad usage or input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from train.engine.errors import EXIT_DONE, EXIT_USAGE, UsageError
from train.engine.wandb_service import limit_exit


def compare(request: argparse.Namespace) -> int:
    """Print the comparison, write the files that were asked for, and return the exit code.

    Raises:
        UsageError: a run cannot be read or compared, or a file cannot be written.
    """
    from train.comparison.report import build_report, to_json, to_markdown, to_text
    from train.comparison.sources import read_runs

    files = [path for path in (request.markdown, request.json, request.png, request.html) if path is not None]
    lost = [f"{path}: there is no folder {path.parent}" for path in files if not path.parent.is_dir()]
    if lost:
        raise UsageError(lost)
    runs, notes = read_runs(request.runs)
    report = build_report(runs, notes, request.metric, request.mode)
    print(to_text(report))
    if request.markdown:
        write(request.markdown, to_markdown(report).encode())
    if request.json:
        write(request.json, to_json(report).encode())
    if request.png:
        from train.comparison.pictures import draw_png

        write(request.png, draw_png(report))
    if request.html:
        from train.comparison.page import to_html

        write(request.html, to_html(report).encode())
    return EXIT_DONE


def write(path: Path, content: bytes) -> None:
    """Write a file and say so.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from error
    print(f"wrote {path}")


def run() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run; one that is named twice counts once")
    parser.add_argument("--metric", help="evaluation metric to compare; default: the best_metric of the runs")
    parser.add_argument("--mode", choices=["min", "max"], help="which values are better; default: as the name says")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the tables and the verdict as Markdown")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all numbers for programs")
    parser.add_argument("--png", metavar="FILE", type=Path, help="draw the curves")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write all of it as one page that loads nothing else")
    try:
        code = compare(parser.parse_args())
    except UsageError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        code = EXIT_USAGE
    limit_exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
