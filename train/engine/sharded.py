"""Large states in shards: each process writes its own part, and any number of processes reads them back.

A shard file holds flat pieces of tensors under `NAME@START`, START being the number of the first element. Shapes and
types of the whole tensors are in state.json. So nothing is sent between processes, neither to save nor to load.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor, Shard

from train.engine.storage import DTYPE_NAMES

SHARD = re.compile(r"(model|optimizer|ema)\.shard_([0-9]{5})_of_([0-9]{5})\.safetensors")
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def shard_file(part: str, rank: int, num_processes: int) -> str:
    """Return the name, without suffix, of the shard of a process."""
    return f"{part}.shard_{rank:05d}_of_{num_processes:05d}"


def complete(names: set[str], part: str) -> bool:
    """Say whether the file names hold all shards of a part, and of one saving only."""
    found = [match for name in names if (match := SHARD.fullmatch(name)) and match[1] == part]
    counts = {int(match[3]) for match in found}
    return len(counts) == 1 and {int(match[2]) for match in found} == set(range(counts.pop()))


def describe_whole(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return type and shape of each whole tensor, in plain values."""
    return {name: [DTYPE_NAMES[tensor.dtype], list(tensor.shape)] for name, tensor in tensors.items()}


def own_pieces(tensors: Mapping[str, torch.Tensor], rank: int, num_processes: int) -> dict[str, torch.Tensor]:
    """Return the flat pieces that this process saves.

    Of a tensor sharded by rows it is what the process holds; of a replicated one an equal part.
    """
    pieces = {}
    for name, tensor in tensors.items():
        start, piece = _own_piece(tensor.detach(), rank, num_processes)
        if piece.numel():
            pieces[f"{name}@{start}"] = piece
    return pieces


def _own_piece(tensor: torch.Tensor, rank: int, num_processes: int) -> tuple[int, torch.Tensor]:
    if isinstance(tensor, DTensor):
        if tensor.placements == (Shard(0),) and tensor.device_mesh.size() == num_processes:
            rows_each = -(-tensor.shape[0] // num_processes)  # FSDP2 cuts as torch.chunk does
            row = tensor.device_mesh.get_local_rank() * rows_each
            return row * prod(tensor.shape[1:]), tensor.to_local().reshape(-1)
        tensor = tensor.full_tensor()
    first, last = tensor.numel() * rank // num_processes, tensor.numel() * (rank + 1) // num_processes
    return first, tensor.reshape(-1)[first:last]


class ShardedTensors(Mapping[str, torch.Tensor]):
    """The whole tensors of one part of a sharded checkpoint, each put together when it is asked for."""

    def __init__(self, files: list[Path], whole: dict[str, Any]) -> None:
        """Open the shards.

        Args:
            files: all shard files of the part.
            whole: what `describe_whole` returned.
        """
        self._whole = whole
        self._pieces: dict[str, list[tuple[int, Any, str]]] = {name: [] for name in whole}
        for file in files:
            reader = safe_open(file, framework="pt")
            for key in reader.keys():  # noqa: SIM118  # a reader is no mapping
                name, start = key.rsplit("@", 1)
                self._pieces[name].append((int(start), reader, key))

    def __len__(self) -> int:
        return len(self._whole)

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a whole tensor on the CPU.

        Raises:
            ValueError: the pieces do not make up the tensor.
        """
        dtype, shape = self._whole[name]
        whole = torch.empty(prod(shape), dtype=_DTYPES[dtype])
        end = 0
        for start, reader, key in sorted(self._pieces[name], key=lambda piece: piece[0]):
            piece = reader.get_tensor(key)
            if start != end or start + piece.numel() > whole.numel():
                raise ValueError(f"the shards hold other pieces of {name} than those that make it up")
            end = start + piece.numel()
            whole[start:end] = piece
        if end != whole.numel():
            raise ValueError(f"the shards lack a piece of {name}")
        return whole.view(shape)
