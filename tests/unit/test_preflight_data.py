"""Preflight's checks of the data: each bug is planted and named, and sound data of all kinds are left in peace."""

import csv
import dataclasses
import json
import random
from types import SimpleNamespace

import pytest
import torch

from data_modules.splits import Arrays, GlobalBatch, Slot, Split
from tests.subjects import classify_subject, statuses
from train.engine.checks import labels, overlap, reading
from train.engine.checks.batches import check_augmentation, check_batches
from train.engine.checks.inputs import check_features, check_inputs
from train.engine.checks.labels import check_labels
from train.engine.checks.overlap import check_overlap
from train.engine.errors import TrainingError
from train.engine.runtime import Runtime

CHECKS = (check_inputs, check_features, check_labels, check_overlap, check_batches, check_augmentation)
AUGMENT = ("crop:1", "rotate:10", "cutout:2", "mixup:0.2")


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Return a function that gives a subject to change; equal ones are built once."""
    made = {}

    def get(dataset="blobs", **settings):
        key = (dataset, *sorted(settings.items()))
        if key not in made:
            made[key] = classify_subject(tmp_path_factory.mktemp("run"), dataset=str(dataset), **settings)
        return dataclasses.replace(made[key])

    return get


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Short texts, a third of which occur more than once, and tables of three categories, all of which do."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    words = ["good", "bad", "film", "plot", "actor", "great", "poor", "dull", "bright", "nice", "awful", "fine"]
    rows = [
        [" ".join(draw.choices(words[:5] if label else words, k=draw.choice([1, 2, 3, 6, 20]))), label]
        for label in draw.choices([0, 1], k=1500)
    ]
    tables = [[*draw.choices("uvwxy", k=3), draw.choice(["yes", "no"])] for _ in range(1500)]
    for name, header, lines in (("text", ["text", "label"], rows), ("table", ["a", "b", "c", "label"], tables)):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([header, *lines])
    return folder


def examine(subject, *checks):
    findings = [finding for check in checks for finding in check(subject)]
    for finding in findings:
        json.dumps(finding.values, allow_nan=False)
        assert bool(finding.causes) == (finding.status in ("warn", "fail")), finding
    return findings


def find(check, subject, name):
    (found,) = [finding for finding in examine(subject, check) if finding.check == name]
    return found


def with_settings(subject, **settings):
    subject.settings = dataclasses.replace(subject.settings, **settings)
    return subject


def plant(subject, split, inputs=None, labels=None):
    """Put other samples into a split; they enter the network as they are."""
    old = subject.task.splits[split]
    inputs = old.gather(torch.arange(len(old)))["inputs"].float() if inputs is None else inputs
    labels = torch.arange(len(inputs)) % subject.task.num_classes if labels is None else labels
    splits = {**subject.task.splits, split: Split(Arrays({"inputs": inputs}), labels)}
    subject.task = dataclasses.replace(
        subject.task, splits=splits, load=lambda name, indices, epoch: splits[name].gather(indices)
    )
    return subject


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- sound data ----


@pytest.mark.parametrize("mode", ["quick", "full"])
@pytest.mark.parametrize(
    "settings",
    [
        {"dataset": "blobs"},
        {"dataset": "digits"},
        {"dataset": "digits", "augment": AUGMENT},
        {"dataset": "wine"},
        {"dataset": "wine", "class_balance": "sampler"},
        {"dataset": "breast_cancer", "batch_size": 4, "slots": 4},
        {"dataset": "text.csv", "batch_size": 8},
        {"dataset": "table.csv", "batch_size": 8},
        {"dataset": "table.csv", "batch_size": 4, "slots": 4},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_sound_data_pass(make, texts, settings, mode):
    settings = dict(settings)
    if settings["dataset"].endswith(".csv"):
        settings["dataset"] = texts / settings["dataset"]
    findings = examine(with_settings(make(**settings), preflight=mode), *CHECKS)
    assert {finding.status for finding in findings} <= {"pass", "skip"}, findings
    names = {"inputs", "features", "labels", "train and validation", "batches"}
    assert names <= {finding.check for finding in findings}


@pytest.mark.parametrize(
    "images",
    [
        (noise(200, 1, 28, 28) > 1).float(),  # from 0 to 1, mostly dark: as MNIST without normalisation
        torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        noise(200, 3, 8, 8),
    ],
)
def test_images_from_0_to_1_or_standardised_are_of_the_right_scale(make, images):
    findings = examine(plant(make(), "train", images), check_inputs, check_features)
    assert set(statuses(findings).values()) == {"pass"}, findings


# ---- inputs ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_fail_and_are_counted(make, value):
    points = noise(300, 2)
    points[[5, 17], 1] = value
    subject = plant(make(), "train", points)
    found = find(check_features, subject, "features")
    assert found.status == "fail" and "2 of train hold NaN or infinity: number 5, 17" in found.measured
    assert found.values["nonfinite"] == {"train": [5, 17], "validation": []}
    points[:, 1] = value
    assert statuses(examine(subject, check_inputs)) == {"inputs": "fail", "scale": "skip"}


def test_nan_in_validation_fails(make):
    points = noise(300, 2)
    points[299] = float("nan")
    found = find(check_features, plant(make(), "validation", points), "features")
    assert found.status == "fail" and "1 of validation" in found.measured and "299" in found.measured


def test_equal_samples_fail(make):
    found = find(check_inputs, plant(make(), "train", noise(1, 2).expand(100, 2).contiguous()), "inputs")
    assert found.status == "fail" and "all 64 samples are equal" in found.measured


def test_few_samples_in_a_forward_pass_are_not_taken_for_equal_ones(make):
    flags = (noise(100, 1) > 0).float()
    for seed in range(8):
        subject = with_settings(plant(make(batch_size=2), "train", flags), seed=seed)
        assert find(check_inputs, subject, "inputs").status == "pass"


@pytest.mark.parametrize(
    ("images", "cause"),
    [
        (torch.randint(0, 256, (200, 1, 8, 8), generator=torch.Generator().manual_seed(0)).float(), "not normalised"),
        (torch.randint(0, 17, (200, 1, 8, 8), generator=torch.Generator().manual_seed(0)).float(), "not normalised"),
        (noise(200, 1, 8, 8) / 255, "divided twice"),
        # Pixels from 0 to 1/255, with the mean and deviation of pixels from 0 to 1.
        ((torch.rand(200, 1, 8, 8) / 255 - 0.45) / 0.22, "hardly differ"),
        (noise(200, 20) * 50, "raw columns"),
    ],
)
def test_inputs_of_another_scale_fail(make, images, cause):
    found = find(check_inputs, plant(make(), "train", images), "scale")
    assert found.status == "fail" and cause in found.causes[0], found


# ---- features ----


def test_constant_columns_are_a_warning(make):
    points = noise(100, 5)
    points[:, [1, 3]] = 7.0
    found = find(check_features, plant(make(), "train", points), "features")
    assert found.status == "warn" and "2 of 5 features of inputs never change: number 1, 3" in found.measured


def test_a_constant_pixel_is_no_constant_channel(make):
    images = noise(100, 2, 8, 8)
    images[:, :, :2] = 0
    assert find(check_features, plant(make(), "train", images), "features").status == "pass"
    images[:, 1] = 0
    assert "1 of 2 features of inputs" in find(check_features, plant(make(), "train", images), "features").measured


def test_a_column_in_another_unit_is_a_warning(make):
    points = noise(100, 5)
    points[:, 2] *= 5000
    subject = plant(make(), "train", points)
    found = find(check_features, subject, "feature scale")
    assert found.status == "warn" and found.values["large"] == [2]
    points[:, 2] /= 50
    assert find(check_features, subject, "feature scale").status == "pass"
    points[:, [0, 1, 3, 4]] = 0
    assert find(check_features, subject, "feature scale").status == "pass"
    assert (
        find(check_features, plant(make(), "train", noise(100, 2) * torch.tensor([1e-2, 50])), "feature scale").status
        == "warn"
    )


# ---- labels ----


def labels_of(subject, split):
    return subject.task.splits[split].labels.clone()


@pytest.mark.parametrize(("split", "value"), [("train", 2), ("train", -1), ("validation", 7)])
def test_labels_outside_the_classes_fail(make, split, value):
    subject = make()
    labels = labels_of(subject, split)
    labels[[3, 11]] = value
    found = find(check_labels, plant(subject, split, labels=labels), "labels")
    assert found.status == "fail" and f"2 of {split} lie outside: number 3, 11" in found.measured


@pytest.mark.parametrize(("split", "status"), [("train", "fail"), ("validation", "warn")])
def test_one_class_only(make, split, status):
    subject = make()
    found = find(check_labels, plant(subject, split, labels=torch.ones_like(labels_of(subject, split))), "labels")
    assert found.status == status and "samples are of class 1" in found.measured


def test_classes_without_samples_are_a_warning(make):
    subject = make()
    subject.task = dataclasses.replace(subject.task, num_classes=4)
    labels = {split: torch.arange(400) % 3 for split in ("train", "validation")}
    for split, values in labels.items():
        plant(subject, split, noise(400, 2), values)
    found = find(check_labels, subject, "labels")
    assert found.status == "warn" and "no training sample of class 3" in found.measured


def test_rare_classes_are_not_missed_in_a_part_of_many_samples(make, monkeypatch):
    subject = make()
    subject.task = dataclasses.replace(subject.task, num_classes=100)
    for split in ("train", "validation"):
        plant(subject, split, noise(8000, 2), torch.arange(8000) % 100)
    monkeypatch.setitem(labels.LABELS, "full", reading.Limit(150, 2**40, 60))
    found = find(check_labels, subject, "labels")
    assert found.status == "pass" and "150 of 8,000 in train" in found.measured


@pytest.mark.parametrize(("rare", "balance", "status"), [
    (5, "none", "warn"), (5, "sampler", "pass"), (5, "weights", "pass"), (25, "none", "pass"),
])  # fmt: skip
def test_rare_classes_are_a_warning(make, rare, balance, status):
    subject = with_settings(make(), class_balance=balance)
    for split in ("train", "validation"):
        plant(subject, split, noise(400, 2), (torch.arange(400) < rare).long())
    found = find(check_labels, subject, "labels")
    assert found.status == status, found
    assert status == "pass" or "--class_balance" in found.causes[0]


def test_other_class_shares_in_validation_are_a_warning(make):
    subject = plant(make(), "validation", noise(100, 2), (torch.arange(100) < 90).long())
    found = find(check_labels, subject, "labels")
    assert found.status == "warn" and "40% of the class shares differ" in found.measured
    few = plant(make(), "validation", noise(10, 2), (torch.arange(10) < 9).long())
    assert find(check_labels, few, "labels").status == "pass"


def test_no_classes_no_labels(make):
    subject = make()
    subject.task = dataclasses.replace(subject.task, num_classes=None, targets=())
    assert find(check_labels, subject, "labels").status == "skip"


# ---- train and validation ----


@pytest.mark.parametrize("mode", ["quick", "full"])
@pytest.mark.parametrize("dataset", ["blobs", "digits", "wine", "text.csv"])
def test_validation_copied_from_train_fails(make, texts, dataset, mode):
    subject = with_settings(make(texts / dataset if dataset.endswith("csv") else dataset), preflight=mode)
    splits = subject.task.splits
    count = len(splits["validation"])

    class Copied:
        def __len__(self):
            return count

        def gather(self, indices):
            return splits["train"].gather(indices + 3)

    subject.task = dataclasses.replace(subject.task, splits={**splits, "validation": Copied()})
    found = find(check_overlap, subject, "train and validation")
    assert found.status == "fail", found
    assert found.values["copies"] == count and found.values["other_labels"] == 0
    if dataset != "text.csv":  # where other training samples are equal to these
        assert found.values["examples"] == [(place, place + 3) for place in range(20)]


def test_a_tenth_of_copies_fails_and_one_is_a_warning(make):
    for copies, status in ((40, "fail"), (1, "warn"), (0, "pass")):
        subject = make()
        points = noise(400, 2, seed=1)
        points[:copies] = subject.task.splits["train"].gather(torch.arange(copies))["inputs"]
        found = find(check_overlap, plant(subject, "validation", points), "train and validation")
        assert (found.status, found.values["copies"]) == (status, copies), found


def test_copies_with_other_labels_are_counted(make):
    subject = make()
    copied = subject.task.splits["train"].gather(torch.arange(400))
    labels = copied["labels"].clone()
    labels[:30] = 1 - labels[:30]
    found = find(check_overlap, plant(subject, "validation", copied["inputs"], labels), "train and validation")
    assert found.values["other_labels"] == 30 and "30 have other labels there" in found.measured


@pytest.mark.parametrize("copied", [True, False])
def test_a_part_of_train_is_enough_to_see_copies(make, monkeypatch, copied):
    monkeypatch.setitem(overlap.OVERLAP, "full", reading.Limit(1000, 2**40, 60))
    subject = plant(make(), "train", noise(20_000, 2))
    inputs = noise(20_000, 2)[:1000] if copied else noise(1000, 2, seed=1)
    found = find(check_overlap, plant(subject, "validation", inputs), "train and validation")
    assert found.status == ("fail" if copied else "pass"), found
    assert "1,000 of 20,000 training samples" in found.measured
    assert not copied or 0.5 < found.values["share"] <= 1  # 50 of 1,000 are found, give or take


def test_natural_copies_in_a_part_of_train_are_no_alarm(make, monkeypatch):
    """Every sample is there twice, at random places: half of the copies of a validation sample are seen."""
    monkeypatch.setitem(overlap.OVERLAP, "full", reading.Limit(5000, 2**40, 60))
    order = torch.randperm(11_000, generator=torch.Generator().manual_seed(0))
    points = noise(5500, 2).repeat(2, 1)[order]
    subject = plant(plant(make(), "train", points[1000:]), "validation", points[:1000])
    found = find(check_overlap, subject, "train and validation")
    assert found.status == "pass" and found.values["copies"] > 300, found
    assert "such as" not in found.measured  # nothing to look at


def test_reading_stops_at_each_limit(make, monkeypatch):
    subject = make()
    for limit in (reading.Limit(50, 2**40, 60), reading.Limit(10**6, 50 * 16, 60), reading.Limit(10**6, 2**40, 0)):
        parts = list(reading.read(subject, "train", {"full": limit}))
        numbers = torch.cat([part for part, _ in parts])
        assert 16 <= len(numbers) <= 50 and len(numbers.unique()) == len(numbers)
    monkeypatch.setattr(reading, "CHUNK_SAMPLES", 100)
    parts = [part for part, _ in reading.read(subject, "train", {"full": reading.Limit(10**6, 2**40, 60)})]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(2000))
    assert [len(part) for part in parts[:5]] == [16, 32, 64, 100, 100]


@pytest.mark.parametrize(("size", "most"), [(10, 3), (10, 100), (10**12, 5000)])
def test_chosen_numbers_are_different_and_always_the_same(make, size, most):
    subject = make()
    subject.task = dataclasses.replace(subject.task, splits={"train": range(size)})
    numbers = subject.numbers("train", most)
    assert len(numbers.unique()) == len(numbers) == min(size, most)
    assert int(numbers.min()) >= 0 and int(numbers.max()) < size
    assert torch.equal(numbers, subject.numbers("train", most))


def test_padding_does_not_change_a_hash_and_order_does():
    def of(*rows, lengths=(2,)):
        return reading.hash_rows({"tokens": torch.tensor(rows), "lengths": torch.tensor(lengths)}).tolist()

    assert of([5, 256]) == of([5, 256, 0, 0])
    assert of([5, 0]) != of([5, 0], lengths=(1,))  # a last token 0 that is none of the padding
    different = {*of([5, 6]), *of([6, 5]), *of([0, 5]), *of([5, 1], lengths=(0,)), *of([5, 0], lengths=(1,))}
    assert len(different) == 5
    first = {"a": torch.tensor([[1, 2]]).byte(), "b": torch.tensor([[3]]).byte()}
    second = {"a": torch.tensor([[1]]).byte(), "b": torch.tensor([[2, 3]]).byte()}
    assert reading.hash_rows(first) != reading.hash_rows(second)


# ---- batches ----


class Stand:
    """A loader of given batches, each a list of slots of sample numbers."""

    num_samples, batch_size = 2000, 64

    def __init__(self, subject, batches, noisy=False):
        self.split, self.slots, self.noisy, self.closed, self.calls = subject.task.splits["train"], batches, noisy, 0, 0

    def batches(self, epoch, start):
        try:
            for slots in self.slots:
                parts = []
                for number, numbers in enumerate(slots):
                    batch = self.split.gather(torch.tensor(numbers))
                    self.calls += 1
                    batch["inputs"] = batch["inputs"] + 0.1 * self.noisy * self.calls
                    parts.append(Slot(number, len(numbers), batch))
                yield GlobalBatch(sum(map(len, slots)), parts)
        finally:
            self.closed += 1


def numbers(first, count=32):
    return list(range(first, first + count))


def judged(subject, batches, **options):
    subject.loader = Stand(subject, batches, **options)
    return find(check_batches, subject, "batches")


def test_different_batches_pass_and_the_loader_is_closed(make):
    subject = make()
    endless = [[numbers(place), numbers(place + 32)] for place in range(0, 1900, 64)]
    subject.loader = loader = Stand(subject, endless)
    kept = []  # else the interpreter would close them by itself
    subject.loader = SimpleNamespace(batches=lambda *place: kept.append(loader.batches(*place)) or kept[-1])
    assert find(check_batches, subject, "batches").status == "pass"
    assert loader.closed == len(kept) == 2  # read twice


def test_the_same_batch_again_fails(make):
    found = judged(make(), [[numbers(0)], [numbers(0)[::-1]]])  # in another order
    assert found.status == "fail" and found.values["shared"] == 1
    assert "slot 0 of batch 0 on process 0 and slot 0 of batch 1" in found.measured
    assert "does not move on" in found.causes[0]


def test_the_same_samples_in_two_slots_fail(make):
    found = judged(make(), [[numbers(0), numbers(0)], [numbers(64), numbers(96)]])
    assert found.status == "fail" and "forward passes of one step" in found.causes[0]


@pytest.mark.parametrize(("shared", "status"), [(0, "pass"), (12, "pass"), (20, "fail")])
def test_more_than_half_of_a_slot_shared_fails(make, shared, status):
    assert judged(make(), [[numbers(0)], [numbers(32 - shared)]]).status == status


def test_fillers_do_not_count(make):
    subject = make()
    subject.loader = SimpleNamespace(batches=lambda epoch, start: iter([
        GlobalBatch(32, [Slot(0, 32, subject.task.splits["train"].gather(torch.arange(32)))]),
        GlobalBatch(4, [
            Slot(0, 4, subject.task.splits["train"].gather(torch.tensor([40, 41, 42, 43, *range(28)]))),
            Slot(1, 0, subject.task.splits["train"].gather(torch.tensor([0]))),
        ]),
    ]))  # fmt: skip
    found = find(check_batches, subject, "batches")
    assert found.status == "pass" and found.values["slots"] == 2


def test_samples_that_are_equal_by_nature_are_no_alarm(make, texts):
    subject = make(texts / "table.csv", batch_size=256)  # of 125 different samples
    found = find(check_batches, subject, "batches")
    assert found.status == "skip" and "by nature" in found.measured
    some = plant(make(), "train", noise(1800, 2)[torch.arange(2000) % 1800])
    assert judged(some, [[numbers(0)], [numbers(64)]]).status == "pass"
    assert judged(some, [[numbers(0)], [numbers(0)]]).status == "fail"
    kinds = torch.randint(40, (2000,), generator=torch.Generator().manual_seed(0))
    found = judged(plant(make(), "train", noise(40, 2)[kinds]), [[numbers(0, 48)], [numbers(48, 48)]])
    assert found.status == "pass" and found.values["shared"] > 0.6, found
    few = plant(make(), "train", noise(5, 2)[kinds % 5])
    assert judged(few, [[[0], [1]], [[5], [6]]]).status == "skip"  # slots too small to hold a sample twice


def test_a_single_batch_says_nothing(make):
    assert judged(make(), [[numbers(0)]]).status == "skip"
    assert judged(make(), []).status == "skip"


def test_batches_that_come_otherwise_when_read_again_fail(make):
    batches = [[numbers(0)], [numbers(32)]]
    found = judged(make(), batches, noisy=True)
    assert found.status == "fail" and "read again" in found.measured
    assert judged(with_settings(make(), preflight="quick"), batches, noisy=True).status == "pass"


def test_loader_processes_are_left_to_full(make):
    subject = with_settings(make(), preflight="quick", num_workers=2)
    assert find(check_batches, subject, "batches").status == "skip"


@pytest.mark.parametrize(("batches", "workers", "least"), [(400, 0, 2), (400, 2, 6), (400, 1, 32)])
def test_full_reads_what_all_loader_processes_bring(make, batches, workers, least):
    subject = with_settings(make(), num_workers=workers)
    found = judged(subject, [[numbers(place, 5)] for place in range(0, 5 * batches, 5)])
    assert found.status == "pass"
    assert found.values["slots"] >= least
    assert workers or found.values["slots"] == 2
    assert not workers or found.values["slots"] >= min(batches, 1024 * workers // 5)


class Two(Runtime):
    """Two processes, of which the other one has what `change` makes of this one's tensors."""

    num_processes = 2

    def __init__(self, runtime, change):
        super().__init__(runtime.accelerator, runtime.control)
        self.change = change

    def gather(self, values):
        return [values, self.change(values.clone())]


