"""Tables: what each column becomes, measured on the rows of training alone, the same for every file after that."""

import json
import math
from datetime import date
from decimal import Decimal

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules.errors import DataError
from data_modules.look import table_statistics
from data_modules.rows import Rows
from data_modules.splits import InputSpec
from data_modules.tables import CategoryColumn, NumberColumn, TablePreprocessing, fit_table

quick = settings(deadline=None, max_examples=60)  # the clock of a shared machine proves nothing


def make_rows(skip_bad=False, types=None, **columns):
    arrays = {name: pa.array(cells, (types or {}).get(name)) for name, cells in columns.items()}
    return Rows("train", datasets.Dataset(pa.table(arrays)), lambda row: f"t.csv, line {row + 2}", skip_bad)


def fit(rows, chosen=None, categorical=(), columns=None):
    chosen = torch.arange(len(rows)) if chosen is None else torch.tensor(chosen)
    return fit_table(rows, chosen, columns or rows.data.column_names, categorical)


def encode(preprocessing, rows):
    tensors = preprocessing.encode(rows).tensors
    return tensors["numbers"], tensors["categories"]


# Numbers


def test_numbers_are_standardised_by_the_rows_of_training():
    rows = make_rows(x=[1.0, 3.0, 100.0, 5.0], y=[0, 10, 7, 20])
    preprocessing, notes = fit(rows, [0, 1, 3])
    (x, y) = preprocessing.columns
    assert (x.mean, x.std) == (3.0, pytest.approx(math.sqrt(8 / 3)))
    assert (y.mean, y.std) == (10.0, pytest.approx(math.sqrt(200 / 3)))
    numbers, categories = encode(preprocessing, rows)
    assert numbers.dtype == torch.float32 and categories.dtype == torch.int64
    expected = [[(a - 3) / x.std, (b - 10) / y.std] for a, b in [(1, 0), (3, 10), (100, 7), (5, 20)]]
    assert numbers.tolist() == [pytest.approx(row) for row in expected]
    assert categories.shape == (4, 0)
    assert preprocessing.input_spec == InputSpec("table", (2,))
    assert notes == []


@quick
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40), st.integers(0, 2**32 - 1))
def test_measured_values_are_those_of_numpy_in_any_order_of_the_rows(values, seed):
    (column,) = fit(make_rows(x=values))[0].columns
    assert column.mean == pytest.approx(np.mean(values), rel=1e-12, abs=1e-9)
    if min(values) < max(values) and np.std(values) > 1e-150:
        assert column.std == pytest.approx(np.std(values), rel=1e-9)
    shuffled = np.random.default_rng(seed).permutation(values)
    assert fit(make_rows(x=shuffled))[0].columns == (column,)


def test_arithmetic_is_done_in_float64():
    rows = make_rows(x=[16_777_216_001.0, 16_777_216_002.0, 16_777_216_003.0])  # equal as float32
    numbers, _ = encode(fit(rows)[0], rows)
    assert numbers[:, 0].tolist() == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)])


@pytest.mark.parametrize(
    ("kind", "cells"),
    [
        (pa.int8(), [0, 1, 2]),
        (pa.uint64(), [0, 1, 2]),
        (pa.float16(), np.array([0, 1, 2], dtype=np.float16)),
        (pa.float32(), [0, 1, 2]),
        (pa.decimal128(5, 2), [Decimal("0"), Decimal("1"), Decimal("2")]),
        (pa.string(), ["0", " 1.0 ", "+2e0"]),
        (pa.large_string(), ["-0", ".1e+1", "2."]),
    ],
    ids=str,
)
def test_every_kind_of_number_is_read(kind, cells):
    rows = make_rows(types={"x": kind}, x=cells)
    preprocessing, _ = fit(rows)
    assert preprocessing.columns == (NumberColumn("x", 1.0, math.sqrt(2 / 3), indicator=False),)
    assert encode(preprocessing, rows)[0][:, 0].tolist() == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)])


def test_booleans_are_zero_and_one():
    rows = make_rows(x=[True, False, False, True])
    preprocessing, _ = fit(rows)
    assert preprocessing.columns == (NumberColumn("x", 0.5, 0.5, indicator=False),)
    assert encode(preprocessing, rows)[0][:, 0].tolist() == [1, -1, -1, 1]


def test_integers_that_float64_cannot_hold_are_rounded():
    rows = make_rows(x=[2**53 + 1, 2**53 + 3, 0])
    assert encode(fit(rows)[0], rows)[0].isfinite().all()


