"""The data: what enters the network, labels, overlap of the splits, batches, augmentation. Legend: B samples."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from train.engine.checks.finding import Finding, judge, listing, number, skip
from train.engine.checks.subject import Subject, batch_length
from train.engine.contract import Batch
from train.engine.errors import TrainingError
from train.engine.randomness import derive_seed

CHUNK_BYTES, CHUNK_SAMPLES = 16 * 2**20, 4096  # samples that are held at once
SCALE = (0.05, 10.0)  # root mean square of inputs; standardised ones have 1, pixels up to 255 about 100
IMAGE_SCALE = 1.5  # of images without a negative value; pixels from 0 to 1 have less than 1, from 0 to 16 about 8
SPREAD = 0.02  # of a feature, as a share of the root mean square
COLUMN_SCALE = 1e3  # times the median of the other columns
IMBALANCE = 20  # largest class in terms of the smallest
SHARES_APART = 0.3  # total variation distance of two splits' classes
COPIED = 0.05  # share of validation samples that are training samples, too
FEWEST_COPIES = 3  # less may be chance
SLOT_SHARED = 0.5  # share of a slot's samples that are in another one, too
LOOKED_AT = 1024  # samples of the loader that a loader process yields before the next one's turn, and a few more

Gather = Callable[[torch.Tensor], Batch]
Hashes = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True)
class _Limit:
    """How much of a split is read, whichever comes first. The time is for samples that take long to decode."""

    samples: int
    bytes: int
    seconds: float


# Of --preflight quick, and of full. The seconds of full keep a million photographs from taking hours.
FEATURES = {"quick": _Limit(512, 32 * 2**20, 0.5), "full": _Limit(10_000, 2**30, 20)}
LABELS = {"quick": _Limit(2000, 32 * 2**20, 0.5), "full": _Limit(50_000, 2**33, 60)}
OVERLAP = {"quick": _Limit(100_000, 2**28, 2), "full": _Limit(20_000_000, 2**50, 180)}


def check_inputs(subject: Subject) -> Iterator[Finding]:
    """Look at a training batch as it enters the network."""
    yield from _on_main(subject, lambda: _judge_inputs(_load_some(subject, 64, 0)))


def _judge_inputs(inputs: Mapping[str, torch.Tensor]) -> list[Finding]:
    inputs = {name: tensor.detach().cpu() for name, tensor in inputs.items() if tensor.numel()}
    if not inputs:
        cause = "the task names no input that has a value: mend its `inputs`"
        return [judge("inputs", False, "no values", "numbers", (cause,))]
    described: dict[str, Any] = {name: _describe(tensor) for name, tensor in inputs.items()}
    broken = sum(facts["nonfinite"] for facts in described.values())
    hashes = _hash_rows(inputs)
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
    yield from _on_main(subject, lambda: _judge_features(subject))


def _judge_features(subject: Subject) -> list[Finding]:
    seen: dict[str, _Features] = {}
    broken: dict[str, list[int]] = {}
    looked_at: dict[str, int] = {}
    columns: dict[str, bool] = {}
    for split in ("train", "validation"):
        broken[split], looked_at[split] = [], 0
        for numbers, batch in _read(subject, split, FEATURES, partial(_load_plain, subject, split)):
            looked_at[split] += len(numbers)
            floats = {name: tensor for name, tensor in _inputs(subject, batch).items() if tensor.is_floating_point()}
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
            said.append(f"{len(numbers)} of {split} hold NaN or infinity: number {_list_numbers(sorted(numbers))}")
    if len(said) > 1:
        causes.append("missing values or overflow in the data: mend or remove those samples (--on_bad_sample skip)")
    failed = bool(causes)
    for name, places in constant.items():
        if places:
            of = f"of {seen[name].squares.numel()}"
            said.append(f"{len(places)} {of} features of {name} never change: number {_list_numbers(places)}")
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
        + (f": number {_list_numbers(large)}" if large else ""),
        f"less than {COLUMN_SCALE:g} times",
        ("a column in another unit, or an identifier that is no feature: standardise it, or leave it out",),
        otherwise="warn",
        large=large,
        ratio=float(ratio),
    )


def check_labels(subject: Subject) -> Iterator[Finding]:
    """Look at the labels of both splits, if there are classes."""
    if subject.task.num_classes is None or not subject.task.targets:
        yield skip("labels", "the task has no classes")
        return
    yield from _on_main(subject, lambda: [_judge_labels(subject, subject.task.num_classes or 0)])


def _judge_labels(subject: Subject, num_classes: int) -> Finding:
    name = subject.task.targets[0]
    labels: dict[str, torch.Tensor] = {}
    numbers: dict[str, torch.Tensor] = {}
    for split in ("train", "validation"):
        parts = [(part, batch[name].cpu()) for part, batch in _read(subject, split, LABELS)]
        numbers[split] = torch.cat([part for part, _ in parts]) if parts else torch.zeros(0, dtype=torch.int64)
        labels[split] = torch.cat([values for _, values in parts]) if parts else torch.zeros(0, dtype=torch.int64)
        if labels[split].is_floating_point() or labels[split].ndim != 1:
            return skip("labels", f"{name} are no class numbers: {labels[split].dtype} {list(labels[split].shape)}")
    wrong = {
        split: numbers[split][(values < 0) | (values >= num_classes)].sort().values.tolist()
        for split, values in labels.items()
    }
    counts = {
        split: torch.bincount(values[(values >= 0) & (values < num_classes)], minlength=num_classes)
        for split, values in labels.items()
    }
    failures = _find_label_failures(wrong, counts, num_classes)
    doubts = _find_label_doubts(subject, counts, num_classes)
    said = [f"{len(values):,} of {len(subject.task.splits[split]):,} in {split}" for split, values in labels.items()]
    sizes = counts["train"][counts["train"] > 0]
    if len(sizes):
        said.append(f"{len(sizes)} of {num_classes} classes, with {int(sizes.min()):,} to {int(sizes.max()):,} each")
    problems = failures + doubts
    return judge(
        "labels",
        not problems,
        "; ".join(said + [text for text, _ in problems]),
        f"numbers from 0 to {num_classes - 1}, every class there, in like shares",
        tuple(cause for _, cause in problems),
        otherwise="fail" if failures else "warn",
        counts={split: values.tolist()[:1000] for split, values in counts.items()},
        outside={split: places[:100] for split, places in wrong.items()},
    )


def _find_label_failures(
    wrong: Mapping[str, list[int]], counts: Mapping[str, torch.Tensor], num_classes: int
) -> list[tuple[str, str]]:
    """Return what is wrong for certain, each with a likely cause."""
    problems = [
        (
            f"{len(places)} of {split} lie outside: number {_list_numbers(places)}",
            f"labels count from 1, or -1 stands for a missing one, or the model has too few classes ({num_classes})",
        )
        for split, places in wrong.items()
        if places
    ]
    if num_classes > 1 and int((counts["train"] > 0).sum()) == 1 and int(counts["train"].sum()) > 1:
        cause = "the data are sorted and only the first part was read, or --label_column names another column"
        problems.append((f"all training samples are of class {int(counts['train'].argmax())}", cause))
    return problems


def _find_label_doubts(subject: Subject, counts: Mapping[str, torch.Tensor], num_classes: int) -> list[tuple[str, str]]:
    """Return what is worth a look, each with a likely cause."""
    train, validation = counts["train"], counts["validation"]
    total = {split: int(values.sum()) for split, values in counts.items()}
    sizes = train[train > 0]
    problems = []
    # Of a part of the split, rare classes may be missing by chance.
    if total["train"] >= min(len(subject.task.splits["train"]), 50 * num_classes):
        missing = torch.nonzero(train == 0).flatten().tolist()
        if missing and len(sizes) > 1:
            cause = "classes that were never collected, or a cut by class: mend the split, or leave them out"
            problems.append((f"no training sample of class {_list_numbers(missing)}", cause))
    balanced = getattr(subject.settings, "class_balance", "none") != "none"
    if len(sizes) > 1 and int(sizes.max()) >= IMBALANCE * int(sizes.min()) and not balanced:
        problems.append(
            (
                f"the largest class has {int(sizes.max()) / int(sizes.min()):.0f} times the samples of the smallest",
                "rare classes are hardly learnt, and accuracy hides it: --class_balance weights or sampler",
            )
        )
    if num_classes > 1 and int((validation > 0).sum()) == 1 and len(sizes) > 1 and total["validation"] > 1:
        cause = "the data are sorted and were cut at the end: shuffle them before they are cut"
        problems.append((f"all validation samples are of class {int(validation.argmax())}", cause))
    elif min(total.values()) >= 10 * num_classes:
        apart = float((train / total["train"] - validation / total["validation"]).abs().sum()) / 2
        if apart > SHARES_APART:
            cause = "the splits come from other sources, or were cut by class: cut one split at random"
            problems.append((f"{apart:.0%} of the class shares differ between train and validation", cause))
    return problems


def check_overlap(subject: Subject) -> Iterator[Finding]:
    """Look for training samples in the validation split, by a hash of their inputs as they are stored.

    Tables with few categories and short texts repeat themselves by nature. How often a training sample occurs again in
    the training split says how often a validation sample may.
    """
    yield from _on_main(subject, lambda: [_judge_overlap(subject)])


class _Part(NamedTuple):
    """The samples of a split that were looked at."""

    numbers: Hashes  # of the samples
    inputs: Hashes
    both: Hashes  # of inputs and targets together


def _judge_overlap(subject: Subject) -> Finding:
    name, sizes = "train and validation", {split: len(samples) for split, samples in subject.task.splits.items()}
    validation, train = _hash_split(subject, "validation"), _hash_split(subject, "train")
    if not len(validation.inputs) or not len(train.inputs):
        return skip(name, "a split is empty")
    share_read = len(train.inputs) / sizes["train"]
    again = np.isin(validation.inputs, train.inputs)
    other_label = again & ~np.isin(validation.both, train.both)
    _, counts = np.unique(train.inputs, return_counts=True)
    # Of a part of the training split, only that share of the copies is found.
    by_nature = min(1.0, float(counts[counts > 1].sum()) / len(train.inputs) / share_read)
    effective = len(validation.inputs) * share_read
    copies = int(again.sum())
    share = min(1.0, copies / effective)
    likely = max(by_nature, 1 / len(train.inputs))
    noise = 3 * math.sqrt(likely * (1 - likely * share_read) / effective)  # of a binomial count
    # Twice as many as by nature; or, where most occur twice, half of those that do not.
    limit = min(2 * by_nature + 0.02, (1 + by_nature) / 2) + noise
    failed = copies >= FEWEST_COPIES and share > COPIED and share > limit
    doubtful = share > by_nature + 0.001 + (noise if by_nature else 0.0)
    part = f"{len(train.inputs):,} of {sizes['train']:,} training samples"
    said = f"{copies:,} of {len(validation.inputs):,} validation samples are among {part}"
    if share_read < 1 and copies:
        said += f", {share:.1%} if the others are alike"
    if by_nature:
        said += f"; {by_nature:.1%} of training samples occur twice there"
    examples = _pair_up(train, validation, again)
    if copies and (failed or doubtful):
        said += "; such as " + ", ".join(f"{mine} (training sample {other})" for mine, other in examples[:3])
        if other_label.any():
            said += f"; {int(other_label.sum()):,} have other labels there"
    return judge(
        name,
        not failed and not doubtful,
        said,
        "no sample in both",
        (
            "the validation split was made of training samples, or read from the same files: --validation_split, or "
            "leave it out to have one cut",
            "the data hold copies: remove them before they are cut",
        ),
        otherwise="fail" if failed else "warn",
        copies=copies,
        share=share,
        by_nature=by_nature,
        looked_at={"train": len(train.inputs), "validation": len(validation.inputs)},
        other_labels=int(other_label.sum()),
        examples=examples,
    )


def _hash_split(subject: Subject, split: str) -> _Part:
    """Return hashes of the samples of a split, as far as the limits allow."""
    parts: list[tuple[Hashes, Hashes, Hashes]] = []
    for numbers, batch in _read(subject, split, OVERLAP):
        inputs = _inputs(subject, batch)
        targets = {name: batch[name] for name in subject.task.targets if name in batch}
        parts.append((numbers.numpy().astype(np.uint64), _hash_rows(inputs), _hash_rows({**inputs, **targets})))
    if not parts:
        return _Part(*(np.zeros(0, dtype=np.uint64) for _ in range(3)))
    return _Part(*(np.concatenate(columns) for columns in zip(*parts)))


def _pair_up(train: _Part, validation: _Part, again: np.ndarray[Any, Any], most: int = 20) -> list[tuple[int, int]]:
    """Return numbers of a validation and a training sample that are equal, the lowest ones."""
    chosen = np.flatnonzero(again)[np.argsort(validation.numbers[again])][:most]
    order = np.lexsort((train.numbers, train.inputs))
    places = order[np.searchsorted(train.inputs, validation.inputs[chosen], sorter=order)]
    return [(int(mine), int(other)) for mine, other in zip(validation.numbers[chosen], train.numbers[places])]


@dataclass
class _Reading:
    """What a process read of the loader: for each real sample its batch, its slot and its hash."""

    batches: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    hashes: list[Hashes] = field(default_factory=list)

    def rows(self) -> torch.Tensor:
        """Return batch, slot and hash of each sample, int64 [samples, 3]."""
        lengths = [len(part) for part in self.hashes]
        places = np.repeat(np.array([self.batches, self.slots], dtype=np.int64).reshape(2, -1), lengths, axis=1)
        hashes = np.concatenate([*self.hashes, np.zeros(0, dtype=np.uint64)]).view(np.int64)
        return torch.from_numpy(np.concatenate([places, hashes[None]]).T.copy())


def check_batches(subject: Subject) -> Iterator[Finding]:
    """See that no two slots, batches or processes get the same samples, and that reading again yields the same."""
    settings, runtime = subject.settings, subject.runtime
    thorough = settings.preflight == "full"
    if settings.num_workers and not thorough:
        yield skip("batches", "starting loader processes takes seconds: --preflight looks at them")
        return
    mine, repeats, error = torch.zeros(0, 3, dtype=torch.int64), True, None
    try:
        mine = _read_batches(subject)
        repeats = not thorough or torch.equal(mine, _read_batches(subject))
    except Exception as problem:  # one process must not leave the others waiting; raised again below
        error = problem
    states = torch.stack(runtime.gather(torch.tensor([len(mine), repeats, error is None])))
    if error is not None:
        raise error
    if not states[:, 2].all():
        raise TrainingError(f"process {int(states[:, 2].argmin())} cannot read its batches")
    padded = torch.zeros(int(states[:, 0].max()), 3, dtype=torch.int64)
    padded[: len(mine)] = mine
    everyone = [rows[: int(count)] for rows, count in zip(runtime.gather(padded), states[:, 0])]
    unstable = [rank for rank, same in enumerate(states[:, 1].tolist()) if not same]
    yield from _on_main(subject, lambda: [_judge_batches(subject, everyone, unstable)])


def _read_batches(subject: Subject) -> torch.Tensor:
    """Return batch, slot and hash of each sample of this process in the first batches, int64 [samples, 3]."""
    settings, reading = subject.settings, _Reading()
    fewest, samples = 2, 0
    if settings.preflight == "full" and settings.num_workers:
        fewest = 2 + 2 * settings.num_workers
        samples = LOOKED_AT * settings.num_workers  # a loader process may prepare several small batches at once
    batches, seen = subject.loader.batches(0, 0), 0
    try:
        for place, batch in enumerate(batches):
            for slot in batch.slots:
                reading.batches.append(place)
                reading.slots.append(slot.number)
                reading.hashes.append(_hash_rows(_inputs(subject, slot.batch))[: slot.count])
            seen += batch.size // subject.runtime.num_processes
            if place + 1 >= fewest and seen >= samples:
                break
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()  # and with it the loader processes
    return reading.rows()


def _judge_batches(subject: Subject, everyone: Sequence[torch.Tensor], unstable: list[int]) -> Finding:
    units: dict[tuple[int, int, int], np.ndarray[Any, Any]] = {}
    for rank, rows in enumerate(everyone):
        places = rows[:, :2].unique(dim=0).tolist()
        units |= {(rank, *place): rows[(rows[:, :2] == torch.tensor(place)).all(dim=1), 2].numpy() for place in places}
    if unstable:
        return judge(
            "batches",
            False,
            f"read again, other samples came on process {_list_numbers(unstable)}",
            "the same batches each time",
            ("the loader draws from a generator that moves on, or from the clock: draw by (seed, epoch, sample)",),
            unstable=unstable,
        )
    if len(units) < 2:
        return skip("batches", "there is one only")
    by_nature = max(_share_within(list(units.values())), _share_by_chance(subject, units))
    pair, share = _most_shared(units)
    said = f"{len(units)} slots of {1 + max(batch for _, batch, _ in units)} batches on {len(everyone)} process(es)"
    if by_nature >= SLOT_SHARED:
        return skip("batches", f"{said}: {by_nature:.0%} of samples occur twice by nature, so nothing can be told")
    said += f", {share:.0%} of a slot's samples in another one at most"
    ok = share <= SLOT_SHARED + by_nature
    if not ok:
        said += f": {_name_unit(pair[0])} and {_name_unit(pair[1])}"
    return judge(
        "batches",
        ok,
        said,
        "other samples in each" + (f", but for {by_nature:.0%} that occur twice by nature" if by_nature else ""),
        (_explain_sharing(pair),),
        slots=len(units),
        shared=share,
        by_nature=by_nature,
        pair=[list(unit) for unit in pair],
    )


def _name_unit(unit: tuple[int, int, int]) -> str:
    return f"slot {unit[2]} of batch {unit[1]} on process {unit[0]}"


def _explain_sharing(pair: tuple[tuple[int, int, int], tuple[int, int, int]]) -> str:
    (first_rank, first_batch, _), (rank, batch, _) = pair
    if first_rank != rank:
        return "processes do not share the batch: give the sampler rank and num_processes of the run"
    if first_batch != batch:
        return (
            "the loader does not move on, or its loader processes have one seed: take samples by a permutation of "
            "(seed, epoch), cut at the position"
        )
    return "forward passes of one step take the same samples: cut the batch into slots"


def _share_within(units: Sequence[np.ndarray[Any, Any]]) -> float:
    """Return the share of all slots' samples that came in their slot before."""
    return 1 - sum(len(np.unique(hashes)) for hashes in units) / sum(len(hashes) for hashes in units)