def test_processes_with_the_same_samples_fail(make):
    subject = make()
    subject.runtime = Two(subject.runtime, lambda values: values)
    found = judged(subject, [[numbers(0)], [numbers(32)]])
    assert found.status == "fail" and "on process 1" in found.measured
    assert "rank and num_processes" in found.causes[0]


def test_processes_with_samples_of_their_own_pass(make):
    subject = make()

    def shift(values):
        if values.ndim == 2:
            values[:, 2] += 1
        return values

    subject.runtime = Two(subject.runtime, shift)
    found = judged(subject, [[numbers(0)], [numbers(32)]])
    assert found.status == "pass" and "4 slots of 2 batches on 2 process(es)" in found.measured


def test_a_loader_that_breaks_on_one_process_is_told_to_all(make):
    subject = make()
    subject.runtime = Two(subject.runtime, lambda values: values * torch.tensor([1, 1, 0]))
    with pytest.raises(TrainingError, match="process 1 cannot read its batches"):
        judged(subject, [[numbers(0)], [numbers(32)]])
    subject = make()
    told = []
    subject.runtime = Two(subject.runtime, lambda values: told.append(values) or values)
    with pytest.raises(IndexError):  # its own error, after the others have been told
        judged(subject, [[numbers(5000)]])
    assert told[0].tolist() == [0, 1, 0]