def test_a_constant_column_becomes_zero_and_is_named():
    rows = make_rows(x=[0.1, 0.1, 0.1, 7.0])
    preprocessing, notes = fit(rows, [0, 1, 2])
    assert preprocessing.columns == (NumberColumn("x", 0.1, 1.0, indicator=False),)
    assert encode(preprocessing, rows)[0][:, 0].tolist() == pytest.approx([0, 0, 0, 6.9])
    assert notes == ["column 'x': the training values are all 0.1, which teaches nothing"]


def test_huge_numbers_of_training_do_not_overflow():
    rows = make_rows(x=[1e300, -1e300, 1e308, 0.0], y=[5e-324, 0.0, 0.0, 0.0])
    preprocessing, _ = fit(rows)
    assert all(math.isfinite(column.mean) and 0 < column.std < math.inf for column in preprocessing.columns)
    numbers, _ = encode(preprocessing, rows)
    assert numbers.isfinite().all()
    assert numbers[2, 0] == pytest.approx(math.sqrt(3), rel=1e-3)


@pytest.mark.parametrize("cell", [1e300, -1e300, 1e39])
@pytest.mark.filterwarnings("error")
def test_a_number_that_float32_cannot_hold_is_a_bad_cell(cell):
    preprocessing, _ = fit(make_rows(x=[1.0, 2.0, 3.0]))
    new = make_rows(skip_bad=True, x=[2.0, cell, 3.0])
    numbers, _ = encode(preprocessing, new)
    assert new.bad == {1: f"t.csv, line 3: column 'x' is {cell}, too far from the training values"}
    assert numbers[1].tolist() == [0] and numbers.isfinite().all()


# Bad cells


