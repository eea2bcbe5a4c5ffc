"""Images from Parquet files and folders: what is read, and what is said when it cannot be."""

import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from data_modules import images
from data_modules.errors import DataError
from data_modules.images import ImageColumns, load_images

datasets.disable_progress_bars()
HEIGHT, WIDTH = 4, 6
CPU = torch.device("cpu")


def pixels(number, *channels, height=HEIGHT, width=WIDTH):
    """Return random uint8 pixels [H, W, *channels], others for each number."""
    return np.random.default_rng(number).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


COLOUR = [encode(pixels(number, 3)) for number in range(20)]
LABELS = [0, 1] * 10


def write(path, encoded=COLOUR, labels=LABELS, kind="int64", column="label", **more):
    """Write a Parquet file as `datasets` writes it; `kind` is a type's name or a list of class names."""
    feature = datasets.ClassLabel(names=kind) if isinstance(kind, list) else datasets.Value(kind)
    columns = {
        "image": [None if data is None else {"bytes": data, "path": None} for data in encoded],
        column: labels,
        **more,
    }
    features = {"image": datasets.Image(), column: feature}
    features |= {name: datasets.Image() if name.startswith("image") else feature for name in more}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=datasets.Features(features).arrow_schema), path)
    return path


def load(source, in_memory=True, **columns):
    return load_images(str(source), ImageColumns(**columns), in_memory=in_memory)


def refusal(source, in_memory=True, **columns):
    """Return what is said when the data set is refused."""
    with pytest.raises(DataError) as caught:
        load(source, in_memory, **columns)
    message = str(caught.value)
    assert "\n" not in message
    return message


def everything(split):
    return split.gather(torch.arange(len(split)))


def same(one, other):
    """Say whether two data modules give the same samples and remember the same of them."""
    assert one.describe() == other.describe()
    for name, split in one.splits().items():
        mine, theirs = everything(split), everything(other.splits()[name])
        assert torch.equal(mine["inputs"], theirs["inputs"])
        assert torch.equal(mine["labels"], theirs["labels"])
    return True


@pytest.fixture
def folder(tmp_path):
    """A folder of Parquet files with a training and a test split."""
    write(tmp_path / "data" / "train.parquet")
    write(tmp_path / "data" / "test.parquet", COLOUR[:4], [1, 0, 1, 0])
    return tmp_path / "data"


@pytest.fixture
def file(tmp_path):
    """A Parquet file; opening it is several times faster than opening a folder."""
    return write(tmp_path / "file.parquet")


@pytest.fixture
def tree(tmp_path):
    """A folder of images, a folder for each class, in two splits."""
    for split, size in (("train", 10), ("test", 4)):
        for number in range(size):
            path = tmp_path / "tree" / split / ("dog" if number % 2 else "cat") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(COLOUR[number])
    return tmp_path / "tree"


def test_parquet_folder_gives_its_splits_pixels_and_labels(folder):
    data = load(folder)
    assert {name: len(split) for name, split in data.splits().items()} == {"train": 18, "validation": 2, "test": 4}
    assert data.class_names == ["0", "1"]
    assert data.input_shape == (3, HEIGHT, WIDTH)
    test = everything(data.test)
    assert test["labels"].tolist() == [1, 0, 1, 0]
    expected = torch.tensor(np.stack([pixels(number, 3) for number in range(4)])).permute(0, 3, 1, 2)
    assert torch.equal(test["inputs"], expected)
    assert any("no validation split: 2 of 20" in note for note in data.notes)
    assert data.fingerprint == load(folder / "train.parquet").fingerprint  # the test split has no part in training


def test_validation_is_cut_from_training_without_loss(file):
    data = load(file, validation_fraction=0.3)
    assert (len(data.train), len(data.validation)) == (14, 6)
    assert torch.bincount(data.validation.labels).tolist() == [3, 3]
    parts = torch.cat([data.train.inputs, data.validation.inputs])
    assert len(parts.unique(dim=0)) == 20
    for split in (data.train, data.validation):
        for image, label in zip(split.inputs, split.labels.tolist()):
            row = next(row for row in range(20) if np.array_equal(pixels(row, 3), image.permute(1, 2, 0).numpy()))
            assert label == LABELS[row]


