"""Lists of numbers become points; those that cannot are named."""

import warnings

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Features, List, Value

from data_modules.errors import DataError
from data_modules.points import PointPreprocessing, fit_points
from data_modules.rows import Rows
from tests.sources import everything, load, refusal

GOOD = [[float(number), number / 2] for number in range(12)]


def write(path, points, labels=None, kind=None):
    labels = [number % 2 for number in range(len(points))] if labels is None else labels
    pq.write_table(pa.table({"x": pa.array(points, kind or pa.list_(pa.float64())), "label": labels}), path)
    return path


def rows_of(cells, skip=False):
    features = Features({"x": List(Value("float64"))})
    return Rows("made", datasets.Dataset.from_dict({"x": cells}, features=features), lambda row: f"row {row}", skip)


def test_points_are_taken_as_they_are(tmp_path):
    data = load(write(tmp_path / "a.parquet", GOOD), validation_fraction=0.3)
    assert (data.inputs.task, data.inputs.shape, data.normalization) == ("points", (2,), None)
    for split in data.splits().values():
        batch = everything(split)
        assert batch["inputs"].dtype == torch.float32
        assert batch["inputs"].tolist() == [GOOD[row] for row in split.rows.tolist()]
        assert batch["labels"].tolist() == [row % 2 for row in split.rows.tolist()]
    assert sorted(torch.cat([data.train.rows, data.validation.rows]).tolist()) == list(range(12))


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.list_(pa.float32(), 2), pa.large_list(pa.float16())])
def test_lists_of_every_type(tmp_path, kind):
    points = [[number, number + 1] for number in range(12)]
    if "16" in str(kind):
        import numpy as np

        points = [np.array(point, dtype=np.float16) for point in points]
    data = load(write(tmp_path / "a.parquet", points, kind=kind))
    assert everything(data.train)["inputs"].tolist() == [[row, row + 1] for row in data.train.rows.tolist()]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([1.0, float("nan")], "holds a number that is missing, not finite or above 3.4e38"),
        ([1.0, float("-inf")], "holds a number that is missing, not finite or above 3.4e38"),
        ([1.0, None], "holds a number that is missing, not finite or above 3.4e38"),
        ([1.0, 1e300], "holds a number that is missing, not finite or above 3.4e38"),
        ([1.0], "has 1 numbers, most samples 2"),
        ([1.0, 2.0, 3.0], "has 3 numbers, most samples 2"),
        ([], "has 0 numbers, most samples 2"),
        (None, "is missing"),
    ],
)
@pytest.mark.parametrize("row", [0, 7])
def test_points_that_cannot_be_used(tmp_path, bad, said, row):
    path = write(tmp_path / "a.parquet", [*GOOD[:row], bad, *GOOD[row + 1 :]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refusal(path).startswith(f"{path}, row {row}: column 'x' {said}. Correct or remove it, or leave such")
        data = load(path, on_bad_sample="skip")
    assert data.skipped == [f"{path}, row {row}: column 'x' {said}"]
    assert sorted(torch.cat([data.train.rows, data.validation.rows]).tolist()) == [n for n in range(12) if n != row]
    for split in data.splits().values():
        assert everything(split)["inputs"].tolist() == [GOOD[row] for row in split.rows.tolist()]


def test_a_column_without_numbers(tmp_path):
    path = write(tmp_path / "a.parquet", [[], None] * 6)
    assert refusal(path) == "column 'x' of split 'train' holds no numbers; name another with --input_columns"


def test_the_length_is_that_of_the_rows_that_are_trained_on():
    rows = rows_of([[1.0]] * 5 + [[1.0, 2.0]] * 3)
    assert fit_points(rows, torch.arange(8), "x").size == 1
    assert fit_points(rows, torch.tensor([0, 5, 6]), "x").size == 2


def test_new_rows_are_treated_the_same_way():
    preprocessing = PointPreprocessing.from_description(PointPreprocessing("x", 2).describe())
    assert preprocessing == PointPreprocessing("x", 2)
    rows = rows_of([[1.0, 2.0], [3.0]], skip=True)
    assert preprocessing.encode(rows).tensors["inputs"].tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert rows.good().tolist() == [0]
    with pytest.raises(DataError, match=r"^split 'made' has no column 'y', only x$"):
        PointPreprocessing("y", 2).encode(rows)


def test_points_in_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(f'{{"x": [{row}, {row}.5], "label": {row % 2}}}\n' for row in range(8)) + '{"x": [1], "label": 0}\n'
    )
    assert refusal(path).startswith(f"{path}, line 9: column 'x' has 1 numbers, most samples 2")
    assert load(path, on_bad_sample="skip").inputs.shape == (2,)