@pytest.mark.parametrize("cell", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("categorical", [(), ("x",)])
def test_nan_and_infinity_are_bad_cells(cell, categorical):
    cells = pa.array([1.0, cell, None, 2.0])  # nan is not the same as missing
    with pytest.raises(DataError, match=f"^t.csv, line 3: column 'x' is {cell}\\. Correct or remove it"):
        fit(make_rows(x=cells), categorical=categorical)
    preprocessing, _ = fit(make_rows(x=[1.0, 2.0], y=[1, 2]), categorical=categorical)
    with pytest.raises(DataError, match=f"^t.csv, line 3: column 'x' is {cell}\\."):
        preprocessing.encode(make_rows(x=cells, y=[1, 2, 1, 2]))
    new = make_rows(skip_bad=True, x=cells, y=[1, 2, 1, 2])
    numbers, _ = encode(preprocessing, new)
    assert list(new.bad) == [1]
    assert numbers[:, -1].tolist() == [-1, 0, -1, 1]  # the whole row is filler


def test_a_row_with_a_bad_cell_counts_in_no_column():
    rows = make_rows(
        skip_bad=True,
        x=[1.0, 3.0, 999.0, 5.0],
        y=[1.0, 2.0, math.nan, 3.0],
        z=["a", "b", "other", "a"],
        known=["a", "b", "b", "a"],
    )
    preprocessing, _ = fit(rows)
    x, y, z, _ = preprocessing.columns
    assert (x.mean, y.mean, z.values) == (3.0, 2.0, ("a", "b"))
    assert rows.bad == {2: "t.csv, line 4: column 'y' is nan"}
    numbers, categories = encode(preprocessing, rows)
    assert numbers[2].eq(0).all() and categories[2].eq(0).all()
    assert numbers[3].ne(0).all() and categories[3].ne(0).all()


def test_a_row_that_was_rejected_before_does_not_count():
    rows = make_rows(skip_bad=True, x=[1.0, 3.0, 999.0], z=["a", "b", "c"])
    rows.reject(2, "no label")
    x, z = fit(rows)[0].columns
    assert (x.mean, z.values) == (2.0, ("a", "b"))


def test_text_among_numbers_is_a_bad_cell():
    cells = [str(number) for number in range(19)] + ["1,5"]
    with pytest.raises(
        DataError,
        match=r"^t.csv, line 21: column 'x' is '1,5', not a number as most of the column \(--categ.*\)\. Corr",
    ):
        fit(make_rows(x=cells))
    rows = make_rows(skip_bad=True, x=cells)
    preprocessing, notes = fit(rows)
    assert preprocessing.columns[0].mean == 9.0
    assert list(rows.bad) == [19]
    assert "text that is taken as numbers; --categorical_columns takes it as categories" in notes[0]


def test_a_long_cell_is_cut_in_the_message():
    preprocessing, _ = fit(make_rows(x=[1, 2]))
    rows = make_rows(skip_bad=True, x=["1", "y" * 1000])
    preprocessing.encode(rows)
    assert rows.bad[1].endswith("yyy..., not a number") and len(rows.bad[1]) < 120


def test_a_new_file_may_hold_its_numbers_as_text():
    preprocessing, _ = fit(make_rows(x=[1.5, 2.5]))
    rows = make_rows(skip_bad=True, x=["2.5", "?", " ", None, "1.5"])
    numbers, _ = encode(preprocessing, rows)
    assert numbers[:, 0].tolist() == [1, 0, 0, 0, -1]
    assert list(rows.bad) == [1]


@quick
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_written_as_text_are_read_exactly(value):
    numbers = make_rows(x=[0.0, value, 1.0])
    text = make_rows(x=["0.0", repr(value), "1.0"])
    assert fit(text)[0].columns == fit(numbers)[0].columns


@pytest.mark.parametrize(
    "word", ["nan", "inf", "-Infinity", "1e999", "0x10", "1_000", "1,000", "1 2", "", "e5", ".", chr(0x661)]
)
def test_what_is_not_a_finite_decimal_number_is_none(word):
    rows = make_rows(skip_bad=True, x=[word, "1", "2"])
    fit(make_rows(x=["1", "2"]))[0].encode(rows)
    assert list(rows.bad) == ([0] if word else [])


# Missing cells


def test_missing_numbers_become_the_mean_and_are_indicated():
    rows = make_rows(x=[1.0, None, 3.0, None], y=[1, 2, 3, 4], z=[None, 5, 6, 7])
    preprocessing, notes = fit(rows)
    assert [column.indicator for column in preprocessing.columns] == [True, False, True]
    assert preprocessing.columns[0].mean == 2.0
    assert preprocessing.input_spec.shape == (5,)
    numbers, _ = encode(preprocessing, rows)
    assert numbers[:, 0].tolist() == [-1, 0, 1, 0]
    assert numbers[:, 3].tolist() == [0, 1, 0, 1]  # of x
    assert numbers[:, 4].tolist() == [1, 0, 0, 0]  # of z
    assert notes == [
        "column 'x': 2 of 4 training values are missing; they become the mean, 2, and an input of its own says where",
        "column 'z': 1 of 4 training values are missing; they become the mean, 6, and an input of its own says where",
    ]


def test_numbers_that_only_miss_outside_training_become_the_mean():
    rows = make_rows(x=[1.0, 3.0, None])
    preprocessing, notes = fit(rows, [0, 1])
    assert preprocessing.input_spec.shape == (1,)
    assert encode(preprocessing, rows)[0][:, 0].tolist() == [-1, 1, 0]
    assert notes == []


def test_an_indicator_stays_where_a_new_file_misses_nothing():
    preprocessing, _ = fit(make_rows(x=[1.0, None, 3.0]))
    assert encode(preprocessing, make_rows(x=[3, 3]))[0].tolist() == [[1, 0], [1, 0]]


def test_missing_categories_are_a_category_only_if_training_had_them():
    cells = ["b", None, "a", "  "]
    rows = make_rows(x=cells)
    preprocessing, notes = fit(rows)
    assert preprocessing.columns == (CategoryColumn("x", ("a", "b"), missing=True),)
    assert preprocessing.input_spec.category_sizes == (4,)
    assert encode(preprocessing, rows)[1][:, 0].tolist() == [2, 3, 1, 3]
    assert notes == ["column 'x': 2 of 4 training values are missing; they are a category of their own"]
    preprocessing, notes = fit(rows, [0, 2])
    assert preprocessing.input_spec.category_sizes == (3,)
    assert encode(preprocessing, rows)[1][:, 0].tolist() == [2, 0, 1, 0]
    assert notes == []


def test_the_word_missing_is_not_a_missing_value():
    rows = make_rows(x=["missing", None, "unknown", "zebra"])
    preprocessing, _ = fit(rows)
    assert encode(preprocessing, rows)[1][:, 0].tolist() == [1, 4, 2, 3]


@pytest.mark.parametrize(
    "cells", [pa.array([None, None, 1.0]), pa.nulls(3), pa.array(["", " ", "a"]), pa.array([None, None, "3"])]
)
@pytest.mark.parametrize("categorical", [(), ("x",)])
def test_a_column_without_a_value_in_training_is_refused(cells, categorical):
    with pytest.raises(DataError, match=r"^train: column 'x' has no value in the rows of training\. .*--input_columns"):
        fit(make_rows(x=cells), [0, 1], categorical)


def test_a_new_file_may_miss_all_values():
    preprocessing, _ = fit(make_rows(x=[1, None, 3], y=["a", None, "b"]))
    numbers, categories = encode(preprocessing, make_rows(x=pa.nulls(2), y=pa.nulls(2)))
    assert numbers.tolist() == [[0, 1], [0, 1]]
    assert categories.tolist() == [[3], [3]]


# Categories


def test_text_becomes_categories_sorted_by_text_and_new_values_are_unknown():
    rows = make_rows(x=["pear", "apple ", "pear", "Zoo", "fig"])
    preprocessing, _ = fit(rows, [0, 1, 2, 3])
    assert preprocessing.columns == (CategoryColumn("x", ("Zoo", "apple", "pear"), missing=False),)
    assert preprocessing.input_spec == InputSpec("table", (0,), category_sizes=(4,))
    numbers, categories = encode(preprocessing, rows)
    assert categories[:, 0].tolist() == [3, 2, 3, 1, 0]
    assert numbers.shape == (5, 0) and numbers.dtype == torch.float32


@quick
@given(st.lists(st.one_of(st.none(), st.text(max_size=3)), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_category_numbers_do_not_depend_on_the_order_of_the_rows(cells, random):
    cells = [*cells, "some", "other"]
    rows = make_rows(types={"x": pa.string()}, x=cells)
    preprocessing, _ = fit(rows, categorical=("x",))
    shuffled = list(cells)
    random.shuffle(shuffled)
    assert fit(make_rows(types={"x": pa.string()}, x=shuffled), categorical=("x",))[0] == preprocessing
    (column,) = preprocessing.columns
    assert list(column.values) == sorted(set(column.values))
    numbers = encode(preprocessing, rows)[1][:, 0].tolist()
    assert all(0 < number < column.size for number in numbers)
    names = ["", *column.values, ""]
    assert [names[number] for number in numbers] == [trim(cell or "") for cell in cells]


def trim(text):
    import pyarrow.compute as pc

    return pc.utf8_trim_whitespace(pa.scalar(text)).as_py()


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (pa.array([3.0, -0.0, None, 10.0]), ("0", "10", "3")),
        (pa.array([3, 0, None, 10]), ("0", "10", "3")),
        (pa.array(["3", "0", None, "10"]), ("0", "10", "3")),
        (pa.array([0.5, 1e300, None, 3.0]), ("0.5", str(int(1e300)), "3")),
        (pa.array([Decimal("3.00"), Decimal("2.50")]), ("2.5", "3")),
        (pa.array([True, False, None]), ("false", "true")),
        (pa.chunked_array([pa.array([3.0, 4.0]), pa.array([4.0, 5.0, None])]), ("3", "4", "5")),
    ],
    ids=lambda value: str(value.type) if isinstance(value, (pa.Array, pa.ChunkedArray)) else "",
)
def test_numbers_that_are_listed_as_categories_are_their_plain_text(cells, values):
    rows = Rows("train", datasets.Dataset(pa.table({"x": cells})), str)
    preprocessing, _ = fit(rows, categorical=("x",))
    assert preprocessing.columns[0].values == values
    assert encode(preprocessing, rows)[1][:, 0].ne(0).all()


def test_a_category_is_found_again_in_a_file_with_another_type():
    preprocessing, _ = fit(make_rows(x=[1, 2, 3]), categorical=("x",))
    for cells in ([3.0, 1.0, None, 2.5], ["3", "1", "", "2.5"]):
        assert encode(preprocessing, make_rows(x=cells))[1][:, 0].tolist() == [3, 1, 0, 0]


@pytest.mark.parametrize(("num_words", "kind"), [(1, NumberColumn), (2, CategoryColumn)])
def test_text_is_numbers_if_95_percent_of_it_are(num_words, kind):
    cells = ["1", "2", "3"] * 10  # outside the 20 rows of training, and missing cells: of no weight
    cells += ["7"] * (20 - num_words) + ["x"] * num_words + [""] * 50
    preprocessing, _ = fit(make_rows(skip_bad=True, x=cells), list(range(30, 100)))
    assert isinstance(preprocessing.columns[0], kind)


def test_mixed_text_is_told():
    _, notes = fit(make_rows(x=["1", "2", "2", "three"]))
    assert notes == [
        "column 'x': 3 of 4 training values are numbers, the others are not, so that each value is a category"
    ]
    assert fit(make_rows(x=["1", "two", "two", "three"]))[1] == []


def test_class_labels_are_categories_by_name():
    features = datasets.Features({"x": datasets.ClassLabel(names=["3", "1", "2"])})
    data = datasets.Dataset.from_dict({"x": [0, 1, -1, 0]}, features=features)
    preprocessing, _ = fit(Rows("train", data, str))
    assert preprocessing.columns == (CategoryColumn("x", ("1", "3"), missing=True),)
    assert encode(preprocessing, Rows("train", data, str))[1][:, 0].tolist() == [2, 1, 3, 2]


def test_a_single_category_is_named():
    assert fit(make_rows(x=["a", "a", "a"]))[1] == [
        "column 'x': the training values are all 'a', which teaches nothing"
    ]


# What is said and refused


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([f"name{number}" for number in range(40)], True),
        (list(range(1000, 1040)), True),
        ([str(number) for number in range(40)], True),
        ([*range(38), 0, 1], True),
        ([*range(37), 0, 1, 2], False),
        ([number + 0.5 for number in range(40)], False),
        (list(range(19)), False),
    ],
)
def test_what_looks_like_an_identifier_is_told(cells, said):
    found = [note for note in fit(make_rows(x=cells))[1] if "as an identifier has" in note]
    assert len(found) == said
    assert all("--input_columns" in note for note in found)


