"""What a user may say of a data set; a script's settings inherit it. Imports no torch: --help answers at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Task = Literal["image", "text", "table", "points"]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where samples come from and what they become. Empty or None means: find out."""

    dataset: str = "digits"
    """digits, blobs, breast_cancer, wine; a folder of images; a .csv, .tsv, .parquet or .jsonl file, folder or
    glob; a folder written by save_to_disk; or a hub id."""
    dataset_config: str | None = None
    """Configuration of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    streaming: bool = False
    """Read the training split as a stream, in blocks, instead of holding it."""
    task: Literal["auto", "image", "text", "table", "points"] = "auto"
    """Kind of the samples. Default: found from the columns."""
    input_columns: tuple[str, ...] = ()
    """Columns that hold the sample: one of images, texts or lists of numbers, or several of a table. Default: found
    by type; of a table all but the label."""
    categorical_columns: tuple[str, ...] = ()
    """Columns of a table that hold categories although they look like numbers."""
    label_column: str | None = None
    """Column that holds the labels. Default: found by type and name."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str | None = None
    """Split to validate on. Default: the one named so, else cut from the training split."""
    test_split: str | None = None
    """Split for the score at the end. Default: the one named so, else none."""
    validation_fraction: float = 0.1
    """Share of the training split that is cut for validation where there is no such split."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """stop: refuse data with a sample that cannot be used. skip: leave such samples out and list them in the run."""
    image_size: int | None = None
    """Scale the shorter side of all images to this many pixels and crop the centre."""
    image_mean: tuple[float, ...] = ()
    """Mean of each channel, of pixels in [0, 1]. Default: measured on the training split."""
    image_std: tuple[float, ...] = ()
    """Standard deviation of each channel, of pixels in [0, 1]. Default: measured on the training split."""
    tokenizer: str | None = None
    """tokenizer.json file or hub id. Default: words of the training split."""
    vocab_size: int = 20_000
    """Words in the vocabulary that is made from the training split."""
    min_count: int = 2
    """Occurrences in the training split that a word needs to enter the vocabulary."""
    max_length: int = 256
    """Tokens of a text; the rest is cut off."""

    def conditions(self) -> Iterator[tuple[bool, str, str]]:
        """Yield, for each rule, whether it holds, the setting, and what it must be."""
        yield bool(self.dataset.strip()), "dataset", "a name, a path or a hub id"
        yield 0 < self.validation_fraction < 1, "validation_fraction", "above 0 and below 1"
        yield (self.image_size or 1) <= 8192, "image_size", "8192 or less"
        for name in ("image_size", "vocab_size", "min_count", "max_length"):
            value = getattr(self, name)
            yield value is None or value >= 1, name, "1 or more"
        yield len(self.image_mean) == len(self.image_std), "image_mean", "given together with image_std, of one length"
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            yield all(0 < value <= 1 for value in values), name, "of pixels in [0, 1]: above 0 and at most 1"
