"""Images decoded once, in parallel, into a file that all later starts map into memory.

A cache is a folder named by what it was made from: images.npy (not of sets too large to keep), measured.npy and
meta.json. It is built beside its name and renamed when it is whole, under a lock, so that several processes or runs can
want it at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import xxhash
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data_modules.decoding import BadImageError, Decoder, EncodedColumn, EncodedImages
from data_modules.errors import DataError
from data_modules.splits import Batch, fingerprint_tensors, measure_moments

LARGEST = 16 << 30  # bytes of decoded images; larger sets are decoded as they are needed
VERIFIED = 1 << 30  # bytes up to which a cache is verified to the last byte at each start: a tenth of a second
CHUNK = 256  # images that a worker decodes at a time
ALONE = 4 * CHUNK  # so few images are decoded before workers have started


@dataclass(frozen=True)
class DecodedImages:
    """Images in one tensor, in memory or mapped from a cache."""

    images_NCHW: torch.Tensor
    measured_NC3: torch.Tensor  # as `measure_image` returns it of each image

    def __len__(self) -> int:
        return len(self.images_NCHW)

    def gather(self, indices: torch.Tensor) -> Batch:
        """Return {"inputs": uint8 [B, C, H, W]}."""
        return {"inputs": self.images_NCHW.index_select(0, indices)}

    def fingerprint(self) -> str:
        """Return a checksum of all pixels."""
        return fingerprint_tensors(self.measured_NC3)


def cache_folder() -> Path:
    """Return where caches are kept: $XDG_CACHE_HOME/exact-training, or ~/.cache/exact-training."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "exact-training" / "images"


def load_images(column: EncodedColumn, decoder: Decoder) -> tuple[DecodedImages | EncodedImages, str | None]:
    """Decode every image once, or find that done, and reject the rows whose image cannot be used.

    Returns:
        The images: mapped from the cache; in memory where no cache can be written; to be decoded as they are needed
        where they take more than `LARGEST`. And a line that says what was done, if it took time.

    Raises:
        DataError: an image cannot be used and such rows are not to be skipped, or images differ in size.
    """
    shape = (len(column), *decoder.shape)
    keep = int(np.prod(shape)) <= LARGEST
    folder = cache_folder() / _key(column, decoder, keep)
    note = None
    try:
        with _lock(folder):
            cache = _read(folder, shape, keep)
            if cache is None:
                _build(folder, column, decoder, shape, keep)
                cache = _read(folder, shape, keep)
                assert cache is not None
                note = f"{'decoded' if keep else 'checked'} {len(column):,} images once; kept in {folder}"
    except OSError as error:  # read-only, full, or a file system without locks
        images = _shared_memory(shape, np.uint8) if keep else None
        measured = _shared_memory((*shape[:2], 3), np.int64)
        cache = _Cache(images, measured, **_decode_all(column, decoder, images, measured))
        note = f"no cache can be kept in {cache_folder()} ({error.strerror}): images are decoded at each start"
    for row, problem in sorted((int(row), problem) for row, problem in cache.bad.items()):
        column.rows.reject(row, problem)
    measured_NC3 = torch.from_numpy(cache.measured)
    if cache.images is None:
        return EncodedImages(column, decoder, measured_NC3), note
    return DecodedImages(torch.from_numpy(cache.images), measured_NC3), note


@dataclass(frozen=True)
class _Cache:
    """What a cache holds."""

    images: np.ndarray[Any, Any] | None  # uint8 [N, C, H, W]
    measured: np.ndarray[Any, Any]  # int64 [N, C, 3]
    bad: dict[str, str]  # what is wrong with an image, by row
    checksum: str  # of the images
    seal: str  # checksum of `measured` and `bad`