@pytest.mark.parametrize("name", ["validation", "valid", "val"])
def test_a_split_named_for_validation_is_used(tmp_path, name):
    write(tmp_path / "train.parquet")
    write(tmp_path / f"{name}.parquet", COLOUR[:3], [0, 0, 1])
    data = load(tmp_path)
    assert (len(data.train), data.validation.labels.tolist(), data.test) == (20, [0, 0, 1], None)


def test_splits_may_be_chosen_by_name(folder):
    data = load(folder, train="test", validation="train", test="train")
    assert (len(data.train), len(data.validation), len(data.test)) == (4, 20, 20)


def test_folder_of_images_gives_class_names(tree):
    data = load(tree)
    assert data.class_names == ["cat", "dog"]
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 2, 4)
    by_label = {int(label): image for image, label in zip(data.test.inputs, data.test.labels)}
    known = {label: {pixels(number, 3).tobytes() for number in range(label, 4, 2)} for label in (0, 1)}
    for label, image in by_label.items():
        assert image.permute(1, 2, 0).numpy().tobytes() in known[label]


def test_single_parquet_file(tmp_path):
    data = load(write(tmp_path / "any name.PARQUET"))
    assert (len(data.train), len(data.validation), data.test) == (18, 2, None)


def test_columns_may_be_named(tmp_path):
    path = write(tmp_path / "a.parquet", column="y", image2=[{"bytes": data, "path": None} for data in COLOUR[::-1]])
    data = load(path, image="image2", label="y")
    assert {image.permute(1, 2, 0).numpy().tobytes() for image in data.train.inputs[data.train.labels == 0]} <= {
        pixels(number, 3).tobytes() for number in range(1, 20, 2)
    }


@pytest.mark.parametrize("named", [None, "image"])
@pytest.mark.parametrize("stored", ["bytes", "struct"])
def test_parquet_written_by_other_tools(tmp_path, stored, named):
    column = COLOUR if stored == "bytes" else [{"bytes": data, "path": None} for data in COLOUR]
    pq.write_table(pa.table({"image": column, "label": LABELS}), tmp_path / "plain.parquet")
    assert load(tmp_path / "plain.parquet", image=named).input_shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("values", "kind", "class_names", "first"),
    [
        (["dog", "cat"], "string", ["cat", "dog"], [1, 0]),
        ([1, 0], ["zebra", "ant"], ["zebra", "ant"], [1, 0]),
        ([True, False], "bool", ["0", "1"], [1, 0]),
        ([2, 0], "uint8", ["0", "1", "2"], [2, 0]),
    ],
)
def test_labels_of_every_kind(tmp_path, values, kind, class_names, first):
    write(tmp_path / "train.parquet", labels=values * 10, kind=kind)
    write(tmp_path / "validation.parquet", COLOUR[:2], values, kind)
    data = load(tmp_path)
    assert data.class_names == class_names
    assert data.validation.labels.tolist() == first


def test_classes_without_a_sample_are_noted(tmp_path):
    data = load(write(tmp_path / "a.parquet", labels=[1, 2] * 10))
    assert any("1 of 3 classes have no training sample, first '0'" in note for note in data.notes)
    assert not any("no training sample" in note for note in load(write(tmp_path / "b.parquet")).notes)


@pytest.mark.parametrize(
    "decode",
    [
        lambda grey: Image.fromarray(grey),
        lambda grey: Image.fromarray(grey).convert("LA"),
    ],
)
def test_grey_images_have_one_channel(tmp_path, decode):
    data = load(write(tmp_path / "a.parquet", [encode(decode(pixels(number))) for number in range(20)]))
    assert data.input_shape == (1, HEIGHT, WIDTH)
    assert {image.numpy().tobytes() for image in data.train.inputs} <= {pixels(n).tobytes() for n in range(20)}


