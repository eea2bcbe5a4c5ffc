"""Images from Parquet files and folders: what they become, and what is said when they cannot be used."""

import resource
import struct
import time
import warnings
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_modules import cache
from data_modules.decoding import BadImageError, Decoder, EncodedImages, color_mode, upright_size
from data_modules.errors import DataError
from data_modules.images import ImagePreprocessing
from tests.sources import (
    COLOUR,
    HEIGHT,
    LABELS,
    WIDTH,
    encode,
    everything,
    images,
    load,
    numbers,
    pixels,
    refusal,
    write,
    write_tree,
)

CPU = torch.device("cpu")


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
    return write_tree(tmp_path / "tree")


@pytest.fixture(params=["cached", "lazy"])
def way(request, monkeypatch):
    """Images kept decoded, and images decoded each time they are gathered."""
    if request.param == "lazy":
        monkeypatch.setattr(cache, "LARGEST", 0)
    return request.param


def labels_of_numbers(split):
    """Return whether each image of a split has its own label."""
    return [LABELS[number] for number in numbers(split)] == everything(split)["labels"].tolist()


# ---- what images become ----------------------------------------------------------------------------------------------


def test_parquet_folder_gives_its_splits_pixels_and_labels(folder, way):
    data = load(folder)
    assert {name: len(split) for name, split in data.splits().items()} == {"train": 18, "validation": 2, "test": 4}
    assert data.class_names == ["0", "1"]
    assert (data.inputs.task, data.inputs.shape) == ("image", (3, HEIGHT, WIDTH))
    test = everything(data.test)
    assert test["labels"].tolist() == [1, 0, 1, 0]
    expected = torch.tensor(np.stack([pixels(number, 3) for number in range(4)])).permute(0, 3, 1, 2)
    assert torch.equal(test["inputs"], expected)
    assert any("no validation split: 2 of 20" in note for note in data.notes)
    assert isinstance(data.train.samples, EncodedImages) == (way == "lazy")


def test_folder_of_images_gives_class_names(tree, way):
    data = load(tree)
    assert data.class_names == ["cat", "dog"]
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 2, 4)
    assert sorted(numbers(data.train) + numbers(data.validation)) == list(range(10))
    assert all(labels_of_numbers(split) for split in data.splits().values())


def test_columns_may_be_named(tmp_path):
    path = write(tmp_path / "a.parquet", column="y", image2=[{"bytes": data, "path": None} for data in COLOUR[::-1]])
    data = load(path, input_columns=("image2",), label_column="y")
    zeros = everything(data.train)["inputs"][data.train.labels == 0]
    odd = {pixels(number, 3).tobytes() for number in range(1, 20, 2)}
    assert {image.permute(1, 2, 0).numpy().tobytes() for image in zeros} <= odd


@pytest.mark.parametrize("named", [(), ("image",)])
@pytest.mark.parametrize("stored", ["bytes", "large", "struct"])
def test_parquet_written_by_other_tools(tmp_path, stored, named):
    column = {
        "bytes": COLOUR,
        "large": pa.array(COLOUR, pa.large_binary()),
        "struct": [{"bytes": data, "path": None} for data in COLOUR],
    }[stored]
    pq.write_table(pa.table({"image": column, "label": LABELS}), tmp_path / "plain.parquet")
    data = load(tmp_path / "plain.parquet", input_columns=named)
    assert data.inputs.shape == (3, HEIGHT, WIDTH) and labels_of_numbers(data.train)


def test_images_in_several_groups_of_rows_keep_their_order(tmp_path):
    table = pq.read_table(write(tmp_path / "one.parquet"))
    table = pa.table(
        {
            name: pa.chunked_array(table[name].combine_chunks().slice(n, 3) for n in range(0, 20, 3))
            for name in table.column_names
        },
        schema=table.schema,
    )
    pq.write_table(table, tmp_path / "groups.parquet", row_group_size=3)
    data = load(tmp_path / "groups.parquet")
    assert labels_of_numbers(data.train)
    assert data.fingerprint == load(tmp_path / "one.parquet").fingerprint


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_images_have_one_channel(tmp_path, mode):
    encoded = [encode(Image.fromarray(pixels(number)).convert(mode)) for number in range(20)]
    data = load(write(tmp_path / "a.parquet", encoded))
    assert data.inputs.shape == (1, HEIGHT, WIDTH)
    assert {image.numpy().tobytes() for image in images(data.train)} <= {pixels(n).tobytes() for n in range(20)}