def _share_by_chance(subject: Subject, units: Mapping[tuple[int, int, int], np.ndarray[Any, Any]]) -> float:
    """Return how much slots share that are filled with other training samples each, of up to 512 in all.

    In large slots of data that repeat themselves samples occur twice within a slot; in small ones only this shows it.
    """
    lengths, total = [], 0
    for hashes in units.values():
        length = min(len(hashes), 64)
        if total + length > min(512, len(subject.task.splits["train"])):
            break
        lengths.append(length)
        total += length
    if len(lengths) < 2:
        return 0.0
    numbers = _choose(subject, len(subject.task.splits["train"]), total)
    hashes = _hash_rows(_inputs(subject, subject.task.splits["train"].gather(numbers)))
    parts = np.split(hashes, np.cumsum(lengths)[:-1])
    return _most_shared({(0, 0, place): part for place, part in enumerate(parts)})[1]


def _most_shared(
    units: Mapping[tuple[int, int, int], np.ndarray[Any, Any]],
) -> tuple[tuple[tuple[int, int, int], tuple[int, int, int]], float]:
    """Return the two slots that share most, and the share of the smaller one's samples."""
    holders: dict[int, dict[tuple[int, int, int], int]] = defaultdict(dict)
    for unit, hashes in units.items():
        for value, count in zip(*np.unique(hashes, return_counts=True)):
            holders[int(value)][unit] = int(count)
    shared: dict[tuple[tuple[int, int, int], tuple[int, int, int]], int] = defaultdict(int)
    for counts in holders.values():
        for pair in combinations(counts, 2):
            shared[pair] += min(counts[pair[0]], counts[pair[1]])
    first, second = list(units)[:2]
    shares = {pair: count / min(len(units[pair[0]]), len(units[pair[1]])) for pair, count in shared.items()}
    pair = max(shares, key=lambda pair: shares[pair], default=(first, second))
    return pair, shares.get(pair, 0.0)


