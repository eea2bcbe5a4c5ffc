"""The sinusoids are what they are said to be, files come in as they were written, and bad ones are refused by row."""

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from data_modules.errors import DataError
from data_modules.frequency import load_sequence, make_sinusoids
from train.stateful_lstm import SPLITS, StatefulSettings, describe, load_splits

ROWS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
CHOSEN = [[0.5, 1, 0, 7], [0.5, 0, 1, 8], [0.5, 0, 1, 9], [0.5, 1, 0, 6]]


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def made():
    return {split: make_sinusoids(split) for split in SPLITS}


def save(folder, rows, name="rows.npy"):
    path = folder / name
    np.save(path, rows, allow_pickle=True)
    return path


def write(folder, text, name="rows.csv"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path):
    """Return what is said, on one line that begins with the file, when it is refused."""
    with pytest.raises(DataError) as caught:
        load_sequence(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


# ---- the sinusoids ---------------------------------------------------------------------------------------------------


def test_there_are_40_000_samples_of_five_inputs_and_a_target(made):
    for sequence in made.values():
        assert len(sequence) == 40_000
        assert sequence.inputs.shape == (40_000, 5) and sequence.targets.shape == (40_000, 1)
        assert sequence.inputs.dtype == sequence.targets.dtype == torch.float32


def test_targets_are_the_chosen_sinusoids_without_noise(made):
    for row, frequency in ((0, 1), (123, 1), (9_999, 1), (10_250, 3), (25_001, 5), (30_007, 7), (39_999, 7)):
        seconds = row % 10_000 / 1000
        expected = np.sin(2 * np.pi * frequency * seconds)
        assert float(made["train"].targets[row, 0]) == pytest.approx(expected, abs=1e-7), row


def test_one_hot_columns_choose_the_frequency(made):
    sequence = made["test"]
    assert list(sequence.groups) == ["1 Hz", "3 Hz", "5 Hz", "7 Hz"]
    for number, members in enumerate(sequence.groups.values()):
        assert members.equal(torch.arange(10_000 * number, 10_000 * (number + 1)))
        assert sequence.inputs[members, 1:].equal(torch.eye(4)[number].expand(10_000, 4))


def test_the_mixture_is_the_mean_of_four_with_amplitudes_of_0_8_to_1_2():
    """Drawn again here: all amplitudes first, then all phases."""
    noise = np.random.default_rng(2)
    amplitude, phase = noise.uniform(0.8, 1.2, (4, 10_000)), noise.uniform(-0.04 * np.pi, 0.04 * np.pi, (4, 10_000))
    mixed = make_sinusoids("validation").inputs[:, 0]
    for row in (0, 1, 2_718, 9_999, 10_000, 31_415, 39_999):
        instant = row % 10_000
        waves = [
            amplitude[wave, instant] * np.sin(2 * np.pi * frequency * instant / 1000 + phase[wave, instant])
            for wave, frequency in enumerate((1, 3, 5, 7))
        ]
        assert float(mixed[row]) == pytest.approx(sum(waves) / 4, abs=1e-6), row


def test_the_mixture_is_noise_around_the_mean_of_the_sinusoids(made):
    clean = torch.stack([made["train"].targets[start : start + 10_000, 0] for start in range(0, 40_000, 10_000)])
    mixed = made["train"].inputs[:10_000, 0]
    distance = mixed - clean.mean(dim=0)
    assert mixed.abs().max() <= 1.2 and 0.02 < float(distance.std()) < 0.1
    assert float(distance.abs().max()) < 0.2 + 0.02 * 2 * np.pi * 1.2
    averages = distance.unfold(0, 500, 500).mean(dim=1)  # noise that is new at every sample averages out
    assert float(averages.abs().max()) < 5 * float(distance.std()) / 500**0.5


def test_every_frequency_has_the_same_mixture(made):
    parts = made["train"].inputs[:, 0].reshape(4, 10_000)
    assert all(part.equal(parts[0]) for part in parts)


def test_splits_differ_by_their_noise_only(made):
    one, *others = made.values()
    for other in others:
        assert other.targets.equal(one.targets) and other.inputs[:, 1:].equal(one.inputs[:, 1:])
        assert not (other.inputs[:, 0] == one.inputs[:, 0]).all()
    assert len({sequence.fingerprint() for sequence in made.values()}) == 3


def test_sinusoids_are_the_same_each_time_whatever_was_drawn_before(made):
    np.random.seed(7)
    torch.manual_seed(7)
    assert make_sinusoids("train").fingerprint() == made["train"].fingerprint()


def test_without_a_file_the_sinusoids_are_made(made):
    data = load_splits(StatefulSettings())
    assert list(data) == list(SPLITS)
    described = describe(data, "sinusoids")
    assert described["fingerprint"] == made["train"].fingerprint()
    assert described["splits"]["test"] == {
        "samples": 40_000,
        "columns": 5,
        "fingerprint": made["test"].fingerprint(),
    }


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i8", "|u1", "<u8"])
def test_npy_comes_in_as_it_was_written(tmp_path, dtype):
    rows = (ROWS * 50 + 200).astype(dtype)
    sequence = load_sequence(save(tmp_path, rows))
    assert sequence.inputs.dtype == sequence.targets.dtype == torch.float32
    assert np.array_equal(sequence.inputs.numpy(), rows[:, :-1].astype(np.float32))
    assert np.array_equal(sequence.targets.numpy(), rows[:, -1:].astype(np.float32))


def test_npy_in_the_order_of_columns(tmp_path):
    sequence = load_sequence(save(tmp_path, np.asfortranarray(ROWS)))
    assert np.array_equal(torch.cat([sequence.inputs, sequence.targets], dim=1).numpy(), ROWS)
    assert sequence.fingerprint() == load_sequence(save(tmp_path, ROWS, "other.npy")).fingerprint()


@pytest.mark.parametrize("start", ["", "a,b,c,target\n", "\ufeffa,b,c,target\r\n", '"a","b","c","t"\n\n', "\n"])
def test_csv_with_and_without_names_gives_what_npy_gives(tmp_path, start):
    lines = [",".join(repr(float(value)) for value in row) for row in ROWS]
    text = write(tmp_path, start + "\n".join(lines) + "\n")
    assert load_sequence(text).fingerprint() == load_sequence(save(tmp_path, ROWS)).fingerprint()


def test_csv_of_integers_and_blanks_around_numbers(tmp_path):
    sequence = load_sequence(write(tmp_path, "1, 2,3\n4 ,5,-6e0\n"))
    assert sequence.inputs.tolist() == [[1, 2], [4, 5]] and sequence.targets.tolist() == [[3], [-6]]


def test_groups_have_the_names_of_their_columns(tmp_path):
    text = "S,low,high,target\n" + "\n".join(",".join(map(str, row)) for row in CHOSEN)
    groups = load_sequence(write(tmp_path, text)).groups
    assert {name: members.tolist() for name, members in groups.items()} == {"low": [0, 3], "high": [1, 2]}
    groups = load_sequence(save(tmp_path, np.array(CHOSEN))).groups
    assert {name: members.tolist() for name, members in groups.items()} == {"column 1": [0, 3], "column 2": [1, 2]}


@pytest.mark.parametrize("spoiled", [0.5, 2, -1])
def test_columns_that_are_not_one_hot_make_no_groups(tmp_path, spoiled):
    rows = np.array(CHOSEN)
    rows[3, 1] = spoiled
    assert load_sequence(save(tmp_path, rows)).groups == {}
    rows[3, 1:3] = 1
    assert load_sequence(save(tmp_path, rows)).groups == {}
    rows[3, 1:3] = 0
    assert load_sequence(save(tmp_path, rows)).groups == {}


def test_fingerprint_sees_each_value_and_their_order(tmp_path):
    changed, swapped = ROWS.copy(), ROWS[[1, 0, 2, 3, 4, 5]]
    changed[5, 3] = np.nextafter(changed[5, 3], np.float32(9))
    others = [changed, swapped, ROWS[:5], ROWS.reshape(4, 6)]
    prints = [load_sequence(save(tmp_path, rows)).fingerprint() for rows in (ROWS, *others)]
    assert len(set(prints)) == 5


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf"), (1e39, "1e+39"), (-4e38, "-4e+38")]
)
@pytest.mark.parametrize(("row", "column"), [(0, 0), (4, 2), (5, 3)])
def test_values_that_are_no_finite_float32_are_named_by_row_and_column(tmp_path, value, said, row, column):
    rows = ROWS.astype(np.float64)
    rows[row, column] = value
    message = refusal(save(tmp_path, rows))
    assert f": row {row}, column {column}: {said} is not a finite float32 number; " in message
    lines = "\n".join(",".join(map(repr, map(float, line))) for line in rows)
    message = refusal(write(tmp_path, f"a,b,c,target\n{lines}"))
    assert f": row {row}, {['a', 'b', 'c', 'target'][column]}: {said} is not a finite" in message


