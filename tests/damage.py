"""Checkpoints to be damaged, and the accidents that damage them. Used by tests and by bench/crash.py."""

import shutil

import torch

from train.engine.writer import CheckpointWriter

KINDS = ("flip", "cut", "delete", "swap", "append", "zero")


def make_state(step, elements=300):
    """Return the tensors of each file at a step, none of them equal to those of another step."""
    generator = torch.Generator().manual_seed(step)

    def some(*shape):
        return torch.randn(*shape, generator=generator)

    weights = {"linear.weight": some(elements // 3, 3), "linear.bias": some(7)}
    moments = {f"{name}/exp_avg": some(*tensor.shape) for name, tensor in weights.items()}
    optimizer = moments | {"linear.bias/step": torch.tensor(float(step))}
    return {"model": weights, "optimizer": optimizer, "rng": {"process_00000/torch": some(16)}}


def make_record(step, best=None):
    """Return the plain values of a checkpoint that has been evaluated if it is the best."""
    metrics = {"val/accuracy": 0.5 + step / 1000}
    progress = {"step": step, "best_step": best, "metrics": metrics, "metrics_step": step if step == best else None}
    return {"progress": progress, "config": {"best_metric": "val/accuracy"}, "aliases": {}}


def save(folder, *steps, keep=100, best=None, elements=300):
    """Save checkpoints of some steps and wait until they are on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = CheckpointWriter(folder, keep)
    for step in steps:
        writer.save(make_state(step, elements), make_record(step, best), [])
    writer.wait()


def holds(found, step, elements=300):
    """Say whether a loaded checkpoint is, to the last bit, the one that was saved at a step."""
    loaded, saved = found.load(), make_state(step, elements)
    return loaded.keys() == saved.keys() and all(
        loaded[file].keys() == saved[file].keys()
        and all(torch.equal(loaded[file][name], saved[file][name]) for name in saved[file])
        for file in saved
    )


def corrupt(path, older, random, kind=None):
    """Damage one file of a directory and say how; its content is another one afterwards.

    Args:
        path: the directory.
        older: another one, of which files may be mixed in.
        random: a random.Random.
        kind: one of KINDS; None for a random one.
    """
    while True:
        name = random.choice(sorted(file.name for file in path.iterdir()))
        chosen = kind or random.choice(KINDS)
        before = (path / name).read_bytes()
        after, text = _damaged(bytearray(before), chosen, random, older / name)
        if after is None:
            (path / name).unlink()
        elif after != before:
            (path / name).write_bytes(after)
        else:
            continue
        return f"{name}: {text}"


def _damaged(content, kind, random, other):
    if kind == "delete":
        return None, "deleted"
    if kind == "swap":
        return (other.read_bytes() if other.exists() else content), f"that of {other.parent.name}"
    if kind == "append":
        return content + random.randbytes(random.randint(1, 100)), "appended to"
    if not content:
        return content, "empty"
    place = random.randrange(len(content))
    if kind == "flip":
        content[place] ^= 1 << random.randrange(8)
        return content, f"a bit flipped at {place}"
    if kind == "cut":
        return content[:place], f"cut to {place}"
    end = min(len(content), place + random.choice([1, 512, 4096]))
    content[place:end] = bytes(end - place)
    return content, f"zero from {place} to {end}"


def copy_of(path, folder):
    """Copy a checkpoint into a folder under its name and return the copy."""
    folder.mkdir(parents=True, exist_ok=True)
    return shutil.copytree(path, folder / path.name)