def check_augmentation(subject: Subject) -> Iterator[Finding]:
    """See that augmentation changes from epoch to epoch, and is the same when an epoch is asked for again."""
    if subject.task.augmented:
        yield from _on_main(subject, lambda: [_judge_augmentation(subject)])


def _judge_augmentation(subject: Subject) -> Finding:
    plain, first, second, again = (_hash_rows(_load_some(subject, 16, epoch)) for epoch in (None, 0, 1, 0))
    count = len(first)
    changed, moved, unlike = (int((other != first).sum()) for other in (plain, second, again))
    said = [f"{changed} of {count} samples are changed, {moved} otherwise in the next epoch"]
    causes = []
    if unlike:
        said.append(f"{unlike} came out otherwise when asked for again")
        causes.append(
            "it draws from a generator that moves on, or from the clock, and no run could be resumed exactly: draw by "
            "(seed, epoch, sample)"
        )
    if not moved:
        causes.append("it draws the same in every epoch: let the epoch enter the seed")
    return judge(
        "augmentation",
        not causes,
        "; ".join(said),
        "other changes in each epoch, the same ones when an epoch is asked for again",
        tuple(causes),
        samples=count,
        changed=changed,
        changed_in_next_epoch=moved,
        changed_again=unlike,
    )


def _on_main(subject: Subject, work: Callable[[], list[Finding]]) -> list[Finding]:
    """Return on all processes what rank 0 finds; an error of any kind is raised on all of them."""

    def guarded() -> list[Finding]:
        try:
            return work()
        except (ValueError, TrainingError):
            raise
        except Exception as error:  # on_main hands on the two above only, and the others would wait for ever
            raise TrainingError(f"{type(error).__name__}: {error}") from error

    return subject.runtime.on_main(guarded)


