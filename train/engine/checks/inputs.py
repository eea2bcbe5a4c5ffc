"""What enters the network: finite, of a sensible scale, none of it constant. Legend: B samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from train.engine.checks.finding import Finding, judge, number, skip
from train.engine.checks.reading import Limit, hash_rows, inputs_of, list_numbers, load_some, on_main, read
from train.engine.checks.subject import Subject
from train.engine.contract import Batch

SCALE = (0.05, 10.0)  # root mean square of inputs; standardised ones have 1, pixels up to 255 about 100
IMAGE_SCALE = 1.5  # of images without a negative value; pixels from 0 to 1 have less than 1, from 0 to 16 about 8
SPREAD = 0.02  # of a feature, as a share of the root mean square
COLUMN_SCALE = 1e3  # times the median of the other columns
# Of --preflight quick, and of full. The seconds of full keep a million photographs from taking hours.
FEATURES = {"quick": Limit(512, 32 * 2**20, 0.5), "full": Limit(10_000, 2**30, 20)}


def check_inputs(subject: Subject) -> Iterator[Finding]:
    """Look at a training batch as it enters the network."""
    yield from on_main(subject, lambda: _judge_inputs(load_some(subject, 64, 0)))


def _judge_inputs(inputs: Mapping[str, torch.Tensor]) -> list[Finding]:
    inputs = {name: tensor.detach().cpu() for name, tensor in inputs.items() if tensor.numel()}
    if not inputs:
        cause = "the task names no input that has a value: mend its `inputs`"
        return [judge("inputs", False, "no values", "numbers", (cause,))]
    described: dict[str, Any] = {name: _describe(tensor) for name, tensor in inputs.items()}
    broken = sum(facts["nonfinite"] for facts in described.values())
    hashes = hash_rows(inputs)
    alike = len(hashes) > 1 and len(np.unique(hashes)) == 1
    said = "; ".join(f"{name} {_shown(facts)}" for name, facts in described.items())
    causes = []
    if broken:
        said += f"; {broken:,} values are NaN or infinite"
        causes.append("the data hold such values, or normalisation divides by 0: look at the samples named by features")
    if alike:
        said += f"; all {len(hashes)} samples are equal"
        causes.append("reading yields the same for every sample: look at inputs.png in the run, and at --input_columns")
    wanted = "finite numbers, other ones in each sample"
    findings = [judge("inputs", not causes, said, wanted, tuple(causes), **described)]
    floats = {name: tensor.double() for name, tensor in inputs.items() if tensor.is_floating_point()}
    if broken:
        return [*findings, skip("scale", "cannot be told of NaN or infinity")]
    return findings + ([_judge_scale(floats)] if floats else [])


def _describe(tensor: torch.Tensor) -> dict[str, Any]:
    """Return plain numbers that describe a tensor."""
    values = tensor.double()
    finite = values[values.isfinite()]
    facts: dict[str, Any] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    if len(finite):
        facts |= {"min": float(finite.min()), "max": float(finite.max()), "mean": float(finite.mean())}
        facts["std"] = float(finite.std(correction=0))
    return facts | {"nonfinite": values.numel() - finite.numel()}


def _shown(facts: dict[str, Any]) -> str:
    text = f"{facts['dtype']} {facts['shape']}"
    if "mean" in facts:
        text += f" from {number(facts['min'])} to {number(facts['max'])}, mean {number(facts['mean'])}"
        text += f", std {number(facts['std'])}"
    return text


def _judge_scale(floats: Mapping[str, torch.Tensor]) -> Finding:
    """Judge how large float64 inputs are, and how much their features change from sample to sample."""
    said, causes = [], []
    values: dict[str, Any] = {}
    for name, tensor in floats.items():
        rows = _by_feature(tensor)
        rms, spread = float(rms_of(rows)), float(rows.var(dim=0, correction=0).mean().sqrt())
        values[name] = {"rms": rms, "spread": spread}
        said.append(f"{name} has root mean square {number(rms)}, features spread by {number(spread)}")
        pixels = tensor.ndim == 4 and rms > IMAGE_SCALE and float(tensor.min()) >= 0
        if rms > SCALE[1] or pixels:
            causes.append(
                f"{name} are not normalised, as pixels from 0 to 255 or raw columns of a table: standardise them "
                "(images: --image_mean and --image_std, or leave both out)"
            )
        elif rms < SCALE[0]:
            causes.append(f"{name} are divided twice (pixels by 255 and again), or nearly always 0: standardise them")
        elif spread < SPREAD * rms:
            causes.append(
                f"{name} hardly differ from sample to sample: pixels from 0 to 1 with mean and deviation of pixels "
                "from 0 to 255, or divided twice"
            )
    wanted = f"root mean square from {SCALE[0]} to {SCALE[1]:g}, 1 if standardised; spread above {SPREAD} of it"
    return judge("scale", not causes, "; ".join(said), wanted, tuple(causes), **values)


def rms_of(rows: torch.Tensor) -> torch.Tensor:
    """Return the root mean square of all values."""
    return rows.square().mean().sqrt()


def _by_feature(tensor: torch.Tensor) -> torch.Tensor:
    """Return values as [rows, features]: channels of images [B, C, H, W], columns of [B, D]; else one feature."""
    if tensor.ndim == 4:
        return tensor.movedim(1, -1).flatten(0, -2)
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, 1)


@dataclass
class _Features:
    """What was seen of the features of one float tensor."""

    least: torch.Tensor
    most: torch.Tensor
    squares: torch.Tensor  # sums
    rows: int = 0

    def add(self, rows: torch.Tensor) -> None:
        """Look at float64 rows [rows, features]."""
        self.least = torch.minimum(self.least, rows.amin(dim=0))
        self.most = torch.maximum(self.most, rows.amax(dim=0))
        self.squares += rows.square().sum(dim=0)
        self.rows += len(rows)


def check_features(subject: Subject) -> Iterator[Finding]:
    """Look for features that say nothing, for NaN and infinity, and for columns of another order of magnitude."""
    yield from on_main(subject, lambda: _judge_features(subject))


def _judge_features(subject: Subject) -> list[Finding]:
    seen: dict[str, _Features] = {}
    broken: dict[str, list[int]] = {}
    looked_at: dict[str, int] = {}
    columns: dict[str, bool] = {}
    for split in ("train", "validation"):
        broken[split], looked_at[split] = [], 0
        for numbers, batch in read(subject, split, FEATURES, partial(_load_plain, subject, split)):
            looked_at[split] += len(numbers)
            floats = {name: tensor for name, tensor in inputs_of(subject, batch).items() if tensor.is_floating_point()}
            sound = torch.ones(len(numbers), dtype=torch.bool)
            for tensor in floats.values():
                sound &= tensor.flatten(1).isfinite().all(dim=1).cpu()
            broken[split] += numbers[~sound].tolist()
            for name, tensor in floats.items() if split == "train" and sound.any() else ():
                rows = _by_feature(tensor.cpu()[sound].double())
                if rows.shape[1] == 0:
                    continue
                columns[name] = tensor.ndim == 2
                seen.setdefault(name, _Features(rows[0], rows[0], torch.zeros_like(rows[0]))).add(rows)
    findings = [_judge_constants(seen, broken, looked_at)]
    scaled = {name: features for name, features in seen.items() if columns[name] and features.squares.numel() > 1}
    return findings + [_judge_columns(name, features) for name, features in scaled.items()]


def _load_plain(subject: Subject, split: str, numbers: torch.Tensor) -> Batch:
    return subject.task.load(split, numbers, None)


def _judge_constants(
    seen: Mapping[str, _Features], broken: Mapping[str, list[int]], looked_at: Mapping[str, int]
) -> Finding:
    constant = {
        name: torch.nonzero(features.least == features.most).flatten().tolist()
        for name, features in seen.items()
        if features.rows > 1
    }
    said = [f"{looked_at['train']:,} training and {looked_at['validation']:,} validation samples"]
    causes = []
    for split, numbers in broken.items():
        if numbers:
            said.append(f"{len(numbers)} of {split} hold NaN or infinity: number {list_numbers(sorted(numbers))}")
    if len(said) > 1:
        causes.append("missing values or overflow in the data: mend or remove those samples (--on_bad_sample skip)")
    failed = bool(causes)
    for name, places in constant.items():
        if places:
            of = f"of {seen[name].squares.numel()}"
            said.append(f"{len(places)} {of} features of {name} never change: number {list_numbers(places)}")
    if any(constant.values()):
        causes.append("such a feature says nothing: leave the column out (--input_columns), or see what reads it")
    return judge(
        "features",
        not causes,
        "; ".join(said),
        "finite, and none that is the same in all samples",
        tuple(causes),
        otherwise="fail" if failed else "warn",
        looked_at=dict(looked_at),
        nonfinite={split: sorted(numbers)[:100] for split, numbers in broken.items()},
        constant={name: places[:100] for name, places in constant.items()},
    )


def _judge_columns(name: str, features: _Features) -> Finding:
    """Compare the size of each column with the median of the others that are not all 0."""
    rms = (features.squares / features.rows).sqrt().numpy()
    present = np.flatnonzero(rms)
    ratios = [rms[place] / np.median(rms[present[present != place]]) for place in present] if len(present) > 1 else []
    large = [int(place) for place, ratio in zip(present, ratios) if ratio > COLUMN_SCALE]
    ratio = max(ratios, default=1.0)
    return judge(
        "feature scale",
        not large,
        f"the largest column of {name} has {number(ratio)} times the size of a typical other one"
        + (f": number {list_numbers(large)}" if large else ""),
        f"less than {COLUMN_SCALE:g} times",
        ("a column in another unit, or an identifier that is no feature: standardise it, or leave it out",),
        otherwise="warn",
        large=large,
        ratio=float(ratio),
    )
