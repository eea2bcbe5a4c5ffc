"""Images, text, tables, points and streams: killed and restarted, and on other numbers of processes, the same run."""

import csv
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from data_modules.load import restore_preprocessing
from data_modules.options import DataOptions
from data_modules.source import open_source

STEPS = 10
SETTINGS = ["--batch_size", 24, "--max_train_steps", STEPS, "--num_train_epochs", 9, "--log_every", 1]
SETTINGS += ["--checkpoint_every", 3, "--slots", 2, "--validation_fraction", 0.2]


WORDS = ["the", "a", "film", "was", "it", "story", "plot", "actor", "scene", "and"]


def write_images(folder):
    noise = np.random.default_rng(0)
    for number in range(100):
        path = folder / "train" / f"class{number % 4}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (14, 12, 3), dtype=np.uint8)).save(path)
    return folder


def write_text(folder):
    chance = random.Random(0)
    with open(folder / "reviews.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["review", "label"])
        for number in range(100):
            words = chance.choices(WORDS, k=chance.randint(3, 40))
            words.insert(chance.randrange(len(words)), ["good", "bad"][number % 2])
            lines.writerow([" ".join(words), ["pos", "neg"][number % 2]])
    return folder / "reviews.csv"


def write_table(folder):
    chance = random.Random(0)
    with open(folder / "people.tsv", "w", newline="") as file:
        lines = csv.writer(file, delimiter="\t")
        lines.writerow(["age", "city", "income", "target"])
        for number in range(100):
            age = chance.choice([chance.randint(18, 80), ""])
            city = chance.choice(["Rome", "Oslo", "NA"])
            lines.writerow([age, city, chance.gauss(100, 20), ["no", "yes", "perhaps"][number % 3]])
    return folder / "people.tsv"


def write_points(folder):
    numbers = np.random.default_rng(0)
    for split, count in (("train", 90), ("validation", 20)):
        points = pa.array(numbers.normal(size=(count, 3)).tolist())
        pq.write_table(pa.table({"point": points, "label": numbers.integers(0, 2, count)}), folder / f"{split}.parquet")
    return folder


def write_stream(folder):
    """Parquet files of images, in two shards and small groups of rows, to be read as a stream."""
    numbers = np.random.default_rng(0)

    def table(count):
        pixels = [numbers.integers(0, 256, (9, 9), dtype=np.uint8) for _ in range(count)]
        encoded = []
        for image in pixels:
            path = folder / "image.png"
            Image.fromarray(image).save(path)
            encoded.append({"bytes": path.read_bytes(), "path": None})
        path.unlink()
        return pa.table({"image": encoded, "label": numbers.integers(0, 3, count)})

    for number, count in enumerate((50, 40)):
        pq.write_table(table(count), folder / f"train-{number}.parquet", row_group_size=16)
    pq.write_table(table(30), folder / "test.parquet")
    return folder


AUGMENT = ["--augment", "crop:2", "flip", "rotate:10", "scale:0.1", "cutout:3", "mixup:0.4"]
CASES = {
    "images": (write_images, AUGMENT),
    "text": (write_text, ["--max_length", 24]),
    "table": (write_table, ["--class_balance", "sampler"]),
    "points": (write_points, ["--class_balance", "weights"]),
    "stream": (write_stream, ["--streaming", "--validation_split", "test", "--augment", "crop:2", "mixup:0.4"]),
}


SMALL_BLOCKS = ("set_attribute", "data_modules.stream", "BLOCK", 48)


@pytest.fixture(params=CASES)
def settings(request, classify):
    """The settings of a run on data of each kind."""
    write, more = CASES[request.param]
    folder = classify.folder / "data"
    folder.mkdir()
    return [*SETTINGS, "--dataset", write(folder), *more]


def losses(classify, name):
    return [line["train/loss"] for line in classify.metrics(name)]


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_run_equals_a_straight_one(classify, settings, processes):
    classify.run("straight", *settings, processes=processes, faults=[SMALL_BLOCKS])
    for step in (5, 8):
        faults = [SMALL_BLOCKS, ("die_after", step)]
        finished = classify.start("killed", *settings, processes=processes, faults=faults).wait()
        assert -9 in finished.codes, finished.output
    assert "resuming" in classify.run("killed", *settings, processes=processes, faults=[SMALL_BLOCKS]).output
    classify.assert_same("straight", "killed", STEPS)


def test_number_of_processes_changes_no_sample(classify, settings):
    for processes in (1, 2):
        classify.run(f"on{processes}", *settings, processes=processes, faults=[SMALL_BLOCKS])
    assert losses(classify, "on1") == pytest.approx(losses(classify, "on2"), abs=1e-6)
    one, two = (load(classify.file(name, STEPS)) for name in ("on1", "on2"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    assert len(set(losses(classify, "on1"))) == STEPS


def test_loader_processes_change_no_bit(classify):
    data = write_images(classify.folder / "data")
    for workers in (0, 1):
        settings = [*SETTINGS, "--dataset", data, *AUGMENT, "--num_workers", workers]
        classify.run(f"with{workers}", *settings)
    classify.assert_same("with0", "with1", STEPS)


def test_processes_that_do_not_divide_the_slots_see_the_same_augmentation(classify):
    """Samples and augmentation depend on no slot; without dropout the losses are equal."""
    settings = [*SETTINGS, "--dataset", write_images(classify.folder / "data"), *AUGMENT]
    classify.start("moving", *settings, faults=[("die_after", 5)]).wait()
    classify.run("moving", *settings, "--slots", 3, "--allow_changes", "slots", processes=3)
    classify.run("still", *settings)
    assert losses(classify, "moving") == pytest.approx(losses(classify, "still"), abs=1e-5)


def test_the_run_keeps_what_it_takes_to_treat_a_new_sample_alike(classify):
    for name in ("text", "table"):
        write, more = CASES[name]
        folder = classify.folder / name
        folder.mkdir(parents=True)
        classify.run(name, *SETTINGS, "--dataset", write(folder / "."), *more)
        described = json.loads((classify.folder / name / "preprocessing.json").read_text())
        restored = restore_preprocessing(described)
        new = open_source(DataOptions(dataset=str(write(folder / "."))))["train"]
        batch = restored.encode(new).gather(torch.arange(len(new)))
        assert all(len(tensor) == 100 for tensor in batch.values())
        assert (classify.folder / name / "data.txt").read_text().count("\n") > 3


def test_bad_samples_are_left_out_and_listed_in_the_run(classify):
    data = write_images(classify.folder / "data")
    (data / "train" / "class1" / "1.png").write_bytes(b"no image")
    (data / "train" / "class2" / "2.png").write_bytes((data / "train" / "class2" / "6.png").read_bytes()[:60])
    refused = classify.start("refused", *SETTINGS, "--dataset", data).wait()
    assert refused.codes == [2]
    assert "1.png" in refused.output and "--on_bad_sample skip" in refused.output
    assert not (classify.folder / "refused").exists()
    skipping = [*SETTINGS, "--dataset", data, "--on_bad_sample", "skip"]
    assert "left out 2 bad" in classify.run("skipped", *skipping, pictures=True).output
    listed = (classify.folder / "skipped" / "skipped_samples.txt").read_text()
    assert "1.png" in listed and "2.png" in listed and listed.count("\n") == 2
    assert (classify.folder / "skipped" / "plots" / "first_batch.png").read_bytes()[:4] == b"\x89PNG"


def test_a_bad_image_of_a_stream_is_replaced_by_the_next(classify):
    """The number of samples stays what it is, and so does the position in the stream."""
    folder = classify.folder / "data"
    folder.mkdir()
    write_stream(folder)
    table = pq.read_table(folder / "train-1.parquet").to_pylist()
    table[7]["image"]["bytes"] = b"no image"
    pq.write_table(pa.Table.from_pylist(table), folder / "train-1.parquet")
    settings = [*SETTINGS, "--dataset", folder, *CASES["stream"][1]]
    refused = classify.start("refused", *settings, faults=[SMALL_BLOCKS]).wait()
    assert refused.codes == [2]
    assert "train-1.parquet, row 7" in refused.output
    settings += ["--on_bad_sample", "skip"]
    classify.run("straight", *settings, faults=[SMALL_BLOCKS])
    classify.start("killed", *settings, faults=[SMALL_BLOCKS, ("die_after", 6)]).wait()
    classify.run("killed", *settings, faults=[SMALL_BLOCKS])
    classify.assert_same("straight", "killed", STEPS)


def test_balanced_classes_reach_the_loss(classify):
    """A class of 10 in 100: with weights or draws its share of the first losses changes."""
    folder = classify.folder / "data"
    folder.mkdir()
    numbers = torch.Generator().manual_seed(0)
    points = torch.randn(200, 2, generator=numbers)
    labels = [int(number % 10 == 0) for number in range(200)]
    pq.write_table(pa.table({"point": points.tolist(), "label": labels}), folder / "points.parquet")
    for balance in ("none", "weights", "sampler"):
        finished = classify.run(balance, *SETTINGS, "--dataset", folder / "points.parquet", "--class_balance", balance)
        assert "the largest class has 9 times" not in finished.output
    assert len({losses(classify, balance)[-1] for balance in ("none", "weights", "sampler")}) == 3
