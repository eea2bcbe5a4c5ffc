"""Submits a script of train/ to SLURM; the job itself is launch/slurm.sbatch.

python launch/slurm.py --partition P --time 04:00:00 --nodes 2 --gpus 4 train/classify.py --config RECIPE [FLAGS]
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ("--partition", "--account", "--time", "--nodes", "--gpus", "--cpus", "--array", "--print")
SUBMITTED = """\
job {job} is in the queue
see it    squeue --job {job}
stop it   scancel {job}      it saves first, and is not requeued
logs      slurm-{job}{task}.out says what was decided, and where the run and the logs of its nodes are"""


def time_limit(text: str) -> str:
    """Return a time limit in one of SLURM's notations.

    Raises:
        argparse.ArgumentTypeError: it is none, or one that is easily misread.
    """
    if re.fullmatch(r"\d+:\d\d", text):
        raise argparse.ArgumentTypeError(f"SLURM reads {text} as minutes and seconds; write {text}:00 for hours")
    if not re.fullmatch(r"\d+|\d+:\d\d:\d\d|\d+-\d{1,2}(:\d\d){0,2}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 04:00:00, 2-00:00:00 (days first) or minutes")
    return text


def count(text: str) -> int:
    """Return a number from 1 on.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python launch/slurm.py", description="Submit a run to SLURM.")
    parser.add_argument("--partition", help="default: the cluster's")
    parser.add_argument("--account", help="who pays")
    parser.add_argument("--time", type=time_limit, help="limit of one start; the job is requeued until it is done")
    parser.add_argument("--nodes", type=count, default=1)
    parser.add_argument("--gpus", type=count, help="per node; a process for each. Without: one process on CPUs")
    parser.add_argument("--cpus", type=count, help="per node, shared by its processes")
    parser.add_argument("--array", help="0-4: five runs with the seeds 0 to 4")
    parser.add_argument("--print", action="store_true", dest="only_print", help="only show the command")
    parser.add_argument("script", help="train/SCRIPT.py, and its flags after it")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def build_command(options: argparse.Namespace) -> list[str]:
    """Return the command that submits."""
    wanted = {
        "job-name": Path(options.script).stem,
        "partition": options.partition,
        "account": options.account,
        "time": options.time,
        "nodes": options.nodes,
        "gpus-per-node": options.gpus,
        "cpus-per-task": options.cpus,
        "array": options.array,
    }
    given = [f"--{name}={value}" for name, value in wanted.items() if value is not None]
    return ["sbatch", *given, "launch/slurm.sbatch", options.script, *options.flags]


def main(arguments: Sequence[str]) -> int:
    """Submit, or print, and return the exit code.

    Raises:
        SystemExit: with code 2 for bad usage, or away from a cluster.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    if Path.cwd() != ROOT:
        parser.error(f"run this in {ROOT}: paths in the command are read there when the job starts")
    script = Path(options.script)
    if not script.is_file() or script.suffix != ".py" or script.parts[0] == "launch":
        parser.error(f"{options.script}: there is no such script; options of SLURM come before it, its flags after it")
    late = [flag for flag in options.flags if flag.partition("=")[0] in OPTIONS]
    if late:
        parser.error(f"{late[0]} stands after the script: options of SLURM come before it, its flags after it")
    command = build_command(options)
    print(shlex.join(command))
    if options.only_print:
        return 0
    if shutil.which("sbatch") is None:
        parser.error("there is no sbatch here: run this on a login node of the cluster, or only look with --print")
    finished = subprocess.run([*command[:1], "--parsable", *command[1:]], stdout=subprocess.PIPE, text=True)
    if finished.returncode == 0:
        job = finished.stdout.strip().partition(";")[0]  # NUMBER, or NUMBER;CLUSTER
        print(SUBMITTED.format(job=job, task="_TASK" if options.array else ""))
    return finished.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