def test_the_first_bad_value_is_named_and_the_others_counted(tmp_path):
    rows = ROWS.copy()
    rows[2:4, 1] = rows[5, 0] = np.nan
    assert "row 2, column 1: nan is not a finite float32 number (and 2 more)" in refusal(save(tmp_path, rows))


@pytest.mark.parametrize("shape", [(), (6,), (2, 3, 4), (6, 1), (0, 6), (6, 0), (0,)])
def test_other_shapes_are_refused(tmp_path, shape):
    message = refusal(save(tmp_path, np.zeros(shape, np.float32)))
    assert ("holds no rows" if shape[:1] == (0,) else f"has shape {shape}; it must be (samples, columns)") in message


@pytest.mark.parametrize(
    "rows", [np.array([["1", "2"]]), ROWS.astype(complex), ROWS > 0, np.zeros(3, "<f4,<f4"), np.zeros((2, 2), "<M8[s]")]
)
def test_other_kinds_of_arrays_are_refused(tmp_path, rows):
    assert f"holds {rows.dtype}; it must hold real numbers" in refusal(save(tmp_path, rows))


def test_objects_are_refused_and_not_executed(tmp_path):
    sprung = tmp_path / "sprung"
    path = save(tmp_path, np.array([[Trap(sprung), Trap(sprung)]], dtype=object))
    assert "cannot be read as an array of numbers" in refusal(path)
    path.write_bytes(pickle.dumps(Trap(sprung)))
    assert "cannot be read as an array of numbers" in refusal(path)
    assert not sprung.exists()
    np.load(save(tmp_path, np.array([Trap(sprung)], dtype=object)), allow_pickle=True)
    assert sprung.exists()  # the trap works