def test_black_and_white_images_have_one_channel(tmp_path):
    bits = [pixels(number) > 127 for number in range(20)]
    data = load(write(tmp_path / "a.parquet", [encode(Image.fromarray(image)) for image in bits]))
    assert data.input_shape == (1, HEIGHT, WIDTH)
    assert data.train.inputs.unique().tolist() == [0, 255]


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK"])
def test_colour_of_every_kind_becomes_red_green_blue(tmp_path, mode):
    colours = [(255, 0, 0), (0, 0, 255)] * 10
    kind = "TIFF" if mode == "CMYK" else "PNG"
    encoded = [encode(Image.new("RGB", (WIDTH, HEIGHT), colour).convert(mode), kind) for colour in colours]
    data = load(write(tmp_path / "a.parquet", encoded))
    assert data.input_shape == (3, HEIGHT, WIDTH)
    assert data.train.inputs[data.train.labels == 0].amax((0, 2, 3)).tolist() == [255, 0, 0]
    assert data.train.inputs[data.train.labels == 1].amin((0, 2, 3)).tolist() == [0, 0, 255]


def test_a_few_grey_images_among_coloured_become_coloured(tmp_path):
    # Folders are sorted by class: all the first images may be grey.
    small = [encode(pixels(number, height=2, width=2)) for number in range(300)]
    small += [encode(pixels(number, 3, height=2, width=2)) for number in range(300)]
    data = load(write(tmp_path / "a.parquet", small, [0] * 300 + [1] * 300))
    assert data.input_shape == (3, 2, 2)


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the top is at the right-hand side
    upright = pixels(0, 3, height=WIDTH, width=HEIGHT)
    stored = encode(np.rot90(upright).copy(), exif=exif)
    data = load(write(tmp_path / "a.parquet", [stored] * 20))
    assert np.array_equal(data.train.inputs[0].permute(1, 2, 0).numpy(), upright)


def test_image_size_scales_the_shorter_side_and_crops_the_centre(tmp_path):
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = [10, 200, 30]  # the middle half is of one colour
    tall = wide.transpose(1, 0, 2).copy()
    encoded = [encode(image) for image in (wide, tall)] * 10
    for size in (2, 4, 8):
        data = load(write(tmp_path / f"{size}.parquet", encoded), image_size=size)
        assert data.input_shape == (3, size, size)
        if size == 4:
            assert data.train.inputs.unique(dim=0).tolist() == [[[[value] * 4] * 4 for value in (10, 200, 30)]]


@pytest.mark.parametrize("size", [None, 3])
def test_decoding_on_demand_gives_exactly_the_same(folder, tree, size):
    for source in (folder, tree):
        kept, decoded = load(source, True, image_size=size), load(source, False, image_size=size)
        assert isinstance(kept.train.inputs, torch.Tensor) and not isinstance(decoded.train.inputs, torch.Tensor)
        assert same(kept, decoded)


def test_normalisation_is_that_of_the_training_part(file):
    data = load(file)
    assert data.normalization.scale == 1 / 255
    assert data.normalization.mean == pytest.approx((data.train.inputs / 255).mean((0, 2, 3)).tolist(), rel=1e-4)
    prepared = data.prepare(everything(data.train), CPU)["inputs"].double().transpose(0, 1).flatten(1)
    assert prepared.mean(1).tolist() == pytest.approx([0.0] * 3, abs=1e-5)
    assert prepared.std(1, correction=0).tolist() == pytest.approx([1.0] * 3, abs=1e-5)


def test_fingerprint_changes_with_what_is_trained_on(tmp_path):
    def fingerprint(name, encoded=COLOUR, labels=LABELS, **columns):
        return load(write(tmp_path / f"{name}.parquet", encoded, labels), **columns).fingerprint

    first = fingerprint("first")
    assert fingerprint("again") == first
    assert fingerprint("label", labels=[1, 1, *LABELS[2:]]) != first
    assert fingerprint("pixel", [encode(pixels(99, 3)), *COLOUR[1:]]) != first
    assert fingerprint("order", [*COLOUR[2:4], *COLOUR[:2], *COLOUR[4:]]) != first
    assert fingerprint("size", image_size=3) != first
    assert fingerprint("cut", validation_fraction=0.2) != first


