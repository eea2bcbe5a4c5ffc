"""Which columns hold samples and labels, and what is asked for where that cannot be told."""

import datasets
import pytest
from datasets import ClassLabel, Features, Image, List, Value

from data_modules.columns import Columns, find_columns
from data_modules.errors import DataError
from data_modules.options import DataOptions
from data_modules.rows import Rows
from tests.sources import COLOUR

TEXT = ["this is a text of eight words indeed", "and this one has six words"]
CELLS = {  # for each kind of column, two cells and their type
    "image": ([{"bytes": COLOUR[0], "path": None}] * 2, Image()),
    "points": ([[0.5, 1.5], [2.5, 3.5]], List(Value("float32"))),
    "text": (TEXT, Value("string")),
    "category": (["red", "dark blue"], Value("string")),
    "number": ([1, 2], Value("int64")),
    "class": ([0, 1], ClassLabel(names=["a", "b"])),
}


def rows_of(**kinds):
    """Return two rows with columns of the given kinds."""
    columns = {name: CELLS[kind][0] for name, kind in kinds.items()}
    features = Features({name: CELLS[kind][1] for name, kind in kinds.items()})
    return Rows("train", datasets.Dataset.from_dict(columns, features=features), lambda row: f"row {row}")


def find(rows, **options):
    return find_columns("made", rows, DataOptions(**options))


def refusal(rows, **options):
    with pytest.raises(DataError) as caught:
        find(rows, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kinds", "task", "inputs"),
    [
        ({"picture": "image"}, "image", ["picture"]),
        ({"picture": "image", "key": "number", "caption": "text", "place": "points"}, "image", ["picture"]),
        ({"place": "points"}, "points", ["place"]),
        ({"place": "points", "key": "number", "caption": "text"}, "points", ["place"]),
        ({"review": "text"}, "text", ["review"]),
        ({"height": "number"}, "table", ["height"]),
        ({"colour": "category"}, "table", ["colour"]),
        ({"height": "number", "colour": "category"}, "table", ["height", "colour"]),
    ],
)
def test_the_task_is_found_from_the_columns(kinds, task, inputs):
    assert find(rows_of(label="number", **kinds)) == Columns(task, inputs, "label")
    assert find(rows_of(**kinds, label="number")) == Columns(task, inputs, "label")


def test_text_beside_other_columns_is_asked_about():
    rows = rows_of(review="text", stars="number", label="class")
    assert refusal(rows) == (
        "made: column 'review' holds text, and there is stars besides. For the text alone: --task text "
        "--input_columns review. As a table: --task table, with the columns to use in --input_columns"
    )
    assert find(rows, task="text", input_columns=("review",)) == Columns("text", ["review"], "label")
    assert find(rows, input_columns=("review",)) == Columns("text", ["review"], "label")
    assert find(rows, task="table") == Columns("table", ["review", "stars"], "label")
    assert find(rows, task="table", input_columns=("stars",)) == Columns("table", ["stars"], "label")
    assert find(rows, input_columns=("stars",)) == Columns("table", ["stars"], "label")


@pytest.mark.parametrize(
    ("cells", "task"),
    [
        (["a b c d"] * 2, "text"),
        (["a b c"] * 2, "table"),
        (["a b c d e", "a b c"], "text"),  # on average
        (["a b c d e", None, ""], "text"),  # of those that hold something
        ([None, None], "table"),
    ],
)
def test_what_is_text_and_what_is_a_category(cells, task):
    columns = {"x": cells, "label": list(range(len(cells)))}
    features = Features({"x": Value("string"), "label": Value("int64")})
    rows = Rows("train", datasets.Dataset.from_dict(columns, features=features), str)
    assert find(rows).task == task


def test_text_is_looked_for_in_all_of_a_sorted_file():
    cells = ["word"] * 1000 + ["a text of five words"] * 5000
    rows = Rows("train", datasets.Dataset.from_dict({"x": cells, "label": [0, 1] * 3000}), str)
    assert find(rows).task == "text"


def test_a_task_that_is_asked_for():
    rows = rows_of(picture="image", place="points", review="text", colour="category", label="number")
    assert find(rows, task="image") == Columns("image", ["picture"], "label")
    assert find(rows, task="points") == Columns("points", ["place"], "label")
    assert find(rows, task="text") == Columns("text", ["review"], "label")
    assert find(rows, task="table", input_columns=("colour",)) == Columns("table", ["colour"], "label")
    # Short texts are texts if that is asked for.
    assert find(rows_of(word="category", label="number"), task="text") == Columns("text", ["word"], "label")


