"""Run every benchmark, one after another on this machine, and write docs/benchmarks.md from what they print.

    PYTHONPATH=. python bench/report.py --mnist FOLDER_WITH_MNIST
    PYTHONPATH=. python bench/report.py --only "Start-up" "Resuming"

`make bench` installs what is compared and does this. The document is written anew after each part, so an interrupted or
failing part loses no other; a section that no part owns stays as it is. What a part says on standard error is progress.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "benchmarks.md"
PACKAGES = ("torch", "accelerate", "lightning", "transformers", "datasets", "numpy", "wandb")
MNIST = "FOLDER_WITH_MNIST"


@dataclass(frozen=True)
class Part:
    """A section of the document."""

    title: str
    command: str  # after "python", in the project's folder; MNIST stands for the folder given
    text: str


PARTS = (
    Part(
        "Training loop",
        f"bench/loop.py --dataset {MNIST}",
        "Samples per second of `train/classify.py` with all its defaults, of a bare loop on tensors in memory, "
        "and of the same training with accelerate, Lightning and the Trainer of transformers. Each measurement is "
        "a process.",
    ),
    Part(
        "The whole job",
        f"bench/job.py --dataset {MNIST} --repeats 5 --at_once 2 --results runs/bench_job.jsonl",
        "Seconds from the start of the process to an accuracy on MNIST's test split, with all imports, all "
        "reading and all evaluations, on one thread, two ways side by side. A repeat is a seed. *Processor* is the "
        "training process alone: images are decoded in others. What an interrupted run has measured is kept in "
        "`runs/bench_job.jsonl`; remove that file to measure anew.",
    ),
    Part(
        "Start-up",
        "bench/startup.py",
        "Real processes, killed when the first optimizer step is done. Ours is on the digits, the others on as "
        "much noise. Most of every start is torch: `import torch`, and torch._dynamo with sympy, which "
        "`torch.optim` imports when an optimizer is made (torch 2.13). W&B (0.31) adds its package, its start and "
        "its job inputs.",
    ),
    Part(
        "Saving and loading",
        "bench/checkpoint.py --megabytes 10 200 1000",
        "State as Adam has it. *Stand-still* is how long training waits; *save* is from the call until the "
        "checkpoint could be resumed from. Ours has checksums and flushes every file and the rename; "
        "torch.distributed.checkpoint flushes its files; accelerate's `save_state` and torch.save flush nothing, "
        "so that a power cut takes what they saved. Ratios are to one copy in memory, and to one file of the same "
        "bytes with one fsync. *load* verifies every byte.",
    ),
    Part(
        "Resuming",
        "bench/resume.py",
        "From the start of a process to its first new step, near the start of an epoch and deep inside it, of "
        "samples of 16 numbers. *held*: they are read once and held; *stream*: read as they come. "
        "`skip_first_batches` walks through what it skips, and through every sample of a stream; ours begins at "
        "the block of 10,000 samples where it was.",
    ),
    Part(
        "Processes",
        "bench/scaling.py --only bytes speed --models mlp mnist_cnn --rounds 5",
        "Bytes that a process sends, against the formulas of [scaling](scaling.md), which explains both tables; "
        "and one process with two threads against two processes with one each, with DDP, exact reduction and "
        "FSDP2.",
    ),
    Part(
        "Exact reduction",
        "bench/reduction.py --processes 2 --slots 2",
        "mnist_cnn (1.2 million parameters), batch 128. `exact` exchanges after the last backward pass, "
        "DistributedDataParallel during it; with more slots than processes both add up locally first.",
    ),
    Part(
        "Input",
        f"bench/input.py --dataset {MNIST}",
        "The warm input path on MNIST: from an index to a normalised batch. `datasets` with `with_transform` and "
        "a DataLoader is the way of accelerate's vision example. The bare gather of floats is `images[indices], "
        "labels[indices]` on tensors that were normalised before, which take four times the memory; that of bytes "
        "does not normalise at all. The share is of a training step of a bare loop (AdamW, fp32).",
    ),
    Part(
        "SSIM loss, forward and backward",
        "bench/losses.py",
        "One process, one thread, all in turn on the same images, float32, window 11.",
    ),
    Part(
        "Stateful LSTM",
        "bench/stateful.py",
        "Microseconds an update, on one thread. *By hand* is the loop as one would write it, with `nn.LSTM`, "
        "`torch.optim.Adam` and `clip_grad_norm_`; the *floor* is one pass of NumPy over the same weights and "
        "moments.",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", help="a folder with MNIST's Parquet files; without it, what needs them is left out")
    parser.add_argument("--only", nargs="+", choices=[part.title for part in PARTS], help="sections to make anew")
    options = parser.parse_args()
    if options.mnist and not any((ROOT / options.mnist).rglob("*.parquet")):
        parser.error(f"--mnist: no Parquet files in {options.mnist}")
    sections = read_sections(DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else "")
    failed = []
    for part in PARTS:
        if options.only and part.title not in options.only:
            continue
        print(f"==> {part.title}: python {part.command}", file=sys.stderr, flush=True)
        start = time.monotonic()
        result, good = run_part(part, options.mnist)
        failed += [] if good else [part.title]
        sections[part.title] = (
            f"`python {part.command}` ({time.strftime('%Y-%m-%d')}, {(time.monotonic() - start) / 60:.1f} minutes)\n\n"
            f"{textwrap.fill(part.text, 120)}\n\n{result}"
        )
        write_document(sections)
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}; docs/benchmarks.md says why")


def run_part(part: Part, mnist: str | None) -> tuple[str, bool]:
    """Return what a part printed, or why it did not, and whether it went well; left out is well."""
    if MNIST in part.command and mnist is None:
        return "Not measured: it needs MNIST (`make bench MNIST=FOLDER`).", True
    command = [sys.executable, "-W", "ignore", *shlex.split(part.command.replace(MNIST, shlex.quote(mnist or "")))]
    # One thread: on few cores, small models are slower with more.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        return f"Not measured: the command ended with code {done.returncode}.", False
    return done.stdout.strip().replace(str(mnist), MNIST), True


def read_sections(document: str) -> dict[str, str]:
    """Return the text of each section by its title."""
    _, *parts = re.split(r"^## ", document, flags=re.MULTILINE)
    return {title: text.strip() for title, _, text in (part.partition("\n") for part in parts)}


def write_document(sections: dict[str, str]) -> None:
    """Write the document: the machine, the sections in the order of the parts, and then those of no part."""
    titles = [part.title for part in PARTS if part.title in sections]
    titles += [title for title in sections if title not in titles and title != "On a GPU"]
    text = f"# Benchmarks\n\n{describe_machine()}\n"
    text += "".join(f"\n## {title}\n{sections[title]}\n" for title in titles)
    if not torch.cuda.is_available():
        text += "\n## On a GPU\nNot measured, in fp32, in bf16 or compiled: there was no GPU.\n"
    DOCUMENT.write_text(text, encoding="utf-8")


def describe_machine() -> str:
    """Return what the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if platform.system() == "Linux" else ""
    name = re.search(r"model name\s*:\s*(.+)", info)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} missing")
    processor = name[1] if name else platform.machine()
    machine = (
        f"`make bench MNIST=FOLDER` on {os.cpu_count()} cores ({processor}), {memory:.0f} GB, {gpu}; load "
        f"{os.getloadavg()[0]:.1f}. Python {platform.python_version()}, {', '.join(versions)}."
    )
    how = (
        "Ways take turns within each round, and a ratio is the median of the ratios of the rounds, so that slow "
        "moments of the machine meet all ways. Figures are the median (least to most) where nothing else is said."
    )
    return f"{textwrap.fill(machine, 120)}\n\n{textwrap.fill(how, 120)}"


if __name__ == "__main__":
    main()