# ---- augmentation ----


def test_no_augmentation_no_finding(make):
    assert examine(make(), check_augmentation) == []


def augmented(make, load):
    subject = make("digits", augment=AUGMENT)
    task_load = subject.task.load
    subject.task = dataclasses.replace(subject.task, load=lambda *arguments: load(task_load, *arguments))
    return find(check_augmentation, subject, "augmentation")


def test_augmentation_is_looked_at(make):
    found = find(check_augmentation, make("digits", augment=AUGMENT), "augmentation")
    assert found.status == "pass" and found.values["changed"] == found.values["changed_in_next_epoch"] == 16


def test_the_same_augmentation_in_each_epoch_fails(make):
    found = augmented(make, lambda load, split, indices, epoch: load(split, indices, epoch and 0))
    assert found.status == "fail" and "let the epoch enter" in found.causes[0]


def test_augmentation_that_cannot_be_repeated_fails(make):
    calls = iter(range(100))
    found = augmented(
        make, lambda load, split, indices, epoch: load(split, indices, None if epoch is None else next(calls))
    )
    assert found.status == "fail" and "resumed exactly" in found.causes[0]


def test_rare_flips_are_no_alarm(make):
    """Small batches, and a change that half of the samples see: some of 16 do."""
    for seed in range(20):
        subject = with_settings(make("digits", augment=("flip",), batch_size=2), seed=seed)
        assert find(check_augmentation, subject, "augmentation").status == "pass"


def test_an_error_of_any_kind_reaches_all_processes(make):
    subject = make()

    def broken(*_):
        raise IndexError("no such sample")

    subject.task = dataclasses.replace(subject.task, load=broken)
    with pytest.raises(TrainingError, match="IndexError: no such sample"):
        list(check_inputs(subject))
