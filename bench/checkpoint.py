"""Saving and loading checkpoints against the bare copies and writes of the same bytes, in one run.

    python bench/checkpoint.py --megabytes 10 200 1000 --repeats 5 --folder FOLDER

Prints a Markdown table. All rows of one size are measured in turn within each repeat, so that a slow moment of the
machine meets all of them. Ratios are medians of the ratios within the repeats.
"""

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import xxhash

from train.engine.checkpoint import open_checkpoint, step_name
from train.engine.writer import CheckpointWriter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 200, 1000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=None, help="on the disk to measure; default: the temporary folder")
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {platform.processor() or platform.machine()}"
    )
    print("| state | what | median seconds | least to most | ratio | against |")
    print("|---|---|---|---|---|---|")
    for megabytes in options.megabytes:
        folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=options.folder))
        try:
            _measure(megabytes, options.repeats, folder)
        finally:
            shutil.rmtree(folder)


def _measure(megabytes: int, repeats: int, folder: Path) -> None:
    # As Adam has it: weights and two moments, in layers of at most 4 million numbers.
    count = megabytes * 2**20 // 12
    sizes = [4 * 2**20] * (count // (4 * 2**20)) + [count % (4 * 2**20)]
    layers = [torch.randn(size) for size in sizes if size]
    files = {
        "model": {f"{number}.weight": layer for number, layer in enumerate(layers)},
        "optimizer": {
            f"{number}.weight/{name}": torch.randn(layer.shape)
            for number, layer in enumerate(layers)
            for name in ("exp_avg", "exp_avg_sq")
        },
        "rng": {"process_00000/torch": torch.get_rng_state()},
    }
    tensors = [tensor for part in files.values() for tensor in part.values()]
    buffers = [torch.empty_like(tensor).zero_() for tensor in tensors]
    writer = CheckpointWriter(folder, keep=1)
    writer.reserve(files)
    rows: dict[str, list[float]] = {}

    def timed(name: str, work) -> None:
        start = time.perf_counter()
        work()
        rows.setdefault(name, []).append(time.perf_counter() - start)

    for repeat in range(repeats + 1):
        if repeat == 1:
            rows.clear()  # the first turn warms up
        step = repeat + 1
        record = {"progress": {"step": step, "best_step": None}}
        timed("copy", lambda: [buffer.copy_(tensor) for buffer, tensor in zip(buffers, tensors)])
        timed("stand-still", lambda record=record: writer.save(files, record, []))
        writer.wait()
        rows.setdefault("save", []).append(writer.seconds)
        plain = folder / "plain"
        timed("write", lambda plain=plain: _write_plainly(plain, buffers))
        timed("checksum", lambda: [xxhash.xxh3_128(buffer.numpy()) for buffer in buffers])
        timed("read", lambda plain=plain: _read_plainly(plain))
        path = folder / step_name(step)
        timed("load", lambda path=path: [list(part.values()) for part in open_checkpoint(path).load().values()])
        plain.unlink()
    for name, base in (
        ("copy", None), ("stand-still", "copy"), ("write", None), ("save", "write"), ("checksum", "write"),
        ("read", None), ("load", "read"),
    ):  # fmt: skip
        seconds = rows[name]
        ratio = statistics.median(a / b for a, b in zip(seconds, rows[base])) if base else 1.0
        print(
            f"| {megabytes} MB | {name} | {statistics.median(seconds):.4f} | {min(seconds):.4f} to {max(seconds):.4f} "
            f"| {ratio:.2f} | {base or '-'} |",
            flush=True,
        )


def _write_plainly(path: Path, tensors: list[torch.Tensor]) -> None:
    with open(path, "wb", buffering=0) as file:
        for tensor in tensors:
            view = memoryview(tensor.numpy()).cast("B")
            while view:
                view = view[file.write(view[: 8 * 2**20]) :]
        os.fsync(file.fileno())


def _read_plainly(path: Path) -> None:
    buffer = memoryview(bytearray(8 * 2**20))
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


if __name__ == "__main__":
    main()