@pytest.mark.parametrize(
    "cells",
    [
        [[1, 2], [3]],
        [{"a": 1}, {"a": 2}],
        [date(2024, 1, 1), date(2024, 1, 2)],
        pa.array([1, 2], pa.timestamp("s")),
        [b"a", b"b"],
    ],
)
def test_a_column_of_another_type_is_refused(cells):
    with pytest.raises(DataError, match=r"^train: column 'x' holds .*, not numbers or text\. Convert it"):
        fit(make_rows(x=cells))
    with pytest.raises(DataError, match="column 'x' holds"):
        fit(make_rows(x=[1, 2]))[0].encode(make_rows(x=cells))


def test_a_column_that_is_not_there_is_refused_with_those_that_are():
    rows = make_rows(x=[1, 2], y=["a", "b"])
    with pytest.raises(DataError, match=r"^train: no column 'z'; there are x, y\. .*--input_columns"):
        fit(rows, columns=["x", "z"])
    for kept, gone in (("x", "y"), ("y", "x")):
        new = Rows("new.csv", rows.data.select_columns([kept]), str)
        with pytest.raises(DataError, match=rf"^new.csv: no column '{gone}'; there are {kept}\."):
            fit(rows)[0].encode(new)


def test_categorical_columns_that_are_no_input_are_refused():
    with pytest.raises(DataError, match=r"^train: categorical column 'y' is none of the input columns x\."):
        fit(make_rows(x=[1, 2], y=[1, 2]), categorical=("y",), columns=["x"])


