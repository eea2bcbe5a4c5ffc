"""From the settings to splits with samples and labels: what is chosen, cut, left out and said."""

import json

import datasets
import pyarrow.parquet as pq
import pytest
import torch

from data_modules import load as front
from data_modules.errors import DataError
from data_modules.options import DataOptions
from data_modules.rows import Rows
from tests.sources import COLOUR, LABELS, encode, everything, load, numbers, pixels, refusal, write, write_tree

TABLE = "size,label\n" + "".join(f"{number},{'xy'[number % 2]}\n" for number in range(20))


def write_csv(path, text=TABLE):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder of CSV files with a training and a test split."""
    write_csv(tmp_path / "data" / "train.csv")
    write_csv(tmp_path / "data" / "test.csv", "size,label\n1,x\n2,y\n3,x\n")
    return tmp_path / "data"


@pytest.fixture
def file(tmp_path):
    """A CSV file."""
    return write_csv(tmp_path / "a.csv")


def sizes(data):
    return {name: len(split) for name, split in data.splits().items()}


# ---- which split is what ---------------------------------------------------------------------------------------------


def test_validation_is_cut_from_training_without_loss(file):
    data = load(file, validation_fraction=0.3)
    assert sizes(data) == {"train": 14, "validation": 6}
    assert torch.bincount(data.validation.labels).tolist() == [3, 3]
    rows = torch.cat([data.train.rows, data.validation.rows])
    assert sorted(rows.tolist()) == list(range(20))
    assert all(split.labels.tolist() == [row % 2 for row in split.rows.tolist()] for split in data.splits().values())
    assert "no validation split: 6 of 20 training samples, equal class shares, were cut" in data.notes
    assert torch.equal(load(file, validation_fraction=0.3).validation.rows, data.validation.rows)


@pytest.mark.parametrize("name", ["validation", "valid", "val"])
def test_a_split_named_for_validation_is_used(tmp_path, name):
    one = datasets.Dataset.from_dict({"size": list(range(20)), "label": LABELS})
    other = datasets.Dataset.from_dict({"size": [1, 2, 3], "label": [0, 0, 1]})
    datasets.DatasetDict({"train": one, name: other}).save_to_disk(str(tmp_path / "d"))
    data = load(tmp_path / "d")
    assert sizes(data) == {"train": 20, "validation": 3} and data.validation.labels.tolist() == [0, 0, 1]
    assert not any("no validation split" in note for note in data.notes)


def test_splits_may_be_chosen_by_name(folder):
    write_csv(folder / "test.csv", TABLE + "1,x\n")
    data = load(folder, train_split="test", validation_split="train", test_split="train")
    assert sizes(data) == {"train": 21, "validation": 20, "test": 20}


def test_the_split_that_is_trained_on_is_not_the_measure_unless_that_is_asked_for(folder):
    write_csv(folder / "val.csv")
    assert sizes(load(folder, train_split="test")) == {"train": 3, "validation": 20}
    assert sizes(load(folder, train_split="validation")) == {"train": 18, "validation": 2, "test": 3}
    assert sizes(load(folder, validation_split="test")) == {"train": 20, "validation": 3}
    assert sizes(load(folder, train_split="validation", test_split="validation"))["test"] == 20


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_no_such_split(file, part):
    said = f"{file}: has no split 'dev', only train; name one with --{part}_split"
    assert refusal(file, **{f"{part}_split": "dev"}) == said


@pytest.mark.parametrize("values", ["-1", "", "column"])
def test_a_test_split_without_labels_is_left_out_and_noted(folder, values):
    write_csv(folder / "train.csv", TABLE.replace("x", "0").replace("y", "1"))
    lines = ["size,label", *[f"{number},{values}" for number in range(4)]]
    write_csv(folder / "test.csv", "size\n1\n2\n" if values == "column" else "\n".join(lines))
    data = load(folder)
    assert data.test is None
    assert "split 'test' has no labels and is not used" in data.notes
    assert "test.csv, line 2" in refusal(folder, test_split="test") or values == "column"
    if values == "column":
        assert f"{folder}: split 'test' has no column 'label'; its columns are size." in refusal(
            folder, test_split="test"
        )


def test_every_split_needs_the_label_column(folder):
    write_csv(folder / "val.csv", "size,lable\n1,x\n")
    assert refusal(folder) == (
        f"{folder}: split 'validation' has no column 'label'; its columns are size, lable. Name the label with "
        "--label_column"
    )


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_split_needs_the_input_columns(folder, split):
    write_csv(folder / "val.csv")
    write_csv(folder / f"{split}.csv", "label,other\nx,1\ny,2\n")
    assert "no column 'size'" in refusal(folder, input_columns=("size",))


# ---- what cannot be trained on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_split_without_rows(folder, split):
    write_csv(folder / "validation.csv")
    write_csv(folder / f"{split}.csv", "size,label\n")
    assert refusal(folder) == f"{folder}: split {split!r} has no rows; fill it or remove it"


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_parquet_split_without_rows(tmp_path, split):
    for name in ("train", "validation", "test"):
        write(tmp_path / f"{name}.parquet")
    pq.ParquetWriter(tmp_path / f"{split}.parquet", pq.read_schema(tmp_path / f"{split}.parquet")).close()
    said = f"split {split!r} has no rows; fill it or remove it"
    assert refusal(tmp_path).replace('"', "'") == f"{tmp_path}: {said}"


def test_file_with_an_empty_group_of_rows(tmp_path):
    path = write(tmp_path / "a.parquet", [], [])
    assert "has no rows; fill it or remove it" in refusal(path)


def test_split_without_rows_from_a_source_that_allows_it(monkeypatch):
    empty = Rows("train", datasets.Dataset.from_dict({"image": [], "label": []}), str)
    monkeypatch.setattr(front, "open_source", lambda options: {"train": empty})
    assert refusal("made") == "made: split 'train' has no rows; fill it or remove it"


@pytest.mark.parametrize(("label", "kind", "name"), [(1, "int64", "1"), ("cat", "string", "cat"), (0, ["a", "b"], "a")])
def test_one_class_only(tmp_path, label, kind, name):
    message = refusal(write(tmp_path / "a.parquet", labels=[label] * 20, kind=kind))
    assert f"the training split has one class only ({name!r} in column 'label'); a classifier needs two" in message


def test_a_class_of_one_sample_where_validation_is_cut(tmp_path):
    path = write_csv(tmp_path / "data" / "a.csv", TABLE + "20,z\n")
    said = f"{path}, line 22: class 'z' has this one sample only, to train and to validate on"
    assert refusal(path).startswith(f"{said}. Correct or remove it")
    data = load(path, on_bad_sample="skip")
    assert data.skipped == [said] and sum(sizes(data).values()) == 20
    assert "1 of 3 classes have no training sample, first 'z'" in data.notes
    # With a validation split of its own, such a class is no problem.
    write_csv(tmp_path / "data" / "b_val.csv")
    assert sizes(load(tmp_path / "data")) == {"train": 21, "validation": 20}


def test_too_few_samples_to_cut_a_validation_split(tmp_path):
    path = write_csv(tmp_path / "a.csv", "size,label\n1,x\n2,y\n")
    assert f"{path}, line 2: class 'x' has this one sample only" in refusal(path)
    message = refusal(path, on_bad_sample="skip")
    assert "no class has the two samples" in message and "--validation_split" in message
    path = write_csv(tmp_path / "b.csv", "size,label\n1,x\n2,y\n3,x\n4,x\n")
    assert "one class only ('x'" in refusal(path, on_bad_sample="skip")


def test_columns_mistaken_for_one_another(tmp_path):
    path = write(tmp_path / "a.parquet")
    message = refusal(path, task="image", input_columns=("label",), label_column="image")
    assert message == f"{path}: no image column among label; name it with --input_columns"
    message = refusal(path, task="table", input_columns=("label",), label_column="image")
    assert message.endswith("column 'image' holds no labels; name another with --label_column")


def test_splits_that_do_not_fit_together_say_why(tmp_path):
    write(tmp_path / "train.parquet")
    write(tmp_path / "test.parquet", COLOUR[:2], ["a", "b"], "string")
    message = refusal(tmp_path)
    assert "test.parquet, row 0: label 'a' in column 'label' is none of the 2 classes of the training split" in message


# ---- what is left out ------------------------------------------------------------------------------------------------


def test_all_that_is_left_out_is_counted_and_named(tmp_path):
    folder = tmp_path / "data"
    lines = TABLE.splitlines()
    lines[3], lines[6], lines[8] = "2", "5,", "inf,y"
    write_csv(folder / "train.csv", "\n".join(lines))
    write_csv(folder / "val.csv", "size,label\n1,x\n2,q\n3,y\n")
    data = load(folder, on_bad_sample="skip")
    train, validation = folder / "train.csv", folder / "val.csv"
    assert [text.split(": ")[0] for text in data.skipped] == [
        f"{train}, line 4",
        f"{train}, line 7",
        f"{train}, line 9",
        f"{validation}, line 3",
    ]
    assert f"left out 4 bad sample(s), first {train}, line 4: has 1 cells, the header has 2" in data.notes
    assert sizes(data) == {"train": 17, "validation": 2}
    # What remains belongs together: the label is that of the size.
    column = data.preprocessing.numbers[0]
    batch = everything(data.train)
    found = (batch["numbers"][:, 0].double() * column.std + column.mean).round().int().tolist()
    assert found == [number for number in range(20) if number not in (2, 5, 7)]
    assert batch["labels"].tolist() == [number % 2 for number in found]
    assert everything(data.validation)["labels"].tolist() == [0, 1]


def test_a_bad_row_of_a_split_that_serves_twice_is_counted_once(folder):
    write_csv(folder / "test.csv", "size,label\n1,x\n2,q\n3,y\n")
    data = load(folder, validation_split="test", test_split="test", on_bad_sample="skip")
    assert len(data.skipped) == 1 and sizes(data) == {"train": 20, "validation": 2, "test": 2}


def test_nothing_bad_nothing_said(file):
    for choice in ("stop", "skip"):
        data = load(file, on_bad_sample=choice)
        assert data.skipped == [] and not any("left out" in note for note in data.notes)


def test_classes_without_a_sample_are_noted(tmp_path):
    data = load(write_csv(tmp_path / "a.csv", "size,label\n" + "1,0\n2,2\n" * 5))
    assert data.class_names == ["0", "1", "2"]
    assert "1 of 3 classes have no training sample, first '1'" in data.notes


# ---- what a run remembers --------------------------------------------------------------------------------------------


def test_loading_shifts_no_randomness_and_depends_on_none(tmp_path, file):
    tree = write_tree(tmp_path / "tree")
    for source in (file, tree):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = load(source)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        assert load(source).describe() == first.describe()


def test_description_is_plain_json(tmp_path, file):
    for source in (file, write_tree(tmp_path / "tree")):
        described = load(source).describe()
        assert json.loads(json.dumps(described, allow_nan=False))["fingerprint"] == described["fingerprint"]


def test_fingerprint_covers_samples_and_labels_of_both_parts(tmp_path):
    def fingerprint(train=TABLE, validation="size,label\n1,x\n2,y\n"):
        folder = tmp_path / "data"
        write_csv(folder / "train.csv", train)
        write_csv(folder / "val.csv", validation)
        return load(folder).fingerprint

    seen = {
        fingerprint(),
        fingerprint(TABLE.replace("3,y", "3,x")),
        fingerprint(TABLE.replace("3,y", "3.5,y")),
        fingerprint(validation="size,label\n1,x\n2,x\n"),
        fingerprint(validation="size,label\n1,x\n3,y\n"),
        fingerprint(validation="size,label\n2,y\n1,x\n"),
    }
    assert len(seen) == 6 and fingerprint() in seen


def test_fingerprint_covers_the_cut(tmp_path, monkeypatch):
    path = write_csv(tmp_path / "a.csv", "size,label\n" + "1,x\n2,x\n" * 5 + "3,y\n4,y\n" * 5)
    first = load(path, task="table")
    monkeypatch.setattr(front, "SPLIT_SEED", 1)
    second = load(path, task="table")
    assert torch.equal(first.train.labels, second.train.labels) and first.fingerprint != second.fingerprint


def test_images_may_be_loaded_from_a_glob_with_all_three_splits(tmp_path):
    for name, first in (("train", 0), ("validation", 5), ("test", 9)):
        write(tmp_path / f"{name}.parquet", COLOUR[first : first + 4], [0, 1, 0, 1])
    data = load(tmp_path / "*.parquet")
    assert [numbers(split) for split in data.splits().values()] == [[0, 1, 2, 3], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert data.train.rows is None


def test_embedded_sets_are_found_by_name():
    for name, task in (("digits", "image"), ("blobs", "points"), ("wine", "table")):
        data = load(name)
        assert (data.name, data.inputs.task) == (name, task)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataset", "  "),
        ("validation_fraction", -0.1),
        ("validation_fraction", 0.0),
        ("validation_fraction", 1.0),
        ("validation_fraction", float("nan")),
        ("image_size", 0),
        ("image_size", -8),
        ("vocab_size", 0),
        ("min_count", 0),
        ("max_length", 0),
        ("image_mean", (0.5,)),
        ("image_std", (0.0,)),
        ("image_std", (float("nan"),)),
    ],
)
def test_impossible_settings(name, value):
    options = DataOptions(**{name: value})
    assert name in [rule for holds, rule, _ in options.conditions() if not holds]
    assert all(holds for holds, *_ in DataOptions(image_mean=(0.5,), image_std=(0.5,), image_size=1).conditions())


def test_mixed_sizes_are_named_across_splits_too(tmp_path):
    write(tmp_path / "train.parquet")
    write(tmp_path / "validation.parquet", [encode(pixels(1, 3, height=9)), COLOUR[0]], [0, 1])
    assert f"{tmp_path / 'validation.parquet'}, row 0: the image is 9 x 6 pixels" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": "digits", "image_size": 8}, "--image_size: is for files and hub ids, and digits is embedded"),
        ({"dataset": "wine", "streaming": True}, "--streaming: is for files and hub ids, and wine is embedded"),
        ({"max_length": 9}, "--max_length: is for text, and the samples are of the kind table"),
        ({"image_mean": (0.5,), "image_std": (0.5,)}, "--image_mean: is for image, and the samples are of the kind"),
    ],
)
def test_what_says_nothing_about_these_samples_is_refused(tmp_path, given, message):
    path = tmp_path / "table.csv"
    path.write_text("x,label\n" + "".join(f"{row},{row % 2}\n" for row in range(20)))
    with pytest.raises(DataError, match=message):
        front.load_data(DataOptions(**{"dataset": str(path), **given}))


@pytest.mark.parametrize("name", ["", "Unnamed: 0"])
def test_row_numbers_of_pandas_are_no_input(tmp_path, name):
    """In a file that is sorted by class they give the label away."""
    path = tmp_path / "table.csv"
    path.write_text(f"{name},x,label\n" + "".join(f"{row},{row % 7},{row // 10}\n" for row in range(20)))
    data = front.load_data(DataOptions(dataset=str(path)))
    assert data.inputs.shape == (1,)
    assert f"column {name!r} holds row numbers and is left out" in data.notes
    if name:
        assert front.load_data(DataOptions(dataset=str(path), input_columns=(name, "x"))).inputs.shape == (2,)


def test_classes_that_may_be_one_are_pointed_out(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("x,label\n" + "".join(f"{row},{['Yes', 'yes ', ' no'][row % 3]}\n" for row in range(20)))
    data = front.load_data(DataOptions(dataset=str(path)))
    assert data.class_names == ["Yes", "no", "yes"]
    assert [note for note in data.notes if "warning" in note] == [
        "warning: classes 'Yes' and 'yes' differ only in case; is that one class?"
    ]


@pytest.mark.parametrize(("suffix", "sign"), [("csv", ";"), ("csv", "\t"), ("tsv", ","), ("csv", "|")])
def test_another_delimiter_is_recognised(tmp_path, suffix, sign):
    path = tmp_path / f"table.{suffix}"
    path.write_text(f"x{sign}label\n" + "".join(f"{row}{sign}{row % 2}\n" for row in range(20)))
    with pytest.raises(DataError, match="cells seem to be separated by"):
        front.load_data(DataOptions(dataset=str(path)))