@pytest.mark.parametrize("labels", [[-1] * 4, [None] * 4])
def test_a_test_split_without_labels_is_left_out_and_noted(folder, labels):
    write(folder / "test.parquet", COLOUR[:4], labels)
    data = load(folder)
    assert data.test is None
    assert "split 'test' has no labels and is not used" in data.notes
    assert "split 'test'" in refusal(folder, test="test")  # asked for by name, it is refused


@pytest.mark.parametrize("source", ["nobody/nothing", "nothing", "a b", "data/x"])
def test_a_name_that_is_neither_path_nor_on_the_hub(source):
    message = refusal(source)
    assert message.startswith(f"--dataset {source}: is no path, and on the hub: ")
    assert message.endswith("Otherwise give a folder of images, a .parquet file or folder, or a hub id")


@pytest.mark.parametrize("source", ["/no/such", "./none", "../none.parquet", "~/none", "a/b/c", "https://a.b/c"])
def test_a_path_that_does_not_exist(source):
    assert refusal(source) == f"--dataset {source}: no such file or folder"


@pytest.mark.parametrize("source", ["", "  "])
def test_an_empty_name(source):
    assert refusal(source).startswith("--dataset: is empty. Embedded: digits, blobs.")


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,b\n1,2\n")
    assert refusal(path) == f"{path}: cannot open files of this kind; give a .parquet file or a folder of images"


@pytest.mark.parametrize("content", [b"", b"no parquet at all"])
def test_a_damaged_parquet_file(tmp_path, content):
    path = tmp_path / "bad.parquet"
    path.write_bytes(content)
    assert refusal(path).startswith(f"--dataset {path}: cannot be opened: Parquet ")


def test_an_empty_folder(tmp_path):
    message = refusal(tmp_path)
    assert message.startswith(f"--dataset {tmp_path}: cannot be opened: ") and "any data files" in message


def test_a_path_that_would_be_taken_for_a_pattern(tmp_path):
    path = write(tmp_path / "[1]" / "a.parquet")
    for source in (path, path.parent):
        assert "for a pattern; rename it" in refusal(source)


def test_no_such_column(file):
    said = f"{file}: split 'train' has no column 'pic'; its columns are image, label. Name them with --image_column"
    assert refusal(file, image="pic").startswith(said)
    assert "has no column 'kind'" in refusal(file, label="kind")


def test_no_image_column(tmp_path):
    pq.write_table(pa.table({"height": [1, 2], "label": [0, 1]}), tmp_path / "a.parquet")
    said = f"{tmp_path / 'a.parquet'}: no image column among height, label; name it with --image_column"
    assert refusal(tmp_path / "a.parquet") == said


def test_several_image_columns(tmp_path):
    path = write(tmp_path / "a.parquet", image2=[{"bytes": data, "path": None} for data in COLOUR])
    said = f"{path}: more than one image column (image, image2) among image, label, image2; name it with --image_column"
    assert refusal(path) == said


def test_columns_mistaken_for_one_another(file):
    assert refusal(file, image="label").endswith("column 'label' holds no images; name another with --image_column")
    assert refusal(file, label="image").endswith("column 'image' holds no labels; name another with --label_column")


def test_label_column_that_cannot_be_told(tmp_path):
    path = write(tmp_path / "a.parquet", column="target", label=LABELS)
    assert refusal(path) == f"{path}: which of the columns target, label is the label? Name it with --label_column"
    path = write(tmp_path / "b.parquet", column="fine", kind=["a", "b"], coarse=LABELS)
    assert refusal(path) == f"{path}: which of the columns fine, coarse is the label? Name it with --label_column"
    path = write(tmp_path / "c.parquet", column="species")
    assert "which of the columns species is the label?" in refusal(path)


