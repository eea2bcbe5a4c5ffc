"""Data sets of images on the disk, and what loading them gives or says."""

import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from data_modules.errors import DataError
from data_modules.load import load_data
from data_modules.options import DataOptions

HEIGHT, WIDTH = 4, 6


def pixels(number, *channels, height=HEIGHT, width=WIDTH):
    """Return random uint8 pixels [H, W, *channels], others for each number."""
    return np.random.default_rng(number).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def encode(image, kind="PNG", **options):
    """Return an image file's bytes."""
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


def write_tree(folder, splits=(("train", 10), ("test", 4))):
    """Write a folder of images, a folder for each class, in splits of the given sizes."""
    for split, size in splits:
        for number in range(size):
            path = folder / split / ("dog" if number % 2 else "cat") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(COLOUR[number])
    return folder


def load(source, **options):
    """Load a data set."""
    return load_data(DataOptions(dataset=str(source), **options))


def refusal(source, **options):
    """Return what is said, on one line, when the data set is refused."""
    with pytest.raises(DataError) as caught:
        load(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def everything(split):
    """Return all samples of a split."""
    return split.gather(torch.arange(len(split)))


def images(split):
    """Return the images of a split, uint8 [N, C, H, W]."""
    return everything(split)["inputs"]


def numbers(split):
    """Return, for each image of a split, which of `COLOUR` it is."""
    known = {pixels(number, 3).tobytes(): number for number in range(20)}
    return [known[image.permute(1, 2, 0).numpy().tobytes()] for image in images(split)]