def _key(column: EncodedColumn, decoder: Decoder, keep: bool) -> str:
    return xxhash.xxh3_128(repr((3, PIL.__version__, decoder, keep, len(column), column.stamp())).encode()).hexdigest()


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time look for a cache and build it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(folder: Path, shape: tuple[int, ...], keep: bool) -> _Cache | None:
    """Open a cache; None if there is none, or it is not what it was when it was built."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        # Copy on write: torch wants memory that may be written.
        images = np.load(folder / "images.npy", mmap_mode="c") if keep else None
        cache = _Cache(images, np.load(folder / "measured.npy"), **meta)
        sound = cache.measured.shape == (*shape[:2], 3) and _seal(cache.measured, cache.bad) == cache.seal
    except FileNotFoundError:
        return None
    except OSError:  # it may not be read
        raise
    except Exception:  # json and numpy raise a dozen kinds for damaged files
        return None
    if images is not None:
        sound = sound and images.shape == shape and images.dtype == np.uint8
        if sound and images.nbytes <= VERIFIED:
            sound = _checksum(images) == cache.checksum
    return cache if sound else None


def _build(folder: Path, column: EncodedColumn, decoder: Decoder, shape: tuple[int, ...], keep: bool) -> None:
    """Make a cache; it has its name only when every byte is on the disk."""
    for left in folder.parent.glob(f".{folder.name}-*"):  # of a process that was killed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        images = None
        if keep:
            space = shutil.disk_usage(unfinished).free
            if int(np.prod(shape)) > space:  # found out now, not by a signal while writing to the map
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            images = np.lib.format.open_memmap(unfinished / "images.npy", "w+", np.uint8, shape)
            if hasattr(os, "posix_fallocate"):  # a quota is smaller than the disk
                with open(unfinished / "images.npy", "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        measured = _shared_memory((*shape[:2], 3), np.int64)
        meta = _decode_all(column, decoder, images, measured)
        if images is not None:
            images.flush()
        np.save(unfinished / "measured.npy", measured)
        (unfinished / "meta.json").write_text(json.dumps(meta))
        for path in (*unfinished.iterdir(), unfinished):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)  # what _read refused
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _shared_memory(shape: tuple[int, ...], kind: type) -> np.ndarray[Any, Any]:
    """Return zeros that forked processes write to together."""
    return np.frombuffer(mmap.mmap(-1, int(np.prod(shape)) * np.dtype(kind).itemsize), dtype=kind).reshape(shape)


class _Decoding(Dataset[tuple[dict[int, str], str | None]]):
    """Decodes a chunk of images for one index; writes pixels and measures where all processes see them."""

    def __init__(
        self,
        column: EncodedColumn,
        decoder: Decoder,
        images: np.ndarray[Any, Any] | None,
        measured: np.ndarray[Any, Any],
    ) -> None:
        self.column = column
        self.decoder = decoder
        self.images = images
        self.measured = measured

    def __len__(self) -> int:
        return -(-len(self.column) // CHUNK)

    def __getitem__(self, number: int) -> tuple[dict[int, str], str | None]:
        """Return what is wrong with images, by row, and what is wrong with all of them."""
        bad = {}
        for row in range(number * CHUNK, min((number + 1) * CHUNK, len(self.column))):
            try:
                pixels = self.column.decode(row, self.decoder)
            except BadImageError as error:
                bad[row] = str(error)
            except DataError as error:
                return bad, str(error)
            else:
                if self.images is not None:
                    self.images[row] = pixels
                self.measured[row] = measure_image(pixels)
        return bad, None


def _decode_all(
    column: EncodedColumn, decoder: Decoder, images: np.ndarray[Any, Any] | None, measured: np.ndarray[Any, Any]
) -> dict[str, Any]:
    """Decode all images into `images`, or only try to, and return what else a cache remembers.

    Raises:
        DataError: images differ in size.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Only forked workers write to the same memory.
    workers = cores if cores > 1 and len(column) > ALONE and "fork" in multiprocessing.get_all_start_methods() else 0
    chunks = DataLoader(
        _Decoding(column, decoder, images, measured),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # the global one stays as it is
    )
    bad: dict[int, str] = {}
    for found, refusal in tqdm(chunks, "decoding images", disable=None if len(column) > ALONE else True, leave=False):
        if refusal is not None:
            raise DataError(refusal)
        bad |= found
    told = {str(row): problem for row, problem in bad.items()}
    return {"bad": told, "checksum": "" if images is None else _checksum(images), "seal": _seal(measured, told)}


def _seal(measured: np.ndarray[Any, Any], bad: dict[str, str]) -> str:
    return xxhash.xxh3_128(measured.tobytes() + json.dumps(bad, sort_keys=True).encode()).hexdigest()


def measure_image(pixels_CHW: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the sum of the pixels, that of their squares, and a checksum for each channel, int64 [C, 3]."""
    checksums = np.array([xxhash.xxh3_64_intdigest(channel.tobytes()) for channel in pixels_CHW], dtype=np.uint64)
    return np.concatenate([measure_moments(pixels_CHW[None])[0], checksums.view(np.int64)[:, None]], axis=1)


def _checksum(array: np.ndarray[Any, Any]) -> str:
    return xxhash.xxh3_128(array.data).hexdigest()
