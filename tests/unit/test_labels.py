"""Labels of every kind become class numbers and names; those that cannot are named."""

import datasets
import pytest
import torch
from datasets import ClassLabel, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules.errors import DataError
from data_modules.labels import find_class_names, has_labels, number_labels
from data_modules.rows import Rows

NAN = float("nan")


def rows_of(values, kind=None, skip=False):
    features = None if kind is None else Features({"y": kind if not isinstance(kind, str) else Value(kind)})
    return Rows("made", datasets.Dataset.from_dict({"y": values}, features=features), lambda row: f"row {row}", skip)


def names_of(values, kind=None):
    return find_class_names("made", rows_of(values, kind), "y")


def refusal(values, kind=None):
    with pytest.raises(DataError) as caught:
        names_of(values, kind)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "kind", "names", "numbers"),
    [
        ([1, 0, 1], ClassLabel(names=["zebra", "ant"]), ["zebra", "ant"], [1, 0, 1]),
        ([2, 0, 0], "uint8", ["0", "1", "2"], [2, 0, 0]),
        ([3, 1, 2], "int64", ["1", "2", "3"], [2, 0, 1]),
        ([1, -1, 1], "int64", ["-1", "1"], [1, 0, 1]),
        ([10, 9, 100], "int16", ["9", "10", "100"], [1, 0, 2]),  # as numbers, not as text
        ([1.0, 2.0, 1.0], "float64", ["1", "2"], [0, 1, 0]),
        ([0.0, 2.0, 1.0], "float32", ["0", "1", "2"], [0, 2, 1]),
        ([True, False, True], "bool", ["False", "True"], [1, 0, 1]),
        (["dog", "cat", "dog"], "string", ["cat", "dog"], [1, 0, 1]),
        (["b", "a", "B"], "large_string", ["B", "a", "b"], [2, 1, 0]),
        (["2", "10", "1"], "string", ["1", "10", "2"], [2, 1, 0]),
    ],
)
def test_labels_of_every_kind(values, kind, names, numbers):
    rows = rows_of(values, kind)
    assert find_class_names("made", rows, "y") == names
    found = number_labels(rows, "y", names)
    assert found.tolist() == numbers and found.dtype == torch.int64


@pytest.mark.parametrize(
    ("values", "kind"), [([1, None, 0], "int64"), ([1.0, NAN, 0.0], "float64"), (["a", None, "b"], "string")]
)
def test_missing_labels_are_no_class_and_are_rejected(values, kind):
    rows = rows_of(values, kind, skip=True)
    names = find_class_names("made", rows, "y")
    assert len(names) == 2
    numbers = number_labels(rows, "y", names)
    assert list(rows.bad) == [1] and rows.bad[1].startswith(f"row 1: label {values[1]!r} in column 'y' is missing (")
    assert numbers[rows.good()].tolist() == [
        names.index(str(value)) for value in ([1, 0] if kind != "string" else ["a", "b"])
    ]
    with pytest.raises(DataError, match=r"^row 1: label (None|nan) in column 'y' is missing .*\. Correct or remove it"):
        number_labels(rows_of(values, kind), "y", names)


@pytest.mark.parametrize(
    ("train", "kind", "bad"),
    [
        ([0, 1], "int64", 2),
        ([0, 1], "int64", -1),
        ([0.0, 1.0], "float64", 0.5),
        (["a", "b"], "string", "c"),
        (["a", "b"], "string", "A"),
        ([0, 1], ClassLabel(names=["a", "b"]), -1),
    ],
)
def test_labels_that_training_does_not_know(train, kind, bad):
    names = names_of(train, kind)
    rows = rows_of([train[1], bad, train[0]], kind, skip=True)
    assert number_labels(rows, "y", names)[rows.good()].tolist() == [1, 0]
    classes = f"{names[0]!r} to {names[1]!r}"
    said = f"row 1: label {bad!r} in column 'y' is none of the 2 classes of the training split, {classes}"
    assert rows.bad == {1: said}


def test_a_split_may_store_labels_in_another_type():
    assert number_labels(rows_of([1.0, 0.0]), "y", ["0", "1"]).tolist() == [1, 0]
    assert number_labels(rows_of(["1", "0"]), "y", ["0", "1"]).tolist() == [1, 0]


def test_minus_one_among_other_labels():
    for values in ([0, 1, -1, 2], [0.0, 1.0, -1.0, 2.0]):
        message = refusal(values)
        assert message.startswith("row 2: label -1 in column 'y' is below 0; labels count from 0. Correct or remove")


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        ([None, None], "int64", "made: all labels in column 'y' are missing; name another with --label_column"),
        ([NAN, NAN], "float64", "made: all labels in column 'y' are missing; name another with --label_column"),
        ([0.5, 1.0], "float32", "made: column 'y' holds float32; labels are whole numbers or text. Name another with"),
        ([float("inf"), 1.0], "float32", "made: column 'y' holds float32; labels are whole numbers or text."),
        ([[0], [1]], List(Value("int64")), "made: column 'y' holds no labels; name another with --label_column"),
        ([0, 10**9], "int64", "made: column 'y' holds numbers up to 1000000000, which are no class numbers; name"),
    ],
)
def test_columns_that_hold_no_labels(values, kind, said):
    assert refusal(values, kind).startswith(said)


def test_a_split_without_labels():
    assert not has_labels(rows_of([-1, -1, None], "int64"), "y")
    assert not has_labels(rows_of([None, None], "string"), "y")
    assert not has_labels(rows_of([0, 1]), "other")
    assert has_labels(rows_of([-1, 0]), "y")
    assert has_labels(rows_of(["a", None]), "y")


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-5, 400).filter(lambda value: value != -1), min_size=1, max_size=30))
def test_every_whole_number_gets_the_class_of_its_name(values):
    rows = rows_of(values)
    names = find_class_names("made", rows, "y")
    assert [int(names[number]) for number in number_labels(rows, "y", names)] == values
    assert [int(name) for name in names] == sorted(int(name) for name in names)
    assert len(set(names)) == len(names)
    assert not rows.bad