def _inputs(subject: Subject, batch: Batch) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in subject.task.inputs if name in batch}


def _load_some(subject: Subject, count: int, epoch: int | None) -> dict[str, torch.Tensor]:
    """Return the inputs of training samples; more than one forward pass takes, where a few could be alike by chance."""
    numbers = _choose(subject, len(subject.task.splits["train"]), count)
    return _inputs(subject, subject.task.load("train", numbers, epoch))


def _choose(subject: Subject, size: int, most: int) -> torch.Tensor:
    """Return up to `most` different numbers below `size` in a random order that is always the same, int64."""
    generator = torch.Generator().manual_seed(derive_seed(subject.settings.seed, size) % 2**32)
    if size <= 4 * most:
        return torch.randperm(size, generator=generator)[:most]
    # A permutation of 10**8 numbers takes a minute; of random ones, few meet.
    drawn = torch.randint(size, (2 * most + 16,), generator=generator).unique()
    return drawn[torch.randperm(len(drawn), generator=generator)[:most]]


def _read(
    subject: Subject, split: str, limits: Mapping[str, _Limit], gather: Gather | None = None
) -> Iterator[tuple[torch.Tensor, Batch]]:
    """Yield numbers, in no order, and samples of a split in chunks, up to a limit."""
    limit = limits["full" if subject.settings.preflight == "full" else "quick"]
    samples = subject.task.splits[split]
    gather = gather or samples.gather
    numbers = _choose(subject, len(samples), limit.samples)
    end = time.monotonic() + limit.seconds
    start = used = 0
    length = 16
    while start < len(numbers):
        part = numbers[start : start + length].sort().values
        batch = gather(part)
        start += len(part)
        used += sum(tensor.numel() * tensor.element_size() for tensor in batch.values())
        yield part, batch
        each = max(1, used // start)
        length = min(CHUNK_SAMPLES, max(1, CHUNK_BYTES // each), (limit.bytes - used) // each)
        if length < 1 or time.monotonic() > end:
            return


def _hash_rows(tensors: Mapping[str, torch.Tensor]) -> Hashes:
    """Return a hash of each sample, uint64 [B].

    Zeros at the end do not count: texts are padded to the longest one of those that were gathered together. So that
    two tensors are not taken for one, the length of each without those zeros goes in, too.
    """
    if not tensors:
        raise TrainingError("no tensor of the batch is an input of the task: mend the `inputs` of the task")
    rows = []
    for tensor in tensors.values():
        flat = tensor.detach().cpu().reshape(len(tensor), -1).contiguous()
        rows.append(flat.view(torch.uint8).numpy() if flat.shape[1] else np.zeros((len(flat), 0), dtype=np.uint8))
    hashes = np.empty(batch_length(dict(tensors)), dtype=np.uint64)
    for place, parts in enumerate(zip(*rows)):
        digest = xxhash.xxh3_64()
        for part in parts:
            content = part.tobytes().rstrip(b"\0")
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
        hashes[place] = digest.intdigest()
    return hashes


def _list_numbers(numbers: Sequence[int]) -> str:
    return listing([str(value) for value in numbers])
