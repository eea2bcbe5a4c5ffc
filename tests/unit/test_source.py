"""What --dataset may name, which splits it has, and what is said of what cannot be opened."""

import os
import time

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_modules.csv_files import MISSING
from data_modules.errors import DataError
from data_modules.options import DataOptions
from data_modules.source import open_source
from tests.sources import COLOUR, write_tree

TABLE = "a,label\n1,x\n2,y\n3,x\n"


def write_csv(path, text=TABLE):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_kind(path, first=0, count=3):
    """Write a table with a column `a` that counts, in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [(number, "xy"[number % 2]) for number in range(first, first + count)]
    kind = path.suffix.lower()
    if kind == ".parquet":
        pq.write_table(pa.table({"a": [a for a, _ in rows], "label": [label for _, label in rows]}), path)
    elif kind == ".jsonl":
        path.write_text("".join(f'{{"a": {a}, "label": "{label}"}}\n' for a, label in rows))
    else:
        sign = "\t" if kind == ".tsv" else ","
        path.write_text(f"a{sign}label\n" + "".join(f"{a}{sign}{label}\n" for a, label in rows))
    return path


def open_all(source, **options):
    return open_source(DataOptions(dataset=str(source), **options))


def values(rows, column="a"):
    return rows.column(column).to_pylist()


def refusal(source, **options):
    with pytest.raises(DataError) as caught:
        open_all(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


KINDS = [".csv", ".tsv", ".parquet", ".jsonl"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_a_folder_and_a_glob_of_each_kind(tmp_path, kind):
    folder = tmp_path / "data"
    write_kind(folder / f"train{kind}", 0, 4)
    write_kind(folder / f"test{kind}", 10, 2)
    opened = open_all(folder / f"train{kind}")
    assert list(opened) == ["train"] and values(opened["train"]) == [0, 1, 2, 3]
    assert values(opened["train"], "label") == ["x", "y", "x", "y"]
    for source in (folder, folder / f"*{kind}", folder / f"t*{kind}"):
        opened = open_all(source)
        assert {name: values(rows) for name, rows in opened.items()} == {"train": [0, 1, 2, 3], "test": [10, 11]}
        assert all(rows.name == name for name, rows in opened.items())


@pytest.mark.parametrize("kind", [".CSV", ".Tsv", ".PARQUET", ".JSONL"])
def test_suffixes_in_capitals(tmp_path, kind):
    path = write_kind(tmp_path / f"A{kind}")
    assert values(open_all(path)["train"]) == [0, 1, 2]
    if kind in (".CSV", ".Tsv"):
        assert values(open_all(tmp_path)["train"]) == [0, 1, 2]
    word = "row 2" if kind == ".PARQUET" else "line 3" if kind == ".JSONL" else "line 4"
    assert open_all(path)["train"].where(2) == f"{path}, {word}"


@pytest.mark.parametrize("name", ["with a space", "näch 数据", "[1]", "a{b}c", "x*y", "50%", "#1", "a?b"])
@pytest.mark.parametrize("kind", [".csv", ".parquet", ".jsonl"])
def test_paths_with_any_sign(tmp_path, kind, name):
    path = write_kind(tmp_path / name / f"{name}{kind}")
    rows = open_all(path)["train"]
    assert values(rows) == [0, 1, 2]
    assert rows.where(0).startswith(f"{path}, ")


def test_a_pattern_in_the_path_of_a_folder_is_refused_where_it_would_be_misread(tmp_path):
    image = tmp_path / "[1]" / "class" / "a.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(COLOUR[0])
    assert "for a pattern; rename it" in refusal(tmp_path / "[1]")
    for kind in ("csv", "parquet"):
        write_kind(tmp_path / f"[{kind}]" / f"a.{kind}")
        assert values(open_all(tmp_path / f"[{kind}]")["train"]) == [0, 1, 2]


def test_home_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_kind(tmp_path / "data" / "a.csv")
    assert values(open_all("~/data/a.csv")["train"]) == [0, 1, 2]
    assert values(open_all("~/data/*.csv")["train"]) == [0, 1, 2]
    assert refusal("~/none.csv") == "--dataset ~/none.csv: no such file or folder"
    assert refusal("~nobody-of-this-name/a.csv").startswith("--dataset ~nobody-of-this-name/a.csv: ")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("training", "train"),
        ("pets-train-00000-of-00002", "train"),
        ("train1", "train"),
        ("validation", "validation"),
        ("valid", "validation"),
        ("VAL", "validation"),
        ("dev", "validation"),
        ("my_dev", "validation"),
        ("test", "test"),
        ("testing.v2", "test"),
        ("test/part", "test"),
        ("train/my.dev", "validation"),  # the last word counts
        ("contest", "train"),
        ("latest", "train"),
        ("value", "train"),
        ("trains", "train"),
    ],
)
def test_splits_from_names(tmp_path, name, split):
    write_kind(tmp_path / f"{name}.csv", 5)
    write_kind(tmp_path / "zz.csv", 0)  # without such a word: train
    opened = {key: values(rows) for key, rows in open_all(tmp_path).items()}
    assert opened == ({"train": [5, 6, 7, 0, 1, 2]} if split == "train" else {split: [5, 6, 7], "train": [0, 1, 2]})


def test_words_above_the_folder_and_the_name_of_a_single_file_say_nothing(tmp_path):
    write_kind(tmp_path / "test" / "a.csv")
    write_kind(tmp_path / "test" / "b.csv")
    assert list(open_all(tmp_path / "test")) == ["train"]
    assert list(open_all(write_kind(tmp_path / "test.csv"))) == ["train"]


@pytest.mark.parametrize("shuffled", [False, True])
def test_what_save_to_disk_has_written(tmp_path, shuffled):
    one = datasets.Dataset.from_dict({"a": list(range(10)), "label": list("xy") * 5})
    other = datasets.Dataset.from_dict({"a": [20, 21, 22], "label": list("xyx")})
    if shuffled:
        one = one.shuffle(seed=1).select([7, 1, 3])
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "dev": other}).save_to_disk(str(tmp_path / "two"))
    expected = list(one["a"])
    assert {name: values(rows) for name, rows in open_all(tmp_path / "one").items()} == {"train": expected}
    opened = open_all(tmp_path / "two")
    assert {name: values(rows) for name, rows in opened.items()} == {"train": expected, "dev": [20, 21, 22]}
    assert opened["dev"].where(1) == f"{tmp_path / 'two'}, split 'dev', row 1"


def test_a_damaged_folder_of_save_to_disk(tmp_path):
    datasets.Dataset.from_dict({"a": [1, 2], "label": ["x", "y"]}).save_to_disk(str(tmp_path))
    (file,) = tmp_path.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:50])
    assert refusal(tmp_path).startswith(f"--dataset {tmp_path}: cannot be opened: ")


# ---- where a row comes from ------------------------------------------------------------------------------------------


def test_lines_of_a_csv_with_quoted_breaks_blank_lines_and_a_mark_at_the_start(tmp_path):
    text = '\ufeff\r\n"a",label\r\n"one\r\ntwo",x\r\n\r\n\r\n"three",y\r\n"fo""ur\n,",x\r\nfive,y'
    path = write_csv(tmp_path / "a.csv", text)
    rows = open_all(path)["train"]
    assert rows.data.column_names == ["a", "label"]
    assert values(rows) == ["one\r\ntwo", "three", 'fo"ur\n,', "five"]
    assert [rows.where(row) for row in range(4)] == [f"{path}, line {line}" for line in (3, 7, 8, 10)]


def test_a_mark_at_the_start_before_a_quoted_name(tmp_path):
    path = write_csv(tmp_path / "a.csv", '\ufeff"size, cm",label\n1,x\n2\n')
    assert refusal(path).startswith(f"{path}, line 3: has 1 cells, the header has 2")
    assert open_all(path, on_bad_sample="skip")["train"].data.column_names == ["size, cm", "label"]


def test_lines_across_files_and_beside_lines_that_were_left_out(tmp_path):
    first = write_csv(tmp_path / "a.csv", "a,label\n1,x\n2\n3,y\n")
    second = write_csv(tmp_path / "b.csv", "a,label\n4,x,z\n5,y\n\n6,x\n")
    rows = open_all(tmp_path, on_bad_sample="skip")["train"]
    assert values(rows) == [1, 3, 5, 6]
    places = [f"{first}, line 2", f"{first}, line 4", f"{second}, line 3", f"{second}, line 5"]
    assert [rows.where(row) for row in range(4)] == places
    assert rows.dropped == [
        f"{first}, line 3: has 1 cells, the header has 2",
        f"{second}, line 2: has 3 cells, the header has 2",
    ]
    assert refusal(tmp_path) == (
        f"{first}, line 3: has 1 cells, the header has 2. Correct or remove it, or leave it out with "
        "--on_bad_sample skip"
    )


def test_rows_of_shards(tmp_path):
    for number in range(3):
        write_kind(tmp_path / f"train-0000{number}.parquet", number * 4, 4)
        write_kind(tmp_path / f"train-0000{number}.jsonl", number * 4, 4)
    for kind, word, first in (("parquet", "row", 0), ("jsonl", "line", 1)):
        rows = open_all(tmp_path / f"*.{kind}")["train"]
        assert values(rows) == list(range(12))
        assert rows.where(6) == f"{tmp_path / 'train-00001'}.{kind}, {word} {2 + first}"
        assert rows.where(11) == f"{tmp_path / 'train-00002'}.{kind}, {word} {3 + first}"


def test_blank_lines_of_jsonl_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n   \n\n{"a": 3}\n')
    rows = open_all(path)["train"]
    assert values(rows) == [1, 2, 3]
    assert [rows.where(row) for row in range(3)] == [f"{path}, line {line}" for line in (1, 3, 6)]


def test_a_file_that_changed_is_read_anew(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert open_all(path)["train"].where(1) == f"{path}, line 2"
    path.write_text('{"a": 1}\n\n\n{"a": 2}\n')
    assert open_all(path)["train"].where(1) == f"{path}, line 4"


def test_many_bad_rows_are_named_in_no_time(tmp_path):
    path = write_csv(tmp_path / "a.csv", "a,label\n" + "1,x\n" * 20_000)
    rows = open_all(path, on_bad_sample="skip")["train"]
    start = time.monotonic()
    for row in range(1000):
        rows.reject(row, "is bad")
    assert time.monotonic() - start < 3  # to read the file for each takes half a minute
    assert rows.bad[999] == f"{path}, line 1001: is bad"


# ---- cells -----------------------------------------------------------------------------------------------------------


def test_types_are_found_from_all_cells(tmp_path):
    lines = "".join(
        f"{number},{number},2,true,\n" for number in range(200_000)
    )  # more than is read at a time elsewhere
    path = write_csv(tmp_path / "a.csv", "a,b,c,d,e\n" + lines + "word,0.5,3,false,\n")
    rows = open_all(path)["train"]
    kinds = {name: feature.dtype for name, feature in rows.data.features.items()}
    assert kinds == {"a": "string", "b": "float64", "c": "int64", "d": "bool", "e": "null"}
    assert values(rows)[-2:] == ["199999", "word"]


@pytest.mark.parametrize("cell", MISSING)
def test_missing_cells_are_null(tmp_path, cell):
    rows = open_all(write_csv(tmp_path / "a.csv", f"a,b\n1,x\n{cell},{cell}\n3,y\n"))["train"]
    assert values(rows) == [1, None, 3] and values(rows, "b") == ["x", None, "y"]


def test_files_of_one_split_may_differ_in_type(tmp_path):
    write_csv(tmp_path / "a.csv", "a,b,c\n1,1,\n2,2,\n")
    write_csv(tmp_path / "b.csv", "a,b,c\n0.5,word,x\n")
    rows = open_all(tmp_path)["train"]
    assert [str(value) for value in values(rows)] == ["1", "2", "0.5"]
    assert values(rows, "b") == ["1", "2", "word"] and values(rows, "c") == [None, None, "x"]


def test_files_of_one_split_need_the_same_columns(tmp_path):
    first, second = write_csv(tmp_path / "a.csv", "a,b\n1,2\n"), write_csv(tmp_path / "b.csv", "b,a\n1,2\n")
    assert refusal(tmp_path).startswith(f"{second}: has the columns b, a, but {first} has a, b; ")


def test_long_texts(tmp_path):
    long = "word " * 500_000
    path = write_csv(tmp_path / "a.csv", f"a,label\n{long},x\nshort\n{long},y\n")
    assert refusal(path).startswith(f"{path}, line 3: has 1 cells")
    rows = open_all(path, on_bad_sample="skip")["train"]
    assert values(rows) == [long, long] and rows.where(1) == f"{path}, line 4"


def test_a_file_that_is_not_utf8(tmp_path):
    path = write_csv(tmp_path / "a.csv", "a,label\nM\u00fcll,x\ngood,y\nKl\u00e4r,x\n".encode("latin1"))
    write_csv(tmp_path / "0.csv", "a,label\n\ufffd is a sign of its own,x\n")
    message = refusal(tmp_path)
    assert message.startswith(f"{path}, line 2: is not UTF-8; convert the file: iconv -f LATIN1 -t UTF-8")
    rows = open_all(tmp_path, on_bad_sample="skip")["train"]
    assert sorted(rows.bad) == [1, 3] and rows.good().tolist() == [0, 2]
    assert rows.bad[3].startswith(f"{path}, line 4: ")


# ---- what cannot be opened -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("  \n\n", "is empty"),
        ("\ufeff", "is empty"),
        ("a,b\n1,\0\n", "is no text: it holds zero bytes. Convert it to UTF-8 text"),
        ("a,b\n1,2\n".encode("utf-16"), "is no text: it holds zero bytes. Convert it to UTF-8 text"),
        ("a,b,a\n1,2,3\n", "column 'a' is there 2 times; rename or remove one"),
    ],
)
def test_a_csv_that_cannot_be_read(tmp_path, text, said):
    path = write_csv(tmp_path / "a.csv", text)
    assert refusal(path) == refusal(path, on_bad_sample="skip") == f"{path}: {said}"


def test_a_header_alone_is_a_split_without_rows(tmp_path):
    assert len(open_all(write_csv(tmp_path / "a.csv", "a,b\n"))["train"]) == 0


def test_an_open_quotation_mark_never_loses_rows_silently(tmp_path):
    path = write_csv(tmp_path / "a.csv", 'a,b\n1,2\n3,"4\n5,6\n7,8\n')
    rows = None
    try:
        rows = open_all(path)["train"]
    except DataError as error:
        assert str(path) in str(error)  # noqa: PT017
    assert rows is None or values(rows, "b") == ["2", "4\n5,6\n7,8\n"]


@pytest.mark.parametrize("kind", [".parquet", ".jsonl"])
def test_an_empty_file(tmp_path, kind):
    path = write_csv(tmp_path / f"a{kind}", "")
    assert refusal(path) == f"{path}: is empty"


@pytest.mark.parametrize("damage", [lambda data: data[:-30], lambda data: data[:20], lambda data: b"no parquet at all"])
def test_a_damaged_parquet_file(tmp_path, damage):
    path = write_kind(tmp_path / "a.parquet")
    path.write_bytes(damage(path.read_bytes()))
    for source in (path, tmp_path / "*.parquet"):
        assert refusal(source).startswith(f"--dataset {source}: cannot be opened: Parquet ")


def test_a_link_to_nowhere(tmp_path):
    for kind in (".csv", ".parquet"):
        (tmp_path / f"a{kind}").symlink_to(tmp_path / "none")
        assert str(tmp_path) in refusal(tmp_path / f"*{kind}")


@pytest.mark.parametrize("line", ['{"a": 1, "lab', "a,b", "{'a': 1}"])
def test_damaged_jsonl(tmp_path, line):
    path = write_csv(tmp_path / "a.jsonl", '{"a": 1, "label": 0}\n' + line)
    assert refusal(path).startswith(f"--dataset {path}: cannot be opened: JSON parse error: ")


@pytest.mark.parametrize("source", ["nobody/nothing", "nothing", "a b", "data/x"])
def test_a_name_that_is_neither_path_nor_on_the_hub(source):
    message = refusal(source)
    assert message.startswith(f"--dataset {source}: is no path, and on the hub: ")
    assert message.endswith("a .csv, .tsv, .parquet or .jsonl file, folder or glob, or a hub id")


@pytest.mark.parametrize(
    "source",
    ["/no/such", "./none", "../none.parquet", "~/none", "a/b/c", "https://a.b/c", "none.csv", "none.tsv", "none.jsonl"],
)
def test_a_path_that_does_not_exist(source):
    assert refusal(source) == f"--dataset {source}: no such file or folder"


def test_a_name_that_is_too_long():
    assert refusal("a" * 5000) == f"--dataset {'a' * 100}: cannot be opened: File name too long"


def test_a_glob_without_files(tmp_path):
    assert refusal(tmp_path / "*.csv") == f"--dataset {tmp_path / '*.csv'}: no file matches"


def test_files_of_other_kinds(tmp_path):
    path = write_csv(tmp_path / "a.xlsx", "x")
    assert refusal(path).startswith(f"--dataset {path}: cannot open .xlsx files. Embedded: digits, blobs")
    assert refusal(tmp_path).startswith(f"--dataset {tmp_path}: the folder holds files of the kinds .xlsx. Embedded")
    path = write_csv(tmp_path / "none", "x")
    assert refusal(path).startswith(f"--dataset {path}: cannot open such files. Embedded")


def test_a_folder_with_nothing(tmp_path):
    write_csv(tmp_path / ".hidden.csv")
    assert refusal(tmp_path).startswith(f"--dataset {tmp_path}: the folder holds no file. Embedded")


@pytest.mark.parametrize(("one", "other"), [(".csv", ".tsv"), (".csv", ".parquet"), (".jsonl", ".parquet")])
def test_tables_of_several_kinds(tmp_path, one, other):
    write_kind(tmp_path / f"a{one}")
    write_kind(tmp_path / f"b{other}")
    kinds = f"{one}, {other}"
    for source in (tmp_path, tmp_path / "*"):
        assert refusal(source) == f"--dataset {source}: files of several kinds, {kinds}; name one with a glob"


def test_an_editors_hidden_copies_and_notes_are_no_data(tmp_path):
    write_kind(tmp_path / "a.csv")
    write_kind(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.csv")
    write_csv(tmp_path / "README.md", "words")
    assert values(open_all(tmp_path)["train"]) == [0, 1, 2]


def test_a_folder_of_images_with_a_table_of_its_own(tmp_path):
    write_tree(tmp_path, (("train", 4),))
    lines = [f"cat/{number}.png,{number}" for number in (0, 2)] + [f"dog/{number}.png,{number}" for number in (1, 3)]
    write_csv(tmp_path / "train" / "metadata.csv", "\n".join(["file_name,age", *lines]))
    rows = open_all(tmp_path)["train"]
    assert sorted(values(rows, "age")) == [0, 1, 2, 3] and "image" in rows.data.column_names


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = write_kind(tmp_path / "a.csv")
    path.chmod(0)
    assert refusal(path) == f"{path}: cannot be read (Permission denied)"
    (tmp_path / "closed").mkdir(0)
    for source in (tmp_path / "closed", tmp_path / "closed" / "a.csv"):
        assert refusal(source) == f"--dataset {source}: cannot be opened: Permission denied"


def test_a_file_that_vanishes(tmp_path, monkeypatch):
    path = write_kind(tmp_path / "a.csv")
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda self: (_ for _ in ()).throw(PermissionError(13, "No way")))
    assert refusal(path) == f"{path}: cannot be read (No way)"


def test_text_tables_are_not_streamed(tmp_path):
    path = write_kind(tmp_path / "a.csv")
    assert refusal(path, streaming=True).startswith(f"--streaming: {path} holds text tables, which are read whole")


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("Train/cat", "Train/dog", "Test/cat", "Test/dog"), {"train": 2, "test": 2}),
        (("TRAIN/cat", "TRAIN/dog", "val/cat", "val/dog"), {"train": 2, "validation": 2}),
        (("bus", "car", "train"), {"train": 3}),
        (("valid", "invalid"), {"train": 2}),
    ],
)
def test_splits_and_classes_of_a_folder_of_images(tmp_path, folders, expected):
    """Words in the names of files and classes are no splits."""
    for folder in folders:
        path = tmp_path / "images" / folder / "a_test_train_0.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(COLOUR[0])
    opened = open_source(DataOptions(dataset=str(tmp_path / "images")))
    assert {name: len(rows) for name, rows in opened.items()} == expected
    names = opened["train"].data.features["label"].names
    assert names == sorted({folder.split("/")[-1] for folder in folders})


def test_parquet_files_are_splits_by_their_names_in_any_case(tmp_path):
    for name, count in (("Train", 3), ("Test", 2)):
        pq.write_table(pa.table({"x": list(range(count)), "label": [0] * count}), tmp_path / f"{name}.parquet")
    opened = open_source(DataOptions(dataset=str(tmp_path)))
    assert {name: len(rows) for name, rows in opened.items()} == {"train": 3, "test": 2}


def test_categories_keep_their_leading_zeros(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("zip,label\n01004,0\n1004,1\n")
    opened = open_source(DataOptions(dataset=str(path), categorical_columns=("zip",)))
    assert opened["train"].data["zip"][:] == ["01004", "1004"]