def damaged(kind):
    """Return the bytes of a .npy file that is no longer one."""
    shape = (10**14, 4) if kind == "vast" else (6, 4)
    header = f"\x93NUMPY\x01\x00v\x00{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    whole = header.encode("latin1").ljust(127) + b"\n" + ROWS.tobytes()
    return {
        "empty": b"",
        "no header": whole[:9],
        "vast": whole,
        "cut": whole[:-1],
        "a bracket missing": whole.replace(b"(6, 4)", b"(6, 4 "),
        "no dict": whole.replace(b"'shape': (6", b"'shape': )6"),
        "text": b"1,2,3\n",
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "no header", "cut", "a bracket missing", "no dict", "text", "vast"])
def test_damaged_arrays_are_refused(tmp_path, kind):
    path = tmp_path / "rows.npy"
    path.write_bytes(damaged(kind))
    assert "cannot be read as an array of numbers" in refusal(path)


def test_several_arrays_in_one_file_are_refused(tmp_path):
    np.savez(tmp_path / "rows.npz", ROWS)
    os.rename(tmp_path / "rows.npz", tmp_path / "rows.npy")
    assert "holds NpzFile" in refusal(tmp_path / "rows.npy")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1,2,3\n4,5\n", "row 1 has 2 columns, the rows before have 3"),
        ("1,2\n3,4\n5,6,7\n", "row 2 has 3 columns, the rows before have 2"),
        ("a,b,c\n1,2\n", "row 0 has 2 columns"),
        ("1,2\n3,four\n", "row 1, column 1: 'four' is no number"),
        ("a,b\n1,2\n3,\n", "row 1, b: '' is no number"),
        ("1,b\n1,2\n", "row 0, column 1: 'b' is no number"),
        ("a,b\nc,d\n1,2\n", "row 0, a: 'c' is no number"),
        ("1;2\n3;4\n", "columns are to be apart by commas"),
        ("1,2\n \n1_000,2\n", "row 1, column 0: '1_000' is no number"),
        ("1\n2\n", "has shape (2, 1)"),
        ("", "holds no rows"),
        ("a,b\n", "holds no rows"),
    ],
)
def test_bad_csv_is_refused_by_row(tmp_path, text, said):
    assert said in refusal(write(tmp_path, text))


def test_csv_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_bytes("1,2\n3,4\n".encode("utf-16"))
    assert "is not UTF-8 text" in refusal(tmp_path / "rows.csv")


def test_files_that_are_not_there_or_of_another_kind_are_refused(tmp_path):
    assert "there is no such file" in refusal(tmp_path / "rows.npy")
    assert "must be a .npy or a .csv file" in refusal(write(tmp_path, "1,2\n", "rows.txt"))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_splits_with_other_columns_are_refused(tmp_path, split):
    train, other = save(tmp_path, ROWS), save(tmp_path, ROWS[:, :3], "other.npy")
    settings = StatefulSettings(data=str(train), **{f"{split}_data": str(other)})
    with pytest.raises(DataError, match=re.escape(f"{other}: has 2 input columns, {train} has 3")):
        load_splits(settings)
    data = load_splits(StatefulSettings(data=str(train), **{f"{split}_data": str(save(tmp_path, ROWS[:2], "o.npy"))}))
    assert {name: len(sequence) for name, sequence in data.items()} == {"train": 6, split: 2}