def test_black_and_white_images_have_one_channel(tmp_path):
    data = load(write(tmp_path / "a.parquet", [encode(pixels(number) > 127) for number in range(20)]))
    assert data.inputs.shape == (1, HEIGHT, WIDTH)
    black_and_white = [((pixels(number) > 127) * np.uint8(255)).tobytes() for number in range(20)]
    assert {image.numpy().tobytes() for image in images(data.train)} <= set(black_and_white)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_keep_the_high_byte(tmp_path, kind):
    deep = [np.random.default_rng(n).integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16) for n in range(20)]
    data = load(write(tmp_path / "a.parquet", [encode(image, kind) for image in deep]))
    assert data.inputs.shape == (1, HEIGHT, WIDTH)
    high = {(image >> 8).astype(np.uint8).tobytes() for image in deep}
    assert {image.numpy().tobytes() for image in images(data.train)} <= high


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK"])
def test_colour_of_every_kind_becomes_red_green_blue(tmp_path, mode):
    colours = [(255, 0, 0), (0, 0, 255)] * 10
    kind = "TIFF" if mode == "CMYK" else "PNG"
    encoded = [encode(Image.new("RGB", (WIDTH, HEIGHT), colour).convert(mode), kind) for colour in colours]
    data = load(write(tmp_path / "a.parquet", encoded))
    assert data.inputs.shape == (3, HEIGHT, WIDTH)
    assert images(data.train)[data.train.labels == 0].amax((0, 2, 3)).tolist() == [255, 0, 0]
    assert images(data.train)[data.train.labels == 1].amin((0, 2, 3)).tolist() == [0, 0, 255]


def test_cmyk_jpeg():
    encoded = encode(Image.new("CMYK", (WIDTH, HEIGHT), (0, 255, 255, 0)), "JPEG", quality=100)
    red, green, blue = Decoder("RGB", HEIGHT, WIDTH, False).decode(encoded).mean((1, 2))
    assert red > 250 and green < 5 and blue < 5


