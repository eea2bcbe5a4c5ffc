"""List, verify, compare and export the checkpoints of a run: python train/checkpoints.py RUN [--verify].

Exit codes: 0 done or equal; 1 different; 2 bad usage or input; 3 a checkpoint is damaged.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.engine.errors import EXIT_DONE, EXIT_USAGE, UsageError

if TYPE_CHECKING:  # torch takes seconds to import: --help answers without it
    import torch

    from train.engine.checkpoint import Checkpoint

EXIT_DIFFERENT = 1
EXIT_DAMAGED = 3


def list_checkpoints(folder: Path, verify: bool) -> int:
    """Print a line for each checkpoint and return the exit code."""
    from train.engine import checkpoint

    rows = []
    for step in checkpoint.list_steps(folder):
        path = folder / checkpoint.step_name(step)
        found, state = None, "valid"
        try:
            found = checkpoint.open_checkpoint(path, thorough=verify)
        except checkpoint.DamagedCheckpointError as error:
            state = f"damaged: {str(error).removeprefix(f'{path}: ')}"
        with contextlib.suppress(FileNotFoundError):  # a run that is under way may have pruned it just now
            rows.append((step, *_date_and_size(path), found, state))
    valid = [found for *_, found, _ in rows if found is not None]
    best = valid[-1].record["progress"]["best_step"] if valid else None
    metric = valid[-1].record["config"]["best_metric"] if valid else "score"
    print(f"{'step':>9}  {'date':<19}  {'size':>10}  {metric:>14}  {'':<4}  state")
    for step, date, size, found, state in rows:
        score = None if found is None else _score(found.record, metric)
        shown = "-" if score is None else f"{score:.5g}"
        print(f"{step:>9}  {date:<19}  {size:>10}  {shown:>14}  {'best' if step == best else '':<4}  {state}")
    damaged = len(rows) - len(valid)
    print(f"{len(valid)} valid, {damaged} damaged" + ("" if verify else " (sizes only; --verify reads every byte)"))
    return EXIT_DAMAGED if damaged else EXIT_DONE


def _date_and_size(path: Path) -> tuple[str, str]:
    parts = [path, *(path.iterdir() if path.is_dir() else [])]
    written = max(part.lstat().st_mtime for part in parts)
    size = sum(part.lstat().st_size for part in parts[1:])
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(written)), f"{size / 2**20:,.1f} MB"


def _score(record: dict[str, Any], metric: str) -> float | None:
    """Return the value of a metric if it was measured at the very step of the checkpoint."""
    progress = record["progress"]
    return progress["metrics"].get(metric) if progress["metrics_step"] == progress["step"] else None


def compare(one: Checkpoint, other: Checkpoint) -> int:
    """Print in which tensors two checkpoints differ, sharded or not, and return the exit code."""
    left, right = one.load(), other.load()
    here, there = ({(part, name) for part in parts for name in parts[part]} for parts in (left, right))
    differing = 0
    for part, name in sorted(here | there):
        if (part, name) in here & there:
            difference = compare_tensors(left[part][name], right[part][name])
        else:
            difference = f"missing in {other.path if (part, name) in here else one.path}"
        if difference:
            differing += 1
            print(f"{part} {name}: {difference}")
    total = len(here | there)
    print(f"{differing} of {total} tensors differ" if differing else f"all {total} tensors are equal, bit by bit")
    return EXIT_DIFFERENT if differing else EXIT_DONE


def compare_tensors(one: torch.Tensor, other: torch.Tensor) -> str:
    """Say how two tensors differ; nothing if they are equal to the last bit, so NaN may equal NaN."""
    import torch

    if one.dtype != other.dtype or one.shape != other.shape:
        return f"{one.dtype} {tuple(one.shape)} against {other.dtype} {tuple(other.shape)}"
    if not one.numel():
        return ""
    bits = [tensor.contiguous().reshape(-1, 1).view(torch.uint8) for tensor in (one, other)]
    count = int((bits[0] != bits[1]).any(dim=1).sum())
    if not count:
        return ""
    wide = torch.complex128 if one.is_complex() else torch.float64
    largest = (one.to(wide) - other.to(wide)).abs().max().item()
    return f"{count:,} of {one.numel():,} elements differ, by {largest:.6g} at most"


def export(found: Checkpoint, out: Path) -> int:
    """Copy the weights that the run was judged by to one safetensors file, which is whole or not there.

    Raises:
        UsageError: the file exists, is not called .safetensors, or cannot be written; nothing is left behind.
    """
    from train.engine import storage

    if out.suffix != ".safetensors":
        raise UsageError(f"--export: {out} must end in .safetensors")
    if out.exists() or out.is_symlink():
        raise UsageError(f"--export: {out} exists already; choose another name")
    part = "ema" if found.record["config"]["best_metric"].startswith("val/ema_") else "model"
    weights = dict(found.load()[part])
    # Tied weights get all their names, so that load_state_dict of the model takes the file as it is.
    weights |= {alias: weights[name] for alias, name in found.record["aliases"].items()}
    temporary = out.with_name(f".tmp-{out.name}")
    try:
        storage.remove_tree(temporary)
        storage.write_durably(temporary, storage.tensor_chunks(weights))
        temporary.rename(out)
        storage.sync(out.absolute().parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            storage.remove_tree(temporary)
        raise UsageError(f"--export: cannot write {out} ({error.strerror})") from error
    size = f"{out.stat().st_size / 2**20:,.1f} MB"
    print(f"{out}: {len(weights)} tensors, {size}, from {part} of step {found.step}")
    return EXIT_DONE


def run() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="folder of the run; its checkpoints are listed")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--verify", action="store_true", help="read every byte; a plain list looks at sizes only")
    text = "compare two checkpoints (a step, best, latest or a path) tensor by tensor, bit by bit"
    action.add_argument("--diff", nargs=2, metavar=("A", "B"), help=text)
    text = "copy the weights of a checkpoint to one new file"
    action.add_argument("--export", nargs=2, metavar=("WHICH", "OUT.safetensors"), help=text)
    request = parser.parse_args()
    from train.engine.named_checkpoint import find_checkpoint, find_folder

    try:
        folder = find_folder(request.run)
        if request.diff:
            code = compare(*(find_checkpoint(folder, wish) for wish in request.diff))
        elif request.export:
            code = export(find_checkpoint(folder, request.export[0]), Path(request.export[1]))
        else:
            code = list_checkpoints(folder, request.verify)
    except ValueError as error:  # a UsageError, or shards that do not fit together
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USAGE
    sys.exit(code)


if __name__ == "__main__":
    run()
