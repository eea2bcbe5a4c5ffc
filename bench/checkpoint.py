"""Saving and loading checkpoints: ours, accelerate's, torch's, and the bare copies and writes of the same bytes.

    PYTHONPATH=. python bench/checkpoint.py --megabytes 10 200 1000 --repeats 5 --folder FOLDER

Prints a Markdown table. State as Adam has it: weights and two moments. *Stand-still* is how long training waits for a
save, *save* is from the call until the files are complete: with checksums and all flushes for ours, with flushes for
torch.distributed.checkpoint; accelerate's `save_state` and torch.save flush nothing, so what they say is saved is lost
if the power goes. *Copy* is one copy in memory, *write* one file with one fsync, *load* verifies every byte. All ways
take turns in each round; the disk is flushed in between. Ratios are medians of the ratios of the rounds.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from accelerate import Accelerator
from torch import nn

from bench.rounds import measure_rounds, ratio, spread
from train.engine.checkpoint import open_checkpoint, step_name
from train.engine.writer import CheckpointWriter

LAYER = 2048  # a layer has 4 million weights


class Network(nn.Module):
    """Layers of weights, none of which is used."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        sizes = [LAYER**2] * (parameters // LAYER**2) + [parameters % LAYER**2]
        self.layers = nn.ParameterList([torch.randn(size) for size in sizes if size])


class Subject:
    """A network and its Adam of so many bytes, and every way to save it."""

    def __init__(self, megabytes: int, folder: Path) -> None:
        self.folder = folder
        self.accelerator = Accelerator(cpu=True)
        network = Network(megabytes * 2**20 // 12)
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        self.network, self.optimizer = self.accelerator.prepare(network, optimizer)
        weights = dict(network.named_parameters())
        moments = {
            f"{name}/{key}": value
            for name, weight in weights.items()
            for key, value in optimizer.state[weight].items()
            if value.ndim
        }
        self.files = {"model": {name: weight.detach() for name, weight in weights.items()}, "optimizer": moments}
        self.files["rng"] = {"process_00000/torch": torch.get_rng_state()}
        self.tensors = [tensor for part in self.files.values() for tensor in part.values()]
        self.buffers = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.writer = CheckpointWriter(folder / "ours", keep=1)
        (folder / "ours").mkdir()
        self.writer.reserve(self.files)
        self.step = 0

    def ways(self) -> dict[str, Callable[[], tuple[float, ...]]]:
        return {
            "ours": self.ours,
            "copy": lambda: self.timed(self.copy),
            "write": self.write_once,
            "read": lambda: self.timed(self.read),
            "load": lambda: self.timed(self.load),
            "checksum": lambda: self.timed(lambda: [xxhash.xxh3_128(buffer.numpy()) for buffer in self.buffers]),
            "accelerate save_state": lambda: self.blocking(
                lambda path: self.accelerator.save_state(str(path), safe_serialization=True)
            ),
            "torch.save": lambda: self.blocking(lambda path: torch.save(self.state(), path)),
            "dcp.async_save": self.distributed,
        }

    def timed(self, work: Callable[[], object]) -> tuple[float]:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start,)

    def state(self) -> dict[str, object]:
        return {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def ours(self) -> tuple[float, float]:
        self.step += 1
        record = {"progress": {"step": self.step, "best_step": None}}
        (still,) = self.timed(lambda: self.writer.save(self.files, record, []))
        self.writer.wait()
        os.sync()
        return still, self.writer.seconds

    def blocking(self, save: Callable[[Path], object]) -> tuple[float, float]:
        """Time a way of saving for which training waits."""
        path = self.folder / "peer"
        (seconds,) = self.timed(lambda: save(path))
        self.remove(path)
        return seconds, seconds

    def distributed(self) -> tuple[float, float]:
        path = self.folder / "distributed"
        start = time.perf_counter()
        future = dcp.async_save(self.state(), checkpoint_id=str(path))
        still = time.perf_counter() - start
        future.result()
        seconds = time.perf_counter() - start
        self.remove(path)
        return still, seconds

    def remove(self, path: Path) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        os.sync()

    def copy(self) -> None:
        for buffer, tensor in zip(self.buffers, self.tensors):
            buffer.copy_(tensor)

    def write_once(self) -> tuple[float]:
        seconds = self.timed(lambda: self.write("written"))
        self.remove(self.folder / "written")
        return seconds

    def write(self, name: str) -> None:
        with open(self.folder / name, "wb", buffering=0) as file:
            for tensor in self.buffers:
                view = memoryview(tensor.numpy()).cast("B")
                while view:
                    view = view[file.write(view[: 8 * 2**20]) :]
            os.fsync(file.fileno())

    def read(self) -> None:
        buffer = memoryview(bytearray(8 * 2**20))
        with open(self.folder / "plain", "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def load(self) -> None:
        found = open_checkpoint(self.folder / "ours" / step_name(self.step))
        for part in found.load().values():
            list(part.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 200, 1000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=None, help="on the disk to measure; default: the temporary folder")
    options = parser.parse_args()
    print("| state | way | stand-still, seconds | to one copy | save, seconds | to write with fsync |")
    print("|---" * 6 + "|")
    rest = []
    for megabytes in options.megabytes:
        folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=options.folder))
        try:
            subject = Subject(megabytes, folder)
            subject.ours()
            subject.write("plain")  # for reading
            seen = measure_rounds(subject.ways(), options.repeats)
        finally:
            shutil.rmtree(folder)
        columns = {way: list(zip(*values)) for way, values in seen.items()}
        copy, write, read = (columns[way][0] for way in ("copy", "write", "read"))
        for way, (still, *save) in columns.items():
            if save:
                print(
                    f"| {megabytes} MB | {way} | {spread(still, 4)} | {ratio(still, copy)} "
                    f"| {spread(save[0], 4)} | {ratio(save[0], write)} |",
                    flush=True,
                )
        for way, base, other in (("copy", "", copy), ("write", "", write), ("checksum", "write", write)):
            rest.append((megabytes, way, base, columns[way][0], other))
        rest += [(megabytes, "read", "", read, read), (megabytes, "load", "read", columns["load"][0], read)]
    print("\n| state | what | seconds | ratio | against |\n|---|---|---|---|---|")
    for megabytes, way, base, seconds, other in rest:
        print(f"| {megabytes} MB | {way} | {spread(seconds, 4)} | {ratio(seconds, other) if base else ''} | {base} |")


if __name__ == "__main__":
    main()
