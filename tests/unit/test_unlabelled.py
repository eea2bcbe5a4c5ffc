"""Images whose labels do not matter: what is accepted, what is refused, and that classification stays as it is."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_modules import cache, stream
from data_modules.augmentation import parse_augmentation
from data_modules.decoding import EncodedImages
from data_modules.errors import DataError
from data_modules.load import _cut_validation, load_data, restore_preprocessing
from data_modules.look import look_at_data
from data_modules.options import DataOptions
from data_modules.rows import Rows
from data_modules.splits import InputSpec, scale_only
from data_modules.training_loader import build_training_loader
from tests.sources import (
    COLOUR,
    HEIGHT,
    LABELS,
    WIDTH,
    encode,
    everything,
    images,
    numbers,
    pixels,
    refusal,
    write,
    write_tree,
)
from tests.sources import load as load_labelled

CPU = torch.device("cpu")


def load(source, **options):
    return load_data(DataOptions(dataset=str(source), **options), labelled=False)


def refused(source, **options):
    """Return what is said, on one line, when the data set is refused."""
    with pytest.raises(DataError) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def place_images(folder, names, encoded=COLOUR):
    """Write an image to each path."""
    for name, content in zip(names, encoded):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def which(data):
    """Return which of `COLOUR` each split holds, sorted."""
    return {name: sorted(numbers(split)) for name, split in data.splits().items()}


def all_numbers(data):
    """Return which of `COLOUR` all splits hold together, sorted."""
    return sorted(number for held in which(data).values() for number in held)


def loader_of(data, augment=(), batch_size=8):
    return build_training_loader(
        data, batch_size=batch_size, num_slots=1, rank=0, num_processes=1, device=CPU, num_workers=0, seed=3,
        augmentation=parse_augmentation(augment), balanced=False, place=None, remember=lambda place: None,
    )  # fmt: skip


def batches_of(data, augment=(), epoch=0):
    """Return the real samples of all batches of an epoch."""
    slots = [slot for batch in loader_of(data, augment).batches(epoch, 0) for slot in batch.slots]
    return [{name: tensor[: slot.count] for name, tensor in slot.batch.items()} for slot in slots]


NAMES = [f"{number:02}.png" for number in range(20)]


# ---- what is accepted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        NAMES,
        [f"{'cat' if number % 2 else 'dog'}/{name}" for number, name in enumerate(NAMES)],
        [f"only/{name}" for name in NAMES],
        [f"{'a/' * (number % 4)}{name}" for number, name in enumerate(NAMES)],
        [f"train/{'cat/' * (number % 2)}{name}" for number, name in enumerate(NAMES)],
    ],
    ids=["flat", "classes", "one class", "any depth", "only a folder train"],
)
@pytest.mark.parametrize("described", [False, True])
def test_a_folder_of_images_with_any_folders_or_none(tmp_path, names, described):
    folder = place_images(tmp_path / "pictures", names)
    if described:
        (folder / "README.md").write_text("words")
    data = load(folder)
    held = which(data)
    assert sorted(held["train"] + held["validation"]) == list(range(20))
    assert (len(held["train"]), len(held["validation"])) == (18, 2)
    assert data.test is None and data.inputs == InputSpec("image", (3, HEIGHT, WIDTH))
    assert data.class_names == []
    assert everything(data.train)["labels"].tolist() == [0] * 18
    assert data.train.labels.dtype == torch.int64
    assert data.notes[:2] == [
        "task image: image to itself; labels do not matter",
        "no validation split: 2 of 20 training samples, chosen at random, were cut",
    ]


@pytest.mark.parametrize("inside", ["", "cat/", "some/where/"])
@pytest.mark.parametrize("validation", ["validation", "val", "Valid"])
def test_folders_of_splits_without_classes(tmp_path, inside, validation):
    places = ["train/" + inside, "train/", f"{validation}/{inside}", f"{validation}/", f"test/{inside}", "test/"]
    folder = place_images(tmp_path / "pictures", [f"{places[number % 6]}{NAMES[number]}" for number in range(18)])
    data = load(folder)
    assert which(data) == {
        part: [number for number in range(18) if number % 6 // 2 == place]
        for place, part in enumerate(("train", "validation", "test"))
    }
    assert not any("no validation split" in note for note in data.notes)
    assert all(split.labels.tolist() == [0] * 6 for split in data.splits().values())


def test_a_column_of_images_with_labels_or_without(tmp_path):
    """Whatever the labels are: missing, of one class, one of a kind, or of no meaning at all."""
    prints = set()
    for name, labels, kind in [
        ("two", LABELS, "int64"),
        ("one", [0] * 20, "int64"),
        ("missing", [None] * 20, "string"),
        ("keys", list(range(20)), "int64"),
        ("broken", [0.5, float("nan")] * 10, "float32"),
        ("named", LABELS, ["cat", "dog"]),
        ("below", [-1, 7] * 10, "int64"),
    ]:
        data = load(write(tmp_path / f"{name}.parquet", labels=labels, kind=kind))
        assert data.class_names == [] and data.skipped == []
        assert all_numbers(data) == list(range(20))
        prints.add(data.fingerprint)
    alone = datasets.Dataset.from_dict({"picture": [{"bytes": content, "path": None} for content in COLOUR]})
    alone = alone.cast_column("picture", datasets.Image())
    alone.save_to_disk(str(tmp_path / "saved"))
    alone.to_parquet(str(tmp_path / "alone.parquet"))
    for source in (tmp_path / "saved", tmp_path / "alone.parquet"):
        data = load(source)
        assert data.notes[0] == "task image: picture to itself; labels do not matter"
        prints.add(data.fingerprint)
    assert len(prints) == 1


def test_lines_of_json_with_files_of_images(tmp_path):
    place_images(tmp_path, NAMES)
    cells = [
        {"image": {"bytes": None, "path": str(tmp_path / name)}, "caption": "a long line of words"} for name in NAMES
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    assert all_numbers(load(path)) == list(range(20))


def test_images_beside_columns_of_any_kind(tmp_path):
    """Text beside images is no question, nor are several columns that might be labels."""
    more = {"text": ["words of some length here"] * 20, "label": LABELS, "target": LABELS, "points": [[1.0, 2.0]] * 20}
    data = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": None} for content in COLOUR], **more})
    data.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "a.parquet"))
    assert load(tmp_path / "a.parquet").notes[0].startswith("task image: image to itself")


def test_one_of_several_columns_of_images(tmp_path):
    cells = [{"bytes": data, "path": None} for data in COLOUR[::-1]]
    path = write(tmp_path / "a.parquet", image2=cells)
    said = f"{path}: reconstruction takes one image column, not image, image2; name one with --input_columns"
    assert refused(path) == refused(path, input_columns=("image", "image2")) == said
    first, other = (load(path, input_columns=(name,)) for name in ("image", "image2"))
    assert numbers(first.validation) == [19 - number for number in numbers(other.validation)]


def test_a_test_split_without_labels_is_used(tmp_path):
    write(tmp_path / "train.parquet")
    write(tmp_path / "test.parquet", COLOUR[:4], [-1] * 4)
    assert load_labelled(tmp_path).test is None
    assert which(load(tmp_path))["test"] == [0, 1, 2, 3]


def test_splits_need_no_label_column_of_the_same_kind(tmp_path):
    write(tmp_path / "train.parquet", labels=[0] * 20)
    write(tmp_path / "val.parquet", COLOUR[:3], labels=[1, 2, 3])
    assert "is none of the 1 classes of the training split" in refusal(tmp_path)
    assert which(load(tmp_path))["validation"] == [0, 1, 2]


def test_the_validation_split_is_cut_at_random_and_always_the_same(tmp_path):
    path = write(tmp_path / "a.parquet")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load(path, validation_fraction=0.3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert load(path, validation_fraction=0.3).describe() == first.describe()
    held = which(first)
    assert len(held["validation"]) == 6 and sorted(held["train"] + held["validation"]) == list(range(20))
    assert held["validation"] not in (list(range(6)), list(range(14, 20)))


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 20), st.floats(0.01, 0.99))
def test_a_cut_leaves_both_parts_with_samples(count, fraction):
    rows = Rows("train", datasets.Dataset.from_dict({"image": list(range(count))}), str)
    options = DataOptions(validation_fraction=fraction)
    labels = torch.zeros(count, dtype=torch.int64)
    train, validation = _cut_validation("made", rows, labels, rows.good(), [], options)
    assert len(train) and len(validation)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(count))


def test_digits_keep_their_parts():
    data, labelled = load("digits"), load_labelled("digits")
    assert data.class_names == [] and data.inputs == labelled.inputs
    for name, split in labelled.splits().items():
        mine = data.splits()[name]
        assert torch.equal(images(mine), images(split))
        assert not mine.labels.any() and len(mine) == len(split)
    assert data.fingerprint != labelled.fingerprint
    prepared = data.prepare(everything(data.train), CPU)["inputs"]
    assert prepared.min() == 0 and prepared.max() == 1
    assert torch.equal(prepared * 16, images(data.train).float())
    assert data.describe_preprocessing()["normalization"] == {"scale": 1 / 16, "mean": (0.0,), "std": (1.0,)}


# ---- pixels ----------------------------------------------------------------------------------------------------------


def test_all_values_of_a_pixel_lie_in_the_unit_interval_exactly():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    scaled = scale_only(1 / 255, 1).apply(values).flatten()
    assert (float(scaled[0]), float(scaled[-1])) == (0.0, 1.0)
    assert (scaled.diff() > 0).all()
    assert torch.allclose(scaled.double() * 255, torch.arange(256).double(), atol=3e-5, rtol=0)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("way", ["cached", "lazy"])
def test_images_are_scaled_and_nothing_else(tmp_path, mode, way, monkeypatch):
    if way == "lazy":
        monkeypatch.setattr(cache, "LARGEST", 0)
    dim = [encode(Image.fromarray(pixels(number, 3) // 4 + 10).convert(mode)) for number in range(20)]
    data = load(write(tmp_path / "a.parquet", dim))
    channels = 1 if mode == "L" else 3
    assert isinstance(data.train.samples, EncodedImages) == (way == "lazy")
    assert vars(data.normalization) == {"scale": 1 / 255, "mean": (0.0,) * channels, "std": (1.0,) * channels}
    batch = everything(data.train)
    assert torch.allclose(data.prepare(dict(batch), CPU)["inputs"], batch["inputs"] / 255, atol=1e-7, rtol=0)


@pytest.mark.parametrize("augment", [(), ("crop:2", "flip"), ("cutout:2",), ("mixup:1.0",)])
def test_batches_stay_in_the_unit_interval(tmp_path, augment):
    data = load(
        write(tmp_path / "a.parquet", [*COLOUR[:18], *[encode(np.full((HEIGHT, WIDTH, 3), 255, np.uint8))] * 2])
    )
    plain, changed = batches_of(data), batches_of(data, augment)
    assert sum(len(batch["inputs"]) for batch in changed) == 18
    for batch in changed:
        assert batch["inputs"].dtype == torch.float32
        assert batch["inputs"].min() >= 0 and batch["inputs"].max() <= 1
        assert not batch["labels"].any()
    same = all(torch.equal(one["inputs"], other["inputs"]) for one, other in zip(plain, changed))
    assert same == (not augment)


def test_interpolation_leaves_the_unit_interval_by_rounding_only(tmp_path):
    white = encode(np.full((32, 32, 3), 255, np.uint8))
    data = load(write(tmp_path / "a.parquet", [white] * 20))
    for batch in batches_of(data, ("rotate:20", "scale:0.2")):
        assert batch["inputs"].min() >= 0 and batch["inputs"].max() <= 1 + 1e-6


def test_sizes_are_treated_as_in_classification(tmp_path):
    names = [f"x/{name}" for name in NAMES]
    folder = place_images(tmp_path / "a", names, [*COLOUR[:7], encode(pixels(0, 3, height=5, width=5)), *COLOUR[8:]])
    said = "the first image 4 x 6; train with --image_size N to scale all to N x N"
    assert refused(folder).endswith(f"07.png is 5 x 5 pixels (height x width), {said}")
    data = load(folder, image_size=4)
    assert data.inputs.shape == (3, 4, 4)
    assert "images are scaled, the shorter side to 4 pixels, and cropped to the centre" in data.notes


def test_bad_images_are_named_or_left_out(tmp_path):
    folder = place_images(tmp_path / "a", NAMES, [*COLOUR[:7], b"no image", *COLOUR[8:]])
    said = refused(folder)
    assert "07.png cannot be decoded (no known image format). Correct or remove it" in said
    data = load(folder, on_bad_sample="skip")
    assert len(data.skipped) == 1 and "07.png" in data.skipped[0]
    assert all_numbers(data) == [number for number in range(20) if number != 7]
    assert data.notes[-1].startswith("left out 1 bad sample(s), first ")


# ---- what a run remembers --------------------------------------------------------------------------------------------


def test_fingerprint_follows_images_and_cut_and_not_labels(tmp_path):
    def fingerprint(name, encoded=COLOUR, labels=LABELS, **options):
        return load(write(tmp_path / f"{name}.parquet", encoded, labels), **options).fingerprint

    first = fingerprint("first")
    assert fingerprint("labels", labels=[1] * 20) == first
    assert fingerprint("pixels", [COLOUR[1], *COLOUR[1:]]) != first
    assert fingerprint("order", COLOUR[::-1]) != first
    assert fingerprint("cut", validation_fraction=0.2) != first
    assert fingerprint("size", image_size=3) != first
    assert load_labelled(tmp_path / "first.parquet").fingerprint != first


def test_classification_has_the_fingerprints_that_checkpoints_hold(tmp_path):
    path = write(tmp_path / "a.parquet")
    load(path)  # both ways share the cache of decoded images
    assert load_labelled(path).fingerprint == "455777365b8d375b317a84bef6d4f46d"
    assert load_labelled(write_tree(tmp_path / "tree")).fingerprint == "0f1fa97f639da6c64bc6acf55edc7ae5"
    assert load_labelled("digits").fingerprint == "de436fb1852ca2bd31c08143e676083a"
    data = load_labelled(path)
    assert data.normalization.mean != (0.0, 0.0, 0.0) and data.class_names == ["0", "1"]
    assert "no validation split: 2 of 20 training samples, equal class shares, were cut" in data.notes


def test_description_and_preprocessing_are_plain_and_can_be_made_again(tmp_path):
    data = load(write(tmp_path / "a.parquet"))
    described = json.loads(json.dumps(data.describe(), allow_nan=False))
    assert described["samples"] == {"train": 18, "validation": 2} and described["class_names"] == []
    assert described["inputs"]["task"] == "image"
    kept = json.loads(json.dumps(data.describe_preprocessing(), allow_nan=False))
    assert kept["normalization"] == {"scale": 1 / 255, "mean": [0.0] * 3, "std": [1.0] * 3}
    again = restore_preprocessing(kept)
    new = Rows("new", datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"))["train"], str)
    assert torch.equal(again.encode(new).images_NCHW, data.train.samples.images_NCHW)


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_a_stream_of_images(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 8)
    source = tmp_path / "data"
    if kind == "parquet":
        write(source / "train.parquet", labels=[None, 3] * 10)
        write(source / "validation.parquet", COLOUR[:4], [5] * 4)
    else:
        place_images(source, [f"train/{name}" for name in NAMES])
        place_images(source, [f"validation/{name}" for name in NAMES[:4]])
    data = load(source, streaming=True)
    assert data.stream.num_samples == 20 and len(data.validation) == 4
    seen = batches_of(data)
    stored = torch.cat([batch["inputs"] for batch in seen]).mul(255).round().byte()
    known = {pixels(number, 3).tobytes(): number for number in range(20)}
    assert sorted(known[image.permute(1, 2, 0).numpy().tobytes()] for image in stored) == list(range(20))
    assert not torch.cat([batch["labels"] for batch in seen]).any()
    assert all(batch["inputs"].max() <= 1 and batch["inputs"].min() >= 0 for batch in seen)


def test_nothing_is_cut_from_a_stream(tmp_path):
    assert "no validation split, and none is cut" in refused(write(tmp_path / "a.parquet"), streaming=True)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "held"),
    [
        ("reviews.csv", "text,label\n" + "a film of some length,1\nanother film of course,0\n" * 9, "text"),
        ("sizes.csv", "size,label\n" + "1,x\n2,y\n" * 9, "a table"),
        ("paths.csv", "image,label\n" + "a.png,x\nb.png,y\n" * 9, "a table"),
        ("numbers.jsonl", '{"place": [0.5, 1.5], "label": 1}\n' * 9, "lists of numbers"),
        ("blobs", None, "lists of numbers"),
        ("wine", None, "a table"),
        ("breast_cancer", None, "a table"),
    ],
)
def test_what_is_not_images(tmp_path, name, text, held):
    source = name
    if text is not None:
        source = tmp_path / name
        Path(source).write_text(text)
    assert refused(source) == (
        f"{source}: holds {held}; reconstruction needs images. Give digits, a folder of images, or files or a hub id "
        "with a column of images"
    )


@pytest.mark.parametrize("dataset", ["digits", "file"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"label_column": "label"}, "--label_column: reconstruction uses no labels; leave it out"),
        (
            {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3},
            "--image_mean: reconstruction needs pixels in [0, 1]; leave it out",
        ),
        ({"image_std": (0.5,)}, "--image_std: reconstruction needs pixels in [0, 1]; leave it out"),
        ({"task": "text"}, "--task text: reconstruction needs images; leave it out"),
        ({"task": "table"}, "--task table: reconstruction needs images; leave it out"),
    ],
)
def test_what_means_nothing_in_reconstruction(tmp_path, dataset, given, said):
    source = "digits" if dataset == "digits" else write(tmp_path / "a.parquet")
    assert refused(source, **given) == said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"categorical_columns": ("label",)}, "--categorical_columns: is for table"),
        ({"tokenizer": "words"}, "--tokenizer: is for text"),
        ({"max_length": 9}, "--max_length: is for text"),
        ({"input_columns": ("picture",)}, "has no column 'picture'; its columns are image, label"),
        ({"input_columns": ("label",)}, "column 'label' holds no images; name another with --input_columns"),
        ({"validation_split": "dev"}, "has no split 'dev', only train"),
    ],
)
def test_what_is_refused_as_in_classification(tmp_path, given, said):
    path = write(tmp_path / "a.parquet")
    assert said in refused(path, **given)
    assert load(path, task="image").class_names == []


def test_digits_are_as_they_are():
    assert "--image_size: is for files and hub ids, and digits is embedded" in refused("digits", image_size=8)


def test_too_few_images(tmp_path):
    folder = place_images(tmp_path / "a", NAMES[:1])
    said = "the training split has one image, and it takes two to cut a validation split from it; add images, or name"
    assert f"{folder}: {said} one with --validation_split" == refused(folder) == refused(folder, on_bad_sample="skip")
    assert {name: len(split) for name, split in load(place_images(folder, NAMES[:2])).splits().items()} == {
        "train": 1,
        "validation": 1,
    }
    place_images(folder, NAMES[:2], [COLOUR[0], b""])
    assert "no usable sample left for" in refused(folder, on_bad_sample="skip")
    folder = place_images(tmp_path / "b", ["train/a.png", "validation/b.png"])
    assert len(load(folder).train) == 1


def test_folders_without_images(tmp_path):
    assert "the folder holds no file. Embedded: digits" in refused(tmp_path)
    (tmp_path / "notes.txt").write_text("words")
    assert "the folder holds files of the kinds .txt. Embedded: digits" in refused(tmp_path)


def test_classification_still_asks_for_labels(tmp_path):
    assert "has no labels; in a folder of images, each class is a folder" in refusal(
        place_images(tmp_path / "a", NAMES)
    )


# ---- the look before a run -------------------------------------------------------------------------------------------


def test_the_look_tells_no_labels(tmp_path, capsys):
    path = write(tmp_path / "a.parquet", labels=[0] * 19 + [1])
    data = load(path)
    look_at_data(data, loader_of(data, batch_size=16), tmp_path)
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines()] == ["first batch, inputs"]
    assert "float32 [16, 3, 4, 6], min 0" in printed
    assert (tmp_path / "data.txt").read_text() == "\n".join([*data.notes, printed.strip(), ""])
    assert not any(word in printed for word in ("class", "warning"))


def read_picture(path):
    return np.asarray(Image.open(path / "plots" / "first_batch.png").convert("RGB")).astype(int)


def test_the_picture_shows_images_and_no_text(tmp_path):
    mid = [encode(np.full((8, 8, 3), 10 * number + 20, np.uint8)) for number in range(20)]
    path = write(tmp_path / "a.parquet", mid)
    data = load(path)
    look_at_data(data, loader_of(data, batch_size=16), tmp_path)
    picture = read_picture(tmp_path)
    assert picture.shape == (2 * 70, 8 * 72, 3)
    values, counts = np.unique(picture[..., 0], return_counts=True)
    shown = dict(zip(values.tolist(), counts.tolist()))
    assert 0 not in shown, "black is the colour of text"
    in_batch = next(loader_of(data, batch_size=16).batches(0, 0)).slots[0].batch["inputs"][:, 0, 0, 0].mul(255).round()
    assert shown.pop(255) == picture[..., 0].size - 16 * 64 * 64
    assert shown == dict.fromkeys(sorted(in_batch.int().tolist()), 64 * 64)


def test_the_picture_of_classes_shows_their_names_as_before(tmp_path, capsys):
    mid = [encode(np.full((8, 8, 3), 10 * number + 20, np.uint8)) for number in range(20)]
    data = load_labelled(write(tmp_path / "a.parquet", mid))
    look_at_data(data, loader_of(data, batch_size=16), tmp_path)
    assert "\nclasses: 0 9, 1 9\n" in capsys.readouterr().out
    picture = read_picture(tmp_path)
    assert picture.shape == (2 * 84, 8 * 72, 3)
    assert (picture[:18] < 20).any() and (picture[18:82, 4:68] == picture[18, 4]).all()
