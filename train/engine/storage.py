"""Files that are whole or not there: durable writes, checksums, atomic directories, and tensors without pickle.

Every call to the operating system that changes something goes through the module's `os`, so that a test can put a
failing one in its place.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

CHUNK_BYTES = 256 * 2**10  # read and hashed, or hashed and written, within the processor's cache
FLUSH_BYTES = 16 * 2**20

# The names that safetensors 0.8 gives to dtypes. complex128 is the one torch dtype in use that it lacks.
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a new file; return its size and checksum. It is safe from a power loss only after `sync`.

    While the file is written, a thread flushes what is already there, so that the disk is busy from the start.

    Raises:
        OSError: as the operating system says; a file cut short may remain.
    """
    digest = xxhash.xxh3_128()
    size = flushed = 0
    flush: Flush | None = None
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            for start in range(0, len(view), CHUNK_BYTES):
                piece = view[start : start + CHUNK_BYTES]
                digest.update(piece)
                size += len(piece)
                while piece:
                    piece = piece[os.write(descriptor, piece) :]
                if size - flushed >= FLUSH_BYTES and (flush is None or not flush.is_alive()):
                    if flush is not None:
                        flush.wait()
                    flush, flushed = Flush(os.fdatasync, descriptor), size
        if flush is not None:
            flush.wait()
    finally:
        if flush is not None:
            flush.join()  # it uses the descriptor
        os.close(descriptor)
    return {"size": size, "xxh3_128": digest.hexdigest()}


def write_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a new file and flush it to the disk; return its size and checksum.

    Raises:
        OSError: as the operating system says; a file cut short may remain.
    """
    entry = write_file(path, chunks)
    sync(path)
    return entry


def checksum(path: Path) -> dict[str, Any]:
    """Return size and checksum of a file as `write_durably` did."""
    digest = xxhash.xxh3_128()
    size = 0
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return {"size": size, "xxh3_128": digest.hexdigest()}


def sync(path: Path) -> None:
    """Flush the content of a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Flush(threading.Thread):
    """A flush that runs beside its caller, from the moment it is made.

    Not a pool's: a pool takes no work once the main thread has ended, be it by an error, and the checkpoint that is
    being written then is still finished.
    """

    def __init__(self, flush: Callable[[Any], None], target: Path | int) -> None:
        super().__init__(name="flush", daemon=False)
        self._flush = flush
        self._target = target
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._flush(self._target)
        except Exception as error:  # raised by `wait`
            self._error = error

    def wait(self) -> None:
        """Wait for its end.

        Raises:
            OSError: it failed. The system may report that only once, and here it is heard.
        """
        self.join()
        if self._error is not None:
            raise self._error


class Flusher:
    """Flushes files in the background, each as soon as it is written; at the end of the block all are on the disk.

    Flushes that meet share a commit of the file system's journal.
    """

    def __init__(self) -> None:
        self._flushes: list[Flush] = []

    def add(self, path: Path) -> None:
        """Begin to flush a file that is written."""
        self._flushes.append(Flush(sync, path))

    def __enter__(self) -> Flusher:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for all.

        Raises:
            OSError: one could not be flushed.
        """
        for flush in self._flushes:
            flush.join()
        for flush in self._flushes:
            flush.wait()


def replace_file(path: Path, text: str) -> None:
    """Put a small file in place of another: readers see the old or the new one, also after a power loss."""
    temporary = path.with_name(f".tmp-{path.name}")
    remove_tree(temporary)
    write_durably(temporary, [text.encode()])
    os.replace(temporary, path)
    sync(path.parent)


def commit_directory(final: Path, fill: Callable[[Path], None]) -> None:
    """Make a directory by `fill(temporary)` and give it its name when it is whole and on the disk.

    If there is one with that name already, the new one takes its place.

    Raises:
        OSError: what had the final name before, if anything, is still there; leftovers are swept by `sweep`.
    """
    temporary = final.with_name(f".tmp-{final.name}")
    remove_tree(temporary)
    os.mkdir(temporary)
    fill(temporary)
    # What is flushed already costs next to nothing here. The rest together at the end: a journaling file system then
    # commits once, not once for each file.
    for name in sorted(os.listdir(temporary)):
        sync(temporary / name)
    sync(temporary)
    if final.exists():
        _exchange(temporary, final)
    else:
        os.rename(temporary, final)
    sync(final.parent)
    remove_tree(temporary)


def _exchange(one: Path, other: Path) -> None:
    """Swap the names of two directories, so that there is a whole one of each at every instant.

    Linux can do that (renameat2, glibc 2.28) on most of its file systems. Elsewhere one is away for an instant.
    """
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    here, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if exchange is None or exchange(here, os.fsencode(one), here, os.fsencode(other), flag) != 0:
        aside = one.with_name(f"{one.name}-other")  # begins as the temporary one does, for `sweep`
        os.rename(other, aside)
        os.rename(one, other)
        os.rename(aside, one)


def remove_directory(path: Path) -> None:
    """Remove a directory so that no half of it is ever seen under its name."""
    doomed = path.with_name(f".del-{path.name}")
    remove_tree(doomed)
    os.rename(path, doomed)
    remove_tree(doomed)


def remove_tree(path: Path) -> None:
    """Remove a directory with all in it, or a file, if it is there. A link is removed, not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def sweep(folder: Path) -> None:
    """Remove what a killed process left of saving or pruning. The caller must be the only writer."""
    for name in os.listdir(folder):
        if name.startswith((".tmp-", ".del-")):
            remove_tree(folder / name)


def tensor_chunks(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file that holds these CPU tensors; equal tensors give equal bytes.

    Raises:
        ValueError: a dtype that the format lacks.

    Source: the safetensors format: 8 bytes header length, JSON header, data without gaps. Wide dtypes come first, so
    that everything is aligned; safetensors' own writer does the same.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot hold")
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        if tensors[name].numel():
            flat = tensors[name].detach().contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data