def test_images_without_any_labels(tmp_path):
    (tmp_path / "a.png").write_bytes(COLOUR[0])
    (tmp_path / "b.png").write_bytes(COLOUR[1])
    said = f"{tmp_path}: has no labels; in a folder of images, each class is a folder of its own"
    assert refusal(tmp_path) == said


@pytest.mark.parametrize(("label", "kind", "name"), [(1, "int64", "1"), ("cat", "string", "cat"), (0, ["a", "b"], "a")])
def test_one_class_only(tmp_path, label, kind, name):
    message = refusal(write(tmp_path / "a.parquet", labels=[label] * 20, kind=kind))
    assert f"the training split has one class only ({name!r} in column 'label'); a classifier needs two" in message


def test_negative_label(tmp_path):
    path = write(tmp_path / "a.parquet", labels=[0, 1, 0, -3, *LABELS[4:]])
    assert refusal(path).startswith(f"{path}: label -3 in row 3, column 'label', is below 0; labels count from 0.")


@pytest.mark.parametrize(
    ("train", "kind", "bad", "said"),
    [
        (
            LABELS,
            "int64",
            2,
            "label 2 in row 1 of split 'validation', column 'label', is none of the 2 classes '0' to",
        ),
        (LABELS, "int64", -1, "label -1 in row 1 of split 'validation'"),
        (["a", "b"] * 10, "string", "c", "label 'c' in row 1 of split 'validation', column 'label', is none of the 2"),
        (
            LABELS,
            ["a", "b"],
            -1,
            "label -1 in row 1 of split 'validation', column 'label', is none of the 2",
        ),
        (LABELS, "int64", None, "label None in row 1 of split 'validation', column 'label', is missing"),
    ],
)
def test_label_out_of_range_names_split_and_row(tmp_path, train, kind, bad, said):
    write(tmp_path / "train.parquet", labels=train, kind=kind)
    write(tmp_path / "validation.parquet", COLOUR[:3], [train[0], bad, train[1]], kind)
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}: {said}")
    assert message.endswith("Correct or remove that row")


@pytest.mark.parametrize(("labels", "kind"), [(LABELS, "int64"), (["a", "b"] * 10, "string"), (LABELS, ["a", "b"])])
def test_missing_label_names_the_row(tmp_path, labels, kind):
    message = refusal(write(tmp_path / "a.parquet", labels=[*labels[:5], None, *labels[6:]], kind=kind))
    assert "label None in row 5 of split 'train', column 'label', is missing" in message


def test_labels_all_missing_or_of_a_useless_kind(tmp_path):
    message = refusal(write(tmp_path / "a.parquet", labels=[None] * 20))
    assert "all labels in column 'label' are missing; name another with --label_column" in message
    message = refusal(write(tmp_path / "b.parquet", labels=[0.5] * 20, kind="float32"))
    assert "column 'label' holds float32; labels are whole numbers or text" in message


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (COLOUR[7][:60], "truncated"),
        (b"hello", "no known image format"),
        (b"", "no known image format"),
        (encode(Image.fromarray(pixels(0).astype(np.uint16) * 257)), "more than 8 bits a channel, mode I;16"),
    ],
)
def test_image_that_cannot_be_decoded_names_the_row(tmp_path, in_memory, data, reason):
    path = write(tmp_path / "a.parquet", [*COLOUR[:7], data, *COLOUR[8:]])
    message = refusal(path, in_memory)
    assert message.startswith(f"{path}, split 'train', row 7: cannot be decoded (")
    assert reason in message and message.endswith("; replace or remove it") and "object at" not in message


