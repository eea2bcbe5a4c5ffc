"""Texts as token numbers, padded behind. Legend: N and B samples, L tokens of a padded text, T of all."""

from __future__ import annotations

import json
import multiprocessing
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_modules.errors import DataError
from data_modules.options import DataOptions
from data_modules.rows import Rows
from data_modules.splits import Batch, InputSpec, fingerprint_tensors

if TYPE_CHECKING:
    import tokenizers

PADDING, UNKNOWN = 0, 1  # token numbers; UNKNOWN also stands for a text without a token
MANY_UNKNOWN = 0.2  # share of the words that are not in the vocabulary: worth a line
RESERVED = 2  # a given tokenizer's numbers are moved up by this: its own 0 may be any token
CHUNK = 1000  # texts whose encodings, some 100 bytes a token, are held at once
SHOWN = 100  # characters of a sample's text in the look before a run


def round_up(length: int) -> int:
    """Return the length of a batch whose longest text has so many tokens: torch.compile then sees fewer shapes."""
    return -(-length // 8) * 8


@dataclass(frozen=True)
class Texts:
    """Token numbers of all texts, one behind the other."""

    tokens: torch.Tensor  # int32 [T]
    offsets: torch.Tensor  # where each text begins in `tokens`, and where the last ends, int64 [N + 1]
    cut: torch.Tensor  # whether a text was longer than was kept, bool [N]
    empty: int  # texts without a token, each kept as one UNKNOWN

    def __len__(self) -> int:
        return len(self.cut)

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each text, 1 or more, int64 [N]."""
        return self.offsets.diff()

    @property
    def truncated(self) -> int:
        """Texts that were cut."""
        return int(self.cut.sum())

    def gather(self, indices: torch.Tensor) -> Batch:
        """Return the texts at int64 `indices` [B]: tokens [B, L], 0 behind a text's end, and lengths [B], both int64.

        L is the longest text's length, rounded up to a multiple of 8.
        """
        starts, lengths = self.offsets[indices], self.offsets[indices + 1] - self.offsets[indices]
        places_L = torch.arange(round_up(int(lengths.max())))
        padding_BL = places_L >= lengths[:, None]
        places_BL = (starts[:, None] + places_L).masked_fill_(padding_BL, 0)
        return {"tokens": self.tokens[places_BL].long().masked_fill_(padding_BL, PADDING), "lengths": lengths}

    def fingerprint(self) -> str:
        """Return a checksum of the tokens and of where texts begin."""
        return fingerprint_tensors(self.tokens, self.offsets)


@dataclass(frozen=True)
class TextPreprocessing:
    """Turns a column of texts into token numbers, by a vocabulary of words or a given tokenizer."""

    column: str
    max_length: int  # tokens of a text, those that the tokenizer adds included
    tokenizer: tokenizers.Tokenizer
    shift: int  # is added to the tokenizer's numbers: 0 of our own vocabulary, else RESERVED

    def __post_init__(self) -> None:
        from tokenizers import models

        # A file may ask for padding, which would count as text, and for another length.
        self.tokenizer.no_padding()
        # The library's own cut leaves a closing token such as [SEP] in place.
        self.tokenizer.enable_truncation(self.max_length)
        # Random merges, meant for training: the same text would get other tokens each time.
        if isinstance(self.tokenizer.model, models.BPE):
            self.tokenizer.model.dropout = None

    @property
    def input_spec(self) -> InputSpec:
        """What a model must know: numbers are below `vocabulary_size`, padding and unknown included."""
        last = max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        return InputSpec("text", vocabulary_size=last + 1 + self.shift, max_length=round_up(self.max_length))

    def encode(self, rows: Rows) -> Texts:
        """Return the texts of the column. Rows without text are rejected and hold one UNKNOWN.

        Raises:
            DataError: a row has no text and bad samples are not to be skipped, or the tokenizer fails.
        """
        _use_one_thread_in_children()
        added = self.tokenizer.num_special_tokens_to_add(False)
        tokens, lengths, cut, empty = array("i"), [0], [], 0
        for texts in _read_texts(rows, self.column):
            try:
                encodings = self.tokenizer.encode_batch_fast([text or "" for text in texts])
            except Exception as error:  # the library raises nothing narrower
                place = f"split {rows.name!r}, column {self.column!r}"
                raise DataError(f"{place}: the tokenizer cannot encode it: {_first_line(error)}") from error
            for text, encoding in zip(texts, encodings):
                numbers = encoding.ids
                tokens.extend(numbers or [UNKNOWN - self.shift])
                lengths.append(len(numbers) or 1)
                cut.append(bool(encoding.overflowing))
                empty += text is not None and len(numbers) <= added
        numbers_T = torch.from_numpy(np.asarray(tokens)) + self.shift
        return Texts(numbers_T, torch.tensor(lengths).cumsum(0), torch.tensor(cut, dtype=torch.bool), empty)

    def decode(self, numbers: torch.Tensor) -> str:
        """Return token numbers [L] as text, special tokens and [UNK] included."""
        if self.shift and numbers.tolist() == [UNKNOWN]:
            return "[UNK]"
        return self.tokenizer.decode((numbers - self.shift).tolist(), skip_special_tokens=False)

    def describe(self) -> dict[str, Any]:
        """Return plain values with the whole tokenizer, in the form of a tokenizer.json file."""
        return {
            "column": self.column,
            "max_length": self.max_length,
            "shift": self.shift,
            "tokenizer": json.loads(self.tokenizer.to_str()),
        }

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> TextPreprocessing:
        """Return the preprocessing that `describe` described."""
        from tokenizers import Tokenizer

        return cls(**{**description, "tokenizer": Tokenizer.from_str(json.dumps(description["tokenizer"]))})


def fit_text(
    rows: Rows, chosen: torch.Tensor, column: str, options: DataOptions
) -> tuple[TextPreprocessing, list[str]]:
    """Make a vocabulary from the `chosen` rows, int64, or open the tokenizer that the options name.

    A vocabulary has the `vocab_size` most frequent words, of equally frequent ones the first in code point order,
    that occur `min_count` times or more; [PAD] and [UNK] are not counted. Words are lower-cased runs of letters,
    digits and underscores, or of other signs.

    Returns:
        The preprocessing, and what was decided on the user's behalf.

    Raises:
        DataError: a chosen row has no text, no word is frequent enough, or the tokenizer cannot be used.
    """
    if options.tokenizer is not None:
        tokenizer = _open_tokenizer(options.tokenizer)
        added = tokenizer.num_special_tokens_to_add(False)
        if options.max_length <= added:
            raise DataError(
                f"--max_length {options.max_length}: the tokenizer adds {added} tokens of its own to each text; give "
                f"{added + 1} or more"
            )
        return TextPreprocessing(column, options.max_length, tokenizer, shift=RESERVED), []

    words = _frequent_words(rows, chosen, column, options.vocab_size, options.min_count)
    if not words:
        raise DataError(
            f"split {rows.name!r}, column {column!r}: no word occurs {options.min_count} times in the training rows; "
            "lower --min_count or name another column with --input_columns"
        )
    kept = "the most frequent" if len(words) == options.vocab_size else f"all that occur {options.min_count}+ times"
    note = f"vocabulary: {len(words):,} words, {kept} in column {column!r} of the training rows"
    vocabulary = {"[PAD]": PADDING, "[UNK]": UNKNOWN, **{word: RESERVED + i for i, word in enumerate(words)}}
    return TextPreprocessing(column, options.max_length, _word_tokenizer(vocabulary), shift=0), [note]


def count_changes(texts: Texts, rows: torch.Tensor, max_length: int) -> list[str]:
    """Return lines that say how many of the texts at int64 `rows` were cut, and how many words are not known."""
    lines = []
    cut = int(texts.cut[rows].sum())
    if cut:
        lines.append(f"{cut:,} of {len(rows):,} texts were cut to --max_length {max_length} tokens")
    unknown = float((texts.tokens == UNKNOWN).float().mean())
    if unknown > MANY_UNKNOWN:
        lines.append(f"{unknown:.0%} of the words are not in the vocabulary; raise --vocab_size or lower --min_count")
    return lines


def sample_lines(
    preprocessing: TextPreprocessing,
    texts: Texts,
    indices: torch.Tensor,
    class_names: list[str],
    labels: torch.Tensor,
) -> list[str]:
    """Return a line for each text at int64 `indices`: label, number of tokens, and the text as the network sees it.

    Args:
        preprocessing: what made the texts.
        texts: the samples.
        indices: which to show.
        class_names: names of the label numbers.
        labels: label numbers of those that are shown, int64.
    """
    lines = []
    for index, label in zip(indices.tolist(), labels.tolist()):
        numbers = texts.tokens[texts.offsets[index] : texts.offsets[index + 1]]
        # Line breaks and a terminal's control characters do not belong in a line.
        text = "".join(sign if sign.isprintable() else " " for sign in preprocessing.decode(numbers))
        shown = text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
        count = f"{len(numbers)} token" + "s" * (len(numbers) > 1) + " (cut)" * bool(texts.cut[index])
        lines.append(f"{class_names[label]}, {count}: {shown}")
    return lines


def _read_texts(rows: Rows, column: str, chosen: torch.Tensor | None = None) -> Iterator[list[str | None]]:
    """Yield the column's texts in blocks; None stands for a row without text, which is rejected."""
    data = rows.data.select_columns([column]).with_format(None)
    for part in (torch.arange(len(rows)) if chosen is None else chosen).split(CHUNK):
        texts = data[part.tolist()][column]
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                found = "is empty" if text is None else f"holds {type(text).__name__}, not text"
                rows.reject(int(part[place]), f"column {column!r} {found}")
                texts[place] = None
        yield texts


def _frequent_words(rows: Rows, chosen: torch.Tensor, column: str, most: int, min_count: int) -> list[str]:
    from tokenizers import trainers

    _use_one_thread_in_children()
    tokenizer = _word_tokenizer({})
    texts = ([text for text in block if text] for block in _read_texts(rows, column, chosen))
    # Without special tokens: the trainer would let them be found in texts, so that "[PAD]" became padding.
    trainer = trainers.WordLevelTrainer(
        vocab_size=most, min_frequency=min_count, show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(texts, trainer)
    ranks = tokenizer.get_vocab()
    return sorted(ranks, key=ranks.__getitem__)


def _word_tokenizer(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def _open_tokenizer(name: str) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    path = Path(name).expanduser()
    wanted = "give a tokenizer.json file or a hub id"
    if path.is_dir():
        raise DataError(f"--tokenizer {name}: is a folder; {wanted}")
    # The hub would be asked six times, for half a minute.
    if not path.is_file() and (name.endswith(".json") or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise DataError(f"--tokenizer {name}: no such file; {wanted}")
    try:
        return Tokenizer.from_file(str(path)) if path.is_file() else Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises nothing narrower, the hub's client many kinds
        failed = "cannot be read" if path.is_file() else "is no file, and on the hub"
        raise DataError(f"--tokenizer {name}: {failed}: {_first_line(error)}; {wanted}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".!")


def _use_one_thread_in_children() -> None:
    """Keep the library from waiting for ever, in a forked process, for threads that only its parent has.

    It sees to that itself (tokenizers 0.23), but not where the user has set TOKENIZERS_PARALLELISM=true.
    """
    if multiprocessing.parent_process() is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
