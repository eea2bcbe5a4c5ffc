"""A stream read in blocks: every row once an epoch, in an order that does not depend on processes or restarts."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_modules import stream
from data_modules.augmentation import Augmentation
from data_modules.errors import DataError
from data_modules.load import load_data
from data_modules.options import DataOptions
from data_modules.training_loader import build_training_loader

ROWS, BLOCK, BATCH = 103, 24, 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", BLOCK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Points whose one number is their row, in three shards."""
    path = tmp_path_factory.mktemp("stream")
    for shard, rows in enumerate((range(40), range(40, 41), range(41, ROWS))):
        columns = {"point": [[float(row)] for row in rows], "label": [row % 2 for row in rows]}
        pq.write_table(pa.table(columns), path / f"train-{shard}.parquet", row_group_size=7)
    pq.write_table(pa.table({"point": [[0.0], [1.0]], "label": [0, 1]}), path / "test.parquet")
    return path


def load(folder, **more):
    return load_data(DataOptions(dataset=str(folder), streaming=True, validation_split="test", **more))


def loader(data, processes=1, rank=0, place=None, remember=lambda place: None, slots=4):
    return build_training_loader(
        data, batch_size=BATCH, num_slots=slots, rank=rank, num_processes=processes, device=torch.device("cpu"),
        num_workers=0, seed=3, augmentation=Augmentation(), balanced=False, place=place, remember=remember,
    )  # fmt: skip


def rows_of(batches):
    """Return the rows of each slot by batch and slot number."""
    return [
        {slot.number: slot.batch["inputs"][: slot.count, 0].int().tolist() for slot in batch.slots} for batch in batches
    ]


def flat(batches):
    return [row for batch in batches for number in sorted(batch) for row in batch[number]]


def test_every_row_comes_once_an_epoch_in_another_order_each(folder):
    feed = loader(load(folder))
    assert feed.num_samples == ROWS
    epochs = [flat(rows_of(feed.batches(epoch, 0))) for epoch in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(ROWS))
        for first in range(0, ROWS, BLOCK):  # shuffled inside a block
            assert set(order[first : first + BLOCK]) == set(range(first, min(first + BLOCK, ROWS)))
            assert order[first : first + BLOCK] != sorted(order[first : first + BLOCK])
    assert epochs[0] != epochs[1] != epochs[2]
    inside = [[[row % BLOCK for row in order[first : first + BLOCK]] for first in (0, BLOCK)] for order in epochs]
    assert inside[0][0] != inside[0][1]


def test_samples_belong_to_their_labels(folder):
    for batch in loader(load(folder)).batches(0, 0):
        for slot in batch.slots:
            assert torch.equal(slot.batch["inputs"][:, 0].long() % 2, slot.batch["labels"])


def test_processes_share_the_same_batches(folder):
    data = load(folder)
    alone = rows_of(loader(data).batches(1, 0))
    for processes in (2, 4):
        parts = [rows_of(loader(data, processes, rank).batches(1, 0)) for rank in range(processes)]
        assert [{number: rows for part in batch for number, rows in part.items()} for batch in zip(*parts)] == alone


@pytest.mark.parametrize("start", range(0, ROWS, BATCH))
def test_resuming_anywhere_gives_the_rest(folder, start):
    """With the place that was remembered, with an older one, and with none."""
    data, places = load(folder), []
    feed = loader(data, remember=lambda place: places.append(json.loads(json.dumps(place))))
    whole = rows_of(feed.batches(1, 0))
    used = places[: start // BLOCK + 1]
    for place in (used[-1], used[0], None):
        assert rows_of(loader(load(folder), place=place).batches(1, start)) == whole[start // BATCH :]


def test_a_place_saves_reading(folder, monkeypatch):
    """What comes before the block is not read again."""
    places = []
    feed = loader(load(folder), remember=places.append)
    list(feed.batches(0, 0))
    data = load(folder)
    numbers = []
    inner = stream.Stream._hold
    monkeypatch.setattr(stream.Stream, "_hold", lambda self, table: numbers.append(len(table)) or inner(self, table))
    started = data.stream.rows.data.with_format("arrow")
    started.load_state_dict(places[3]["state"])
    assert sum(len(table) for table in started.iter(batch_size=BLOCK)) == ROWS - 3 * BLOCK
    next(loader(data, place=places[3]).batches(0, 3 * BLOCK))
    assert numbers == [BLOCK]


def test_a_later_place_of_another_epoch_is_of_no_use_and_does_no_harm(folder):
    places = []
    list(loader(load(folder), remember=places.append).batches(0, 0))
    again = rows_of(loader(load(folder), place=places[-1]).batches(1, 0))
    assert again == rows_of(loader(load(folder)).batches(1, 0))


def test_a_place_of_blocks_of_another_size_is_of_no_use_and_does_no_harm(folder, monkeypatch):
    places = []
    list(loader(load(folder), remember=places.append).batches(0, 0))
    monkeypatch.setattr(stream, "BLOCK", 2 * BLOCK)
    for place in (places[1], None):
        rows = flat(rows_of(loader(load(folder), place=place).batches(0, 2 * BLOCK)))
        assert sorted(rows) == list(range(2 * BLOCK, ROWS))


def test_blocks_tell_the_loader_where_they_begin(folder, monkeypatch):
    firsts = []
    inner = stream.TrainingLoader
    monkeypatch.setattr(stream, "TrainingLoader", lambda **more: firsts.append(more["first_index"]) or inner(**more))
    list(loader(load(folder)).batches(0, 0))
    assert firsts == list(range(0, ROWS, BLOCK))


def test_a_stream_that_has_other_rows_than_it_says(folder):
    data = load(folder)
    object.__setattr__(data.stream, "num_samples", ROWS + 1)
    with pytest.raises(DataError, match=r"has 103 rows, not 104 as at the start"):
        list(loader(data).batches(0, 0))


def test_bad_rows_of_a_stream(tmp_path):
    """A later block has a missing label and a number that is none."""
    points = [[float(row)] for row in range(60)]
    points[50] = [float("nan")]
    labels = [row % 2 for row in range(60)]
    labels[30] = None
    pq.write_table(pa.table({"point": points, "label": labels}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"point": points[:4], "label": labels[:4]}), tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"train.parquet, row 30: label None in column 'label' is missing"):
        list(loader(load(tmp_path)).batches(0, 0))
    rows = flat(rows_of(loader(load(tmp_path, on_bad_sample="skip")).batches(0, 0)))
    assert len(rows) == 60
    assert 30 not in rows and 50 not in rows
    assert set(rows) == set(range(60)) - {30, 50}


def test_what_cannot_be_streamed(folder, tmp_path):
    with pytest.raises(DataError, match="no validation split"):
        load_data(DataOptions(dataset=str(folder / "train-0.parquet"), streaming=True))
    (tmp_path / "train.csv").write_text("x,label\n1,a\n")
    with pytest.raises(DataError, match="read whole"):
        load_data(DataOptions(dataset=str(tmp_path / "train.csv"), streaming=True))