def test_transparent_pixels_become_white():
    rgba = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[0, :, 3], rgba[1, :, 3] = 255, 51  # the first row is opaque, the second a fifth, the others are clear
    for image in (rgba, rgba[..., [0, 3]]):  # RGBA and LA
        decoder = Decoder("RGB" if image.shape[2] == 4 else "L", HEIGHT, WIDTH, False)
        decoded = decoder.decode(encode(image))
        assert (decoded[:, 0] == image[0, 0, :-1, None]).all()
        assert (decoded[:, 1] == 255 - (255 - image[0, 0, :-1, None].astype(int)) // 5).all()
        assert (decoded[:, 2:] == 255).all()


def test_a_palette_with_a_transparent_colour():
    image = Image.new("P", (WIDTH, HEIGHT), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((2, 1), 1)
    decoded = Decoder("RGB", HEIGHT, WIDTH, False).decode(encode(image, transparency=0))
    expected = np.full((3, HEIGHT, WIDTH), 255)
    expected[:, 1, 2] = [200, 100, 50]
    assert np.array_equal(decoded, expected)


def test_a_few_grey_images_among_coloured_become_coloured(tmp_path):
    # Folders are sorted by class: all the first images may be grey.
    small = [encode(pixels(number, height=2, width=2)) for number in range(300)]
    small += [encode(pixels(number, 3, height=2, width=2)) for number in range(300)]
    data = load(write(tmp_path / "a.parquet", small, [0] * 300 + [1] * 300))
    assert data.inputs.shape == (3, 2, 2)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_photographs_are_turned_upright(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the top is at the right-hand side
    upright = np.zeros((WIDTH * 8, HEIGHT * 8, 3), np.uint8)
    upright[: WIDTH * 4] = 255
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    stored = encode(np.rot90(upright).copy(), kind, exif=exif, **options)
    data = load(write(tmp_path / "a.parquet", [stored] * 20))
    assert data.inputs.shape == (3, WIDTH * 8, HEIGHT * 8)
    assert np.abs(images(data.train)[0].permute(1, 2, 0).numpy().astype(int) - upright).max() <= 3


def test_image_size_scales_the_shorter_side_and_crops_the_centre(tmp_path):
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = [10, 200, 30]  # the middle half is of one colour
    tall = wide.transpose(1, 0, 2).copy()
    encoded = [encode(image) for image in (wide, tall)] * 10
    for size in (2, 4, 8):
        data = load(write(tmp_path / f"{size}.parquet", encoded), image_size=size)
        assert data.inputs.shape == (3, size, size)
        assert f"images are scaled, the shorter side to {size} pixels, and cropped to the centre" in data.notes
        if size == 4:
            assert images(data.train).unique(dim=0).tolist() == [[[[value] * 4] * 4 for value in (10, 200, 30)]]


@pytest.mark.parametrize("size", [None, 3])
def test_decoding_on_demand_gives_exactly_the_same(folder, tree, size, monkeypatch):
    for source in (folder, tree):
        kept = load(source, image_size=size)
        with monkeypatch.context() as patch:
            patch.setattr(cache, "LARGEST", 0)
            decoded = load(source, image_size=size)
        assert isinstance(decoded.train.samples, EncodedImages) and not isinstance(kept.train.samples, EncodedImages)
        assert kept.describe() | {"fingerprint": ""} == decoded.describe() | {"fingerprint": ""}
        for name, split in kept.splits().items():
            mine, theirs = everything(split), everything(decoded.splits()[name])
            assert torch.equal(mine["inputs"], theirs["inputs"]) and torch.equal(mine["labels"], theirs["labels"])


def test_the_preprocessing_can_be_made_again(file):
    preprocessing = load(file, image_size=3).preprocessing
    again = ImagePreprocessing.from_description(preprocessing.describe())
    assert (again.column, again.decoder, again.input_spec) == ("image", preprocessing.decoder, preprocessing.input_spec)


# ---- normalisation ---------------------------------------------------------------------------------------------------


def test_normalisation_is_exactly_that_of_the_training_rows(file, way):
    data = load(file, validation_fraction=0.3)
    train = np.stack([pixels(number, 3) for number in numbers(data.train)]).astype(np.float64) / 255
    assert len(train) == 14
    assert data.normalization.scale == 1 / 255
    assert data.normalization.mean == pytest.approx(train.mean((0, 1, 2)), rel=0, abs=1e-12)
    assert data.normalization.std == pytest.approx(train.std((0, 1, 2)), rel=0, abs=1e-12)
    prepared = data.prepare(everything(data.train), CPU)["inputs"].double().transpose(0, 1).flatten(1)
    assert prepared.mean(1).tolist() == pytest.approx([0.0] * 3, abs=1e-5)
    assert prepared.std(1, correction=0).tolist() == pytest.approx([1.0] * 3, abs=1e-5)


def test_normalisation_does_not_see_validation_nor_what_was_left_out(tmp_path):
    def measure(name, replaced):
        encoded = [encode(pixels(50 + row, 3)) if row in replaced else COLOUR[row] for row in range(20)]
        return load(write(tmp_path / f"{name}.parquet", encoded)).normalization

    first = load(write(tmp_path / "first.parquet"))
    assert measure("validation", first.validation.rows.tolist()) == first.normalization
    assert measure("train", first.train.rows.tolist()[:1]) != first.normalization
    bad = first.train.rows.tolist()[3]
    data = load(write(tmp_path / "b.parquet", [*COLOUR[:bad], b"", *COLOUR[bad + 1 :]]), on_bad_sample="skip")
    train = np.stack([pixels(number, 3) for number in numbers(data.train)]).astype(np.float64) / 255
    assert len(train) == 17
    assert data.normalization.mean == pytest.approx(train.mean((0, 1, 2)), rel=0, abs=1e-12)


def test_given_normalisation_is_used(file):
    data = load(file, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6))
    assert (data.normalization.mean, data.normalization.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    batch = everything(data.validation)
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    assert torch.allclose(data.prepare(batch, CPU)["inputs"], (batch["inputs"] / 255 - mean) / std, atol=1e-5)
    message = refusal(file, image_mean=(0.5,), image_std=(0.5,))
    assert message == f"--image_mean: 1 value(s) for images of 3 channel(s) in {file}"


# ---- fingerprint -----------------------------------------------------------------------------------------------------


def test_fingerprint_changes_with_what_is_trained_on(tmp_path, way):
    def fingerprint(name, encoded=COLOUR, labels=LABELS, **options):
        return load(write(tmp_path / f"{name}.parquet", encoded, labels), **options).fingerprint

    pixel = pixels(0, 3)
    pixel[2, 3, 1] ^= 1
    first = fingerprint("first")
    assert fingerprint("again") == first
    assert fingerprint("label", labels=[1, 1, *LABELS[2:]]) != first
    assert fingerprint("pixel", [encode(pixel), *COLOUR[1:]]) != first
    assert fingerprint("order", [*COLOUR[2:4], *COLOUR[:2], *COLOUR[4:]]) != first
    assert fingerprint("size", image_size=3) != first
    assert fingerprint("cut", validation_fraction=0.2) != first


def test_fingerprint_does_not_depend_on_the_place_or_on_the_compression(tmp_path):
    first = load(write_tree(tmp_path / "here")).fingerprint
    there = write_tree(tmp_path / "far" / "away")
    for path in there.rglob("*.png"):
        path.write_bytes(encode(pixels(int(path.stem), 3), compress_level=0))
    assert load(there).fingerprint == first


def test_the_test_split_has_no_part_in_the_fingerprint(folder):
    first = load(folder).fingerprint
    write(folder / "test.parquet", COLOUR[5:7], [1, 0])
    assert load(folder).fingerprint == first


# ---- images that cannot be used --------------------------------------------------------------------------------------


def bomb(side=50_000):
    """Return a PNG of 70 bytes that claims to be of so many pixels a side."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD = {
    "cut PNG": (COLOUR[7][: len(COLOUR[7]) // 2], "truncated"),
    "cut JPEG": (encode(pixels(7, 3, height=40, width=60), "JPEG")[:900], "truncated"),
    "text": (b"hello", "no known image format"),
    "empty": (b"", "no known image format"),
    "bomb": (bomb(), "(2500000000 pixels) exceeds limit"),
    "floating point": (encode(Image.new("F", (WIDTH, HEIGHT), 0.5), "TIFF"), "floating point: convert"),
    "32 bits": (encode(Image.new("I", (WIDTH, HEIGHT), 70_000), "TIFF"), "more than 16 bits: convert"),
    "below zero": (encode(Image.new("I", (WIDTH, HEIGHT), -1), "TIFF"), "more than 16 bits: convert"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_said_of_an_image_that_cannot_be_decoded(name):
    bad, reason = BAD[name]
    with pytest.raises(BadImageError) as caught:
        Decoder("RGB", HEIGHT, WIDTH, False).decode(bad)
    message = str(caught.value)
    assert message.startswith("cannot be decoded (") and message.endswith(")")
    assert reason in message and "object at" not in message and "\n" not in message


def test_images_that_cannot_be_decoded_are_refused_or_left_out(tmp_path, way):
    encoded = [bad for bad, _ in BAD.values()]
    path = write(tmp_path / "a.parquet", [*COLOUR[:3], *encoded, *COLOUR[11:]])
    message = refusal(path)
    assert message.startswith(f"{path}, row 3: the image cannot be decoded (image file is truncated")
    assert message.endswith("). Correct or remove it, or leave such samples out with --on_bad_sample skip")
    data = load(path, on_bad_sample="skip", validation_fraction=0.4)
    assert len(encoded) == len(data.skipped) == 8
    for row, text in enumerate(data.skipped, start=3):
        assert text.startswith(f"{path}, row {row}: the image cannot be decoded (")
    assert f"left out 8 bad sample(s), first {data.skipped[0]}" in data.notes
    assert sorted(numbers(data.train) + numbers(data.validation)) == [*range(3), *range(11, 20)]
    assert labels_of_numbers(data.train) and labels_of_numbers(data.validation)


def test_the_bad_image_may_be_the_first_and_labels_may_be_text(tmp_path, way):
    for bad in (COLOUR[0][:60], b"hello", None):
        path = write(tmp_path / "a.parquet", [bad, *COLOUR[1:]], ["a", "b"] * 10, "string")
        assert refusal(path).startswith(f"{path}, row 0: ")
        data = load(path, on_bad_sample="skip")
        assert sorted(numbers(data.train) + numbers(data.validation)) == list(range(1, 20))
        assert labels_of_numbers(data.train)


def test_good_images_are_found_among_bad_ones(tmp_path):
    # All that are looked at to find size and mode are bad: every second one is.
    small = [encode(pixels(number, 3, height=2, width=2)) if number % 2 else b"bad" for number in range(520)]
    path = write(tmp_path / "a.parquet", small, [0, 0, 1, 1] * 130)
    write(tmp_path / "validation.parquet", small[:4], [0, 0, 1, 1])
    data = load(tmp_path / "*.parquet", on_bad_sample="skip")
    assert path.exists() and data.inputs.shape == (3, 2, 2) and (len(data.train), len(data.validation)) == (260, 2)
    assert len(data.skipped) == 262


def test_a_bomb_is_refused_at_once_and_takes_no_memory():
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(BadImageError, match="exceeds limit"):
        Decoder("RGB", HEIGHT, WIDTH, True).decode(bomb())
    with pytest.raises(BadImageError):
        upright_size(bomb())
    with pytest.raises(BadImageError, match="exceeds limit"):
        Decoder("RGB", HEIGHT, WIDTH, True).decode(bomb(10_000))  # Pillow alone would only warn
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_missing_image_names_the_row(tmp_path, way):
    path = write(tmp_path / "a.parquet", [*COLOUR[:7], None, *COLOUR[8:]])
    assert refusal(path).startswith(f"{path}, row 7: has no image. Correct or remove it")
    data = load(path, on_bad_sample="skip")
    assert sorted(numbers(data.train) + numbers(data.validation)) == [*range(7), *range(8, 20)]


def test_missing_image_in_a_folder_of_save_to_disk(tmp_path):
    cells = [None if row == 7 else {"bytes": COLOUR[row], "path": None} for row in range(20)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_dict({"image": cells, "label": LABELS}, features=features)
    data.save_to_disk(str(tmp_path / "d"))
    assert refusal(tmp_path / "d").startswith(f"{tmp_path / 'd'}, split 'train', row 7: has no image.")
    loaded = load(tmp_path / "d", on_bad_sample="skip")
    assert sorted(numbers(loaded.train) + numbers(loaded.validation)) == [*range(7), *range(8, 20)]


def test_bad_file_in_a_folder_of_images_is_named(tree, way):
    path = tree / "train" / "dog" / "3.png"
    path.write_bytes(b"hello")
    assert f": {path} cannot be decoded (no known image format)" in refusal(tree)
    data = load(tree, on_bad_sample="skip")
    assert sorted(numbers(data.train) + numbers(data.validation)) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert labels_of_numbers(data.train) and str(path) in data.skipped[0]


def test_file_that_a_parquet_names_but_is_not_there(tmp_path, way):
    column = [{"bytes": data, "path": None} for data in COLOUR[:-1]] + [{"bytes": None, "path": "/no/such.png"}]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": column, "label": LABELS}), path)
    said = f"{path}, row 19: /no/such.png cannot be read (No such file or directory)"
    assert refusal(path).startswith(said)
    assert load(path, on_bad_sample="skip").skipped == [said]


def test_file_that_a_table_beside_the_images_names_but_is_not_there(tmp_path):
    folder = write_tree(tmp_path / "tree", (("train", 10),)) / "train"
    names = [f"{'dog' if number % 2 else 'cat'}/{number}.png" for number in range(10)]
    names[4] = "cat/99.png"
    lines = [f"{name},{number % 2}" for number, name in enumerate(names)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    assert f": {folder / 'cat' / '99.png'} cannot be read (No such file or directory)" in refusal(folder.parent)
    data = load(folder.parent, on_bad_sample="skip")
    assert sorted(numbers(data.train) + numbers(data.validation)) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert labels_of_numbers(data.train) and data.class_names == ["0", "1"]


def test_bad_images_of_a_test_split_are_left_out_there(folder):
    write(folder / "test.parquet", [*COLOUR[:2], b"", COLOUR[3]], [0, 1, 0, 1])
    assert f"{folder / 'test.parquet'}, row 2: the image cannot be decoded" in refusal(folder)
    data = load(folder, on_bad_sample="skip")
    assert numbers(data.test) == [0, 1, 3] and labels_of_numbers(data.test)
    assert numbers(data.train) and len(data.train) + len(data.validation) == 20


def test_a_split_without_any_usable_image(folder):
    write(folder / "test.parquet", [b"bad"] * 4, [0, 1, 0, 1])
    assert refusal(folder, on_bad_sample="skip") == "split 'test' has no usable sample left, of 4"
    write(folder / "train.parquet", [b"bad"] * 20)
    assert refusal(folder, on_bad_sample="skip") == "split 'train' has no usable sample left, of 20"
    assert f"{folder / 'train.parquet'}, row 0: the image cannot be decoded" in refusal(folder)


def test_bad_images_that_leave_nothing_to_validate_on_or_one_class(tmp_path):
    cut = load(write(tmp_path / "a.parquet")).validation.rows.tolist()
    bad = [b"" if row in cut else COLOUR[row] for row in range(20)]
    message = refusal(write(tmp_path / "b.parquet", bad), on_bad_sample="skip")
    assert message == "split 'train' has no usable sample left for validation, of 2"
    bad = [b"" if LABELS[row] and row not in cut else COLOUR[row] for row in range(20)]
    message = refusal(write(tmp_path / "c.parquet", bad), on_bad_sample="skip")
    assert "the training split has one class only ('0' in column 'label')" in message


@pytest.mark.parametrize("skip", ["stop", "skip"])
def test_images_of_different_sizes_name_the_row_and_the_way_out(tmp_path, way, skip):
    path = write(tmp_path / "a.parquet", [*COLOUR[:7], encode(pixels(0, 3, height=5, width=5)), *COLOUR[8:]])
    assert refusal(path, on_bad_sample=skip) == (
        f"{path}, row 7: the image is 5 x 5 pixels (height x width), the first image 4 x 6; train with "
        "--image_size N to scale all to N x N"
    )
    assert load(path, image_size=4).inputs.shape == (3, 4, 4)


def test_splits_of_different_sizes(folder):
    write(folder / "test.parquet", [encode(pixels(0, 3, height=5, width=5))] * 4, [0, 1, 0, 1])
    assert f"{folder / 'test.parquet'}, row 0: the image is 5 x 5 pixels" in refusal(folder)


def test_an_image_that_goes_bad_during_a_run_is_named(tree, monkeypatch):
    monkeypatch.setattr(cache, "LARGEST", 0)
    data = load(tree)
    for path in (tree / "train").rglob("*.png"):
        path.write_bytes(b"gone")
    with pytest.raises(DataError, match=r"row \d+: .*\.png cannot be decoded \(no known"):
        everything(data.train)


DAMAGED = [
    encode(image, kind)
    for image, kind in [
        (pixels(0, 3), "PNG"),
        (pixels(0, 3), "JPEG"),
        (pixels(0, 3), "GIF"),
        (pixels(0, 3), "BMP"),
        (pixels(0, 3), "WEBP"),
        (pixels(0).astype(np.uint16), "PNG"),
        (pixels(0, 2), "PNG"),
        (pixels(0, 3), "TIFF"),
    ]
]


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from(DAMAGED), st.lists(st.tuples(st.integers(0, 999), st.integers(0, 255)), max_size=4), st.floats(0, 1)
)
def test_damage_of_any_kind_is_a_bad_image_and_nothing_else(encoded, changes, kept):
    damaged = bytearray(encoded)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    damaged = bytes(damaged[: round(kept * len(damaged))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert color_mode([damaged]) in ("L", "RGB")
        for use in (upright_size, Decoder("RGB", HEIGHT, WIDTH, False).decode):
            said = ""
            try:
                use(damaged)
            except (BadImageError, DataError) as error:  # the latter where only the size was hit
                said = str(error)
            assert "\n" not in said
