"""The files that W&B keeps beside a run: records of protocol buffers in LevelDB's log format (wandb 0.31).

A file is a header of seven bytes and blocks of 32 KiB, of which the header is part of the first. A record is one chunk
or several, and a chunk is a checksum, a length, a kind and the content; none crosses the end of a block.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made when it is imported

HEADER = b":W&B\xe1\xbe\x00"
BLOCK = 32 * 1024
CHUNK = struct.Struct("<IHB")  # CRC-32 of kind and content, length of the content, kind
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: Path) -> Iterator[bytes]:
    """Yield the records of a file up to its end, or to where it was torn by a kill."""
    content = path.read_bytes()
    if not content.startswith(HEADER):
        return
    place, record = len(HEADER), b""
    while place + CHUNK.size <= len(content):
        if BLOCK - place % BLOCK < CHUNK.size:  # the rest of a block that holds no chunk
            place += BLOCK - place % BLOCK
            continue
        checksum, length, kind = CHUNK.unpack_from(content, place)
        part = content[place + CHUNK.size : place + CHUNK.size + length]
        if len(part) < length or zlib.crc32(bytes([kind]) + part) != checksum:
            return
        record = part if kind in (WHOLE, FIRST) else record + part
        if kind in (WHOLE, LAST):
            yield record
        place += CHUNK.size + length


def write_records(path: Path, records: Iterable[bytes]) -> None:
    """Write a file of such records."""
    content = bytearray(HEADER)
    for record in records:
        begun = False
        while True:
            room = BLOCK - len(content) % BLOCK - CHUNK.size
            if room < 0:
                content += bytes(room + CHUNK.size)
                continue
            part, record = record[:room], record[room:]
            kind = (MIDDLE if record else LAST) if begun else (FIRST if record else WHOLE)
            content += CHUNK.pack(zlib.crc32(bytes([kind]) + part), len(part), kind) + part
            begun = True
            if not record:
                break
    path.write_bytes(content)


@dataclass(frozen=True)
class Fragment:
    """What one start of a run left: a file of W&B, and the steps of its rows."""

    path: Path
    entity: str  # empty: the user's own
    project: str
    run: str
    steps: tuple[int, ...]


def read_fragment(path: Path) -> Fragment | None:
    """Return what a file holds; None if it was torn before it says of which run it is."""
    name: tuple[str, str, str] | None = None
    steps = []
    for content in read_records(path):
        record = Record.FromString(content)
        if record.WhichOneof("record_type") == "run" and name is None:
            name = (record.run.entity, record.run.project, record.run.run_id)
        elif record.WhichOneof("record_type") == "history":
            steps.append(record.history.step.num)
    return Fragment(path, *name, tuple(steps)) if name is not None else None


def write_rest(fragment: Fragment, target: Path, after: int, others: Mapping[int, Mapping[str, Any]]) -> None:
    """Write a file without the rows up to a step, and with other rows where their steps belong.

    W&B would not drop rows that it has but shift the others (0.31).

    Args:
        fragment: what is copied.
        target: the new file.
        after: rows up to this step are left out.
        others: rows by step, none of which the fragment has.
    """
    left = sorted(others)

    def records() -> Iterator[bytes]:
        for content in read_records(fragment.path):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                step = record.history.step.num
                while left and left[0] < step:
                    yield _row(left[0], others[left.pop(0)])
                if step <= after:
                    continue
            elif record.WhichOneof("record_type") == "exit":
                while left:
                    yield _row(left[0], others[left.pop(0)])
            yield content
        while left:
            yield _row(left[0], others[left.pop(0)])

    write_records(target, records())


def _row(step: int, values: Mapping[str, Any]) -> bytes:
    record = Record()
    record.history.step.num = step
    for name, value in {**values, "_step": step}.items():
        item = record.history.item.add()
        item.nested_key.append(name)
        item.value_json = json.dumps(value)
    return record.SerializeToString()