def test_image_that_is_too_large_to_be_true(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = write(tmp_path / "a.parquet", [*COLOUR[:7], encode(pixels(0, 3, height=30, width=30)), *COLOUR[8:]])
    assert "row 7: cannot be decoded (Image size (900 pixels)" in refusal(path)


@pytest.mark.parametrize("in_memory", [True, False])
def test_missing_image_names_the_row(tmp_path, in_memory):
    path = write(tmp_path / "a.parquet", [*COLOUR[:7], None, *COLOUR[8:]])
    assert refusal(path, in_memory) == f"{path}, split 'train', row 7: has no image; remove that row"


@pytest.mark.parametrize("in_memory", [True, False])
def test_bad_file_in_a_folder_of_images_is_named(tree, in_memory):
    path = tree / "train" / "dog" / "3.png"
    path.write_bytes(b"hello")
    message = refusal(tree, in_memory)
    assert str(path) in message and "cannot be decoded (no known image format)" in message


def test_file_that_a_parquet_names_but_is_not_there(tmp_path):
    column = [{"bytes": data, "path": None} for data in COLOUR[:-1]] + [{"bytes": None, "path": "/no/such.png"}]
    pq.write_table(pa.table({"image": column, "label": LABELS}), tmp_path / "a.parquet")
    message = refusal(tmp_path / "a.parquet")
    assert message.endswith("row 19 (/no/such.png): cannot be read (No such file or directory)")


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_of_different_sizes_name_the_row_and_the_way_out(tmp_path, in_memory):
    path = write(tmp_path / "a.parquet", [*COLOUR[:7], encode(pixels(0, 3, height=5, width=5)), *COLOUR[8:]])
    assert refusal(path, in_memory) == (
        f"{path}, split 'train', row 7: is 5 x 5 pixels (height x width), the first image of the split 4 x 6; give "
        "--image_size N to scale all to N x N"
    )
    assert load(path, in_memory, image_size=4).input_shape == (3, 4, 4)


@pytest.mark.parametrize("in_memory", [True, False])
def test_splits_of_different_sizes(folder, in_memory):
    write(folder / "test.parquet", [encode(pixels(0, 3, height=5, width=5))] * 4, [0, 1, 0, 1])
    message = refusal(folder, in_memory)
    assert "the splits have images of different sizes, 4 x 6 and 5 x 5 pixels (height x width)" in message
    assert "--image_size" in message


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_split_without_rows(folder, split):
    empty = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}).arrow_schema
    pq.ParquetWriter(folder / f"{split}.parquet", empty).close()
    assert refusal(folder) == f'{folder}: split "{split}" has no rows; fill it or remove it'


def test_file_with_an_empty_group_of_rows(tmp_path):
    path = write(tmp_path / "a.parquet", [], [])
    assert refusal(path) == f"{path}: a Parquet file has no rows; fill it or remove it"


def test_split_without_rows_from_a_source_that_allows_it(monkeypatch):
    empty = datasets.Dataset.from_dict({"image": [], "label": []})
    monkeypatch.setattr(images, "_open", lambda source: {"train": empty})
    assert refusal("made") == "made: split 'train' has no rows; fill it or remove it"


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_no_such_split(file, part):
    said = f"{file}: has no split 'dev', only train; name one with --{part}_split"
    assert refusal(file, **{part: "dev"}) == said


@pytest.mark.parametrize("fraction", [-0.1, 0.0, 1.0, 1.5, float("nan")])
def test_impossible_validation_fraction(fraction):
    assert refusal("unopened", validation_fraction=fraction) == (
        f"--validation_fraction {fraction}: must be above 0 and below 1"
    )


@pytest.mark.parametrize("size", [0, -8])
def test_impossible_image_size(size):
    assert refusal("unopened", image_size=size) == f"--image_size {size}: must be 1 or more"


def test_too_few_samples_to_cut_a_validation_split(tmp_path):
    message = refusal(write(tmp_path / "a.parquet", COLOUR[:2], [0, 1]))
    assert "no class has the two samples" in message and "--validation_split" in message


def test_splits_that_do_not_fit_together_say_why(folder):
    write(folder / "test.parquet", COLOUR[:2], ["a", "b"], "string")
    message = refusal(folder)
    assert "cannot be opened: Failed to parse string: '" in message and "as a scalar of type int64" in message