def test_a_table_without_input_columns_is_refused():
    with pytest.raises(DataError, match=r"^train: a table needs an input column"):
        fit_table(make_rows(x=[1, 2]), torch.arange(2), [], ())


# The same for every file


def mixed_rows(size=200, seed=0, **options):
    random = np.random.default_rng(seed)
    mask = random.random(size) < 0.1
    return make_rows(
        a=pa.array(random.normal(3, 2, size), mask=mask),
        b=random.integers(0, 9, size),
        c=pa.array(random.choice(["red", "green", "blue"], size), mask=np.roll(mask, 3)),
        d=random.random(size) < 0.5,
        e=random.choice(["1", "2", "3"], size),
        f=random.lognormal(0, 3, size).astype(np.float32),
        **options,
    )


def test_what_lies_outside_training_changes_nothing():
    rows = mixed_rows()
    chosen = torch.arange(0, 200, 2)
    before = fit_table(rows, chosen, rows.data.column_names, ("b",))
    columns = rows.data.to_dict()
    for row in range(1, 200, 2):
        columns["a"][row], columns["b"][row], columns["c"][row] = None, 77, "violet"
        columns["d"][row], columns["e"][row], columns["f"][row] = True, "-5", 1e9
    other = Rows("train", datasets.Dataset.from_dict(columns), str)
    assert fit_table(other, chosen, rows.data.column_names, ("b",)) == before
    columns["a"][0] = 1000.0
    other = Rows("train", datasets.Dataset.from_dict(columns), str)
    assert fit_table(other, chosen, rows.data.column_names, ("b",)) != before