@pytest.mark.parametrize(
    ("task", "what"), [("image", "image"), ("points", "column with lists of numbers"), ("text", "text")]
)
def test_a_task_without_its_column(task, what):
    rows = rows_of(height="number", label="number")
    assert refusal(rows, task=task) == f"made: no {what} column among height; name it with --input_columns"


@pytest.mark.parametrize("kind", ["image", "points"])
def test_several_columns_that_fit(kind):
    rows = rows_of(one=kind, other=kind, label="number")
    what = {"image": "image", "points": "column with lists of numbers"}[kind]
    said = f"made: more than one {what} column (one, other) among one, other; name it with --input_columns"
    assert refusal(rows) == said
    assert find(rows, input_columns=("other",)) == Columns(kind, ["other"], "label")
    assert refusal(rows, input_columns=("one", "other")) == said


def test_several_texts():
    rows = rows_of(one="text", other="text", label="number")
    assert "there is other besides" in refusal(rows)
    assert refusal(rows, task="text").startswith("made: more than one text column (one, other)")


def test_the_label_is_found_by_type_and_name():
    assert find(rows_of(height="number", species="class", label="number")).label == "species"
    for name in ("label", "labels", "target", "class"):
        assert find(rows_of(**{"height": "number", name: "category"})).label == name
    assert find(rows_of(height="number", label="number"), label_column="height") == Columns(
        "table", ["label"], "height"
    )


def test_a_label_that_cannot_be_told():
    said = "made: which of the columns {} is the label? Name it with --label_column"
    assert refusal(rows_of(target="number", label="number")) == said.format("target, label")
    assert refusal(rows_of(picture="image", fine="class", coarse="class")) == said.format("fine, coarse")
    assert refusal(rows_of(picture="image", species="category")) == said.format("species")
    assert refusal(rows_of(one="number", species="category")) == said.format("one, species")
    rows = rows_of(height="number", fine="class", coarse="class")
    assert find(rows, label_column="fine") == Columns("table", ["height", "coarse"], "fine")
    # What is an input is no label.
    assert find(rows, input_columns=("coarse", "height")) == Columns("table", ["coarse", "height"], "fine")
    assert find(rows_of(target="number", label="number"), input_columns=("target",)).label == "label"


def test_images_without_any_labels():
    assert refusal(rows_of(picture="image")).startswith("made: has no labels; in a folder of images, each class is a")


def test_columns_that_do_not_exist():
    rows = rows_of(height="number", label="number")
    for option in ({"input_columns": ("width",)}, {"categorical_columns": ("width",)}, {"label_column": "width"}):
        assert refusal(rows, **option) == "made: has no column 'width'; its columns are height, label"


def test_the_label_cannot_be_an_input():
    rows = rows_of(height="number", label="number")
    said = "made: column 'label' is the label and cannot be an input; name another with --label_column"
    assert refusal(rows, input_columns=("label",), label_column="label") == said
    assert refusal(rows, input_columns=("label", "height"), label_column="label") == said


def test_no_image_is_decoded_to_look_at_text():
    columns = {"picture": [{"bytes": b"bad", "path": None}] * 2, "caption": TEXT, "label": [0, 1]}
    features = Features({"picture": Image(), "caption": Value("string"), "label": Value("int64")})
    rows = Rows("train", datasets.Dataset.from_dict(columns, features=features), str)
    assert find(rows).task == "image"


@pytest.mark.parametrize(
    "feature", [Value("binary"), Value("large_binary"), {"bytes": Value("binary"), "path": Value("string")}]
)
def test_images_written_by_other_tools(feature):
    cells = [COLOUR[0], COLOUR[1]]
    if isinstance(feature, dict):
        cells = [{"bytes": cell, "path": None} for cell in cells]
    features = Features({"x": feature, "label": Value("int64")})
    rows = Rows("train", datasets.Dataset.from_dict({"x": cells, "label": [0, 1]}, features=features), str)
    assert find(rows) == Columns("image", ["x"], "label")


@pytest.mark.parametrize("kind", ["float32", "float64", "int8", "uint16"])
def test_lists_of_any_numbers_are_points(kind):
    for feature in (List(Value(kind)), List(Value(kind), length=2), datasets.LargeList(Value(kind))):
        features = Features({"x": feature, "label": Value("int64")})
        rows = Rows("train", datasets.Dataset.from_dict({"x": [[1, 2]] * 2, "label": [0, 1]}, features=features), str)
        assert find(rows) == Columns("points", ["x"], "label")


def test_lists_of_words_are_not_points():
    rows = Rows("train", datasets.Dataset.from_dict({"x": [["a", "b"]] * 2, "label": [0, 1]}), str)
    assert find(rows).task == "table"  # which then says what it cannot use