def test_a_description_makes_the_same_preprocessing_after_a_trip_through_json():
    rows = mixed_rows()
    preprocessing, _ = fit(rows, categorical=("b",))
    described = preprocessing.describe()
    text = json.dumps(described)
    assert json.loads(text) == described  # plain values
    again = TablePreprocessing.from_description(json.loads(text))
    assert again == preprocessing and hash(again) == hash(preprocessing)
    new = mixed_rows(seed=1)
    assert again.encode(new).fingerprint() == preprocessing.encode(new).fingerprint()


def test_a_row_is_encoded_alike_alone_and_among_others():
    rows = mixed_rows()
    preprocessing, _ = fit(rows)
    whole = preprocessing.encode(rows)
    for row in (0, 7, 199):
        alone = preprocessing.encode(Rows("train", rows.data.select([row]), str))
        for name, tensor in whole.gather(torch.tensor([row])).items():
            assert torch.equal(alone.tensors[name], tensor)


def test_rows_are_taken_in_the_order_of_the_split():
    rows = mixed_rows()
    preprocessing, _ = fit(rows)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    shuffled = preprocessing.encode(Rows("train", rows.data.select(order.tolist()).with_format("torch"), str))
    for name, tensor in preprocessing.encode(rows).gather(order).items():
        assert torch.equal(shuffled.tensors[name], tensor)


def test_columns_stand_in_the_order_in_which_they_were_named():
    rows = make_rows(a=[0, 2], b=["x", "y"], c=[10, 30], d=["p", "p"], other=[[1], [2]])
    preprocessing, _ = fit(rows, columns=["c", "d", "a", "b"])
    assert [column.mean for column in preprocessing.numbers] == [20, 1]
    assert preprocessing.input_spec == InputSpec("table", (2,), category_sizes=(2, 3))
    assert encode(preprocessing, rows)[1].tolist() == [[1, 1], [1, 2]]


def test_a_file_without_rows_gives_samples_without_rows():
    rows = mixed_rows()
    preprocessing, _ = fit(rows)
    numbers, categories = encode(preprocessing, Rows("train", rows.data.select([]), str))
    assert numbers.shape == (0, *preprocessing.input_spec.shape)
    assert categories.shape == (0, len(preprocessing.input_spec.category_sizes))


@quick
@given(st.data())
def test_samples_are_always_finite_and_in_range(data):
    size = data.draw(st.integers(2, 12))
    cell = st.one_of(st.none(), st.floats(), st.sampled_from([0.0, 1e38, 1e300, -1e308]))
    x = data.draw(st.lists(cell, min_size=size, max_size=size))
    y = data.draw(st.lists(st.one_of(st.none(), st.sampled_from("abc ")), min_size=size, max_size=size))
    rows = make_rows(skip_bad=True, types={"x": pa.float64(), "y": pa.string()}, x=[1.0, *x], y=["a", *y])
    preprocessing, _ = fit(rows, list(range(data.draw(st.integers(1, size)))))
    numbers, categories = encode(preprocessing, rows)
    spec = preprocessing.input_spec
    assert numbers.shape == (size + 1, *spec.shape)
    assert numbers.isfinite().all()
    assert categories.min() >= 0 and (categories < torch.tensor(spec.category_sizes)).all()
    bad = {row for row, value in enumerate([1.0, *x]) if value is not None and not math.isfinite(value)}
    assert bad <= set(rows.bad)


def test_statistics_are_a_line_for_each_column():
    rows = make_rows(
        age=[1.0, None, 3.0, 2.0, 5000.0],
        city=["Oslo", "Rome", "Oslo", None, "Lima"],
        zero=[0, 40, 80, 0, 1],
        same=[7, 7, 7, 7, 7],
        size=["S", "S", "S", "M", "L"],
    )
    chosen = torch.arange(4)
    preprocessing, _ = fit(rows, chosen.tolist())
    assert table_statistics(preprocessing, preprocessing.encode(rows), chosen) == [
        "age   number    missing 25.0%  min 1, mean 2, max 3, std 0.8165",
        "city  category  missing 25.0%  2 categories, most often 'Oslo' (50.0%)",
        "zero  number    missing  0.0%  min 0, mean 30, max 80, std 33.17",
        "same  number    missing  0.0%  min 7, mean 7, max 7, std 0",
        "size  category  missing  0.0%  2 categories, most often 'S' (75.0%)",
    ]
