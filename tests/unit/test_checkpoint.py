"""No checkpoint that was damaged or forged is ever loaded, and the newest whole one always is."""

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.damage import KINDS, copy_of, corrupt, holds, make_record, make_state, save
from train.engine import checkpoint, storage
from train.engine.checkpoint import (
    DamagedCheckpointError,
    find_best,
    find_newest,
    list_steps,
    open_checkpoint,
    set_aside_newer,
    step_name,
)
from train.engine.errors import TrainingError
from train.engine.writer import CheckpointWriter

FILES = ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A folder with checkpoints of steps 1 and 2, never changed."""
    folder = tmp_path_factory.mktemp("pristine")
    save(folder, 1, 2)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(pristine, tmp_path / "checkpoints")


def sign(path, **changes):
    """Rewrite the manifest of a checkpoint so that it vouches for what is there, as an attacker would."""
    names = [file.name for file in path.iterdir() if file.name != "manifest.json" and file.is_file()]
    content = {
        "format": checkpoint.FORMAT,
        "step": int(path.name[5:]),
        "files": {name: storage.checksum(path / name) for name in names},
    }
    content |= changes
    content = {key: value for key, value in content.items() if value is not None}
    text = json.dumps({**content, "digest": checkpoint.digest(content)})
    (path / "manifest.json").write_text(text)


@contextlib.contextmanager
def within(seconds):
    """Fail if the body takes longer: what waits for a pipe waits for ever."""

    def stop(*_):
        raise AssertionError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(path, *parts):
    """Fail unless a checkpoint is refused at once, with a message that holds these parts, and an older one is found."""
    with within(10):
        with pytest.raises(DamagedCheckpointError) as caught:
            open_checkpoint(path)
        found, damages = find_newest(path.parent)
    assert found is not None and found.step == 1 and holds(found, 1)
    assert damages == [str(caught.value)]
    for part in (str(path), *parts):
        assert part in str(caught.value)


# ---- what is whole ---------------------------------------------------------------------------------------------------


def test_round_trip(folder):
    for step in (1, 2):
        found = open_checkpoint(folder / step_name(step))
        assert found.step == step
        assert found.record == make_record(step)
        assert holds(found, step)
        assert not holds(found, 3 - step)


def test_newest_is_found(folder):
    found, damages = find_newest(folder)
    assert found.step == 2 and damages == []
    assert find_newest(folder / "nothing") == (None, [])


def test_helper_that_signs_makes_valid_checkpoints(folder):
    """Else the refusals below would prove nothing."""
    sign(folder / step_name(2))
    assert holds(open_checkpoint(folder / step_name(2)), 2)


def test_only_proper_names_are_steps(folder):
    for name in ("step_3", "step_000000003", "step_٠٠٠٠٠٠٠٣", ".tmp-step_00000003", "step_00000003x", "set_aside"):
        (folder / name).mkdir()
    assert list_steps(folder) == [1, 2]


def test_steps_of_any_length_are_in_order(tmp_path):
    save(tmp_path, 99_999_999, 100_000_000)
    assert list_steps(tmp_path) == [99_999_999, 100_000_000]
    assert find_newest(tmp_path)[0].step == 100_000_000


def test_quick_look_reads_no_tensors_but_sees_sizes(folder):
    path = folder / step_name(2)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    assert open_checkpoint(path, thorough=False).step == 2
    refused(path, "model.safetensors was altered")
    (path / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(DamagedCheckpointError, match=f"has {len(content) - 1} bytes instead of {len(content)}"):
        open_checkpoint(path, thorough=False)
    (path / "state.json").write_text("{}")
    with pytest.raises(DamagedCheckpointError):
        open_checkpoint(path, thorough=False)


# ---- accidents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(96))
def test_no_accident_goes_unnoticed(folder, seed):
    kind = KINDS[seed % len(KINDS)]
    what = corrupt(folder / step_name(2), folder / step_name(1), random.Random(seed), kind)
    found, damages = find_newest(folder)
    assert found is not None and found.step == 1, what
    assert holds(found, 1)
    (damage,) = damages
    assert str(folder / step_name(2)) in damage
    if not what.startswith("manifest.json"):
        assert what.split(":")[0] in damage, f"{what}; but the message says: {damage}"


def test_every_bit_of_the_manifest_counts(folder):
    path = folder / step_name(2) / "manifest.json"
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 23):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        if _same_json(content, changed):
            continue  # a tab in place of a space
        found, _ = find_newest(folder)
        assert found.step == 1, bit


def _same_json(one, other):
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


@pytest.mark.parametrize("key", ["format", "step", "files", "digest"])
def test_manifest_without_a_key(folder, key):
    path = folder / step_name(2)
    content = json.loads((path / "manifest.json").read_text())
    del content[key]
    (path / "manifest.json").write_text(json.dumps(content))
    refused(path)


def test_all_are_damaged(folder):
    for step in (1, 2):
        (folder / step_name(step) / "state.json").unlink()
    found, damages = find_newest(folder)
    assert found is None
    assert [step_name(2) in damages[0], step_name(1) in damages[1]] == [True, True]
    assert find_best(folder) == (None, damages)


def test_sector_that_cannot_be_read(folder, monkeypatch):
    path, real = folder / step_name(2), storage.checksum

    def checksum(file):
        if file == path / "optimizer.safetensors":
            raise OSError(5, "Input/output error")
        return real(file)

    monkeypatch.setattr(storage, "checksum", checksum)
    refused(path, "optimizer.safetensors cannot be read ([Errno 5] Input/output error)")


def test_whole_checkpoint_under_another_name(folder):
    (folder / step_name(2)).rename(folder / step_name(3))
    refused(folder / step_name(3), "holds step 2, not what its name says")


def test_files_of_two_checkpoints_are_not_mixed(folder):
    """state.json of another step, vouched for by the manifest."""
    shutil.copy(folder / step_name(1) / "state.json", folder / step_name(2))
    sign(folder / step_name(2))
    refused(folder / step_name(2), "state.json and manifest.json are of different steps")


def test_files_that_the_manifest_does_not_list_are_not_loaded(folder):
    """An ema.safetensors, say, that came from elsewhere."""
    save_file({"linear.weight": torch.zeros(2)}, folder / step_name(2) / "ema.safetensors")
    found = open_checkpoint(folder / step_name(2))
    assert "ema" not in found.load()
    assert holds(found, 2)


def test_plain_file_in_place_of_a_checkpoint(folder):
    (folder / step_name(3)).write_text("no directory")
    found, damages = find_newest(folder)
    assert found.step == 2 and len(damages) == 1


def test_newer_format_is_named(folder):
    sign(folder / step_name(2), format=checkpoint.FORMAT + 1)
    refused(folder / step_name(2), f"format {checkpoint.FORMAT + 1}", "update the program")


def test_format_that_never_was(folder):
    sign(folder / step_name(2), format=0)
    refused(folder / step_name(2), "unknown format 0")


# ---- attackers -------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def dump_plain(bomb):
    return pickle.dumps(bomb)


def dump_torch(bomb):
    file = io.BytesIO()
    torch.save(bomb, file)
    return file.getvalue()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dump", [dump_plain, dump_torch])
def test_pickle_is_never_run(folder, tmp_path, name, dump):
    path, mark = folder / step_name(2), tmp_path / "the code ran"
    content = dump(Bomb(mark))
    (path / name).write_bytes(content)
    sign(path)
    refused(path, name)
    assert not mark.exists()
    if dump is dump_torch:  # the bomb is live
        torch.load(io.BytesIO(content), weights_only=False)
    else:
        pickle.loads(content)  # noqa: S301
    assert mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "a/b",
        "..",
        "",
        ".",
        "model.safetensors/../x",
        "C:\\x",
        "x\0y",
        "manifest.json",
        "x" * 9999,
    ],
)
def test_names_that_point_elsewhere(folder, name):
    path = folder / step_name(2)
    files = json.loads((path / "manifest.json").read_text())["files"]
    sign(path, files={**files, name: {"size": 1, "xxh3_128": "0" * 32}})
    refused(path, "does not belong into a checkpoint")


def header(text, length=None):
    """Return the bytes of a safetensors file with this header."""
    text = text.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "content",
    [
        header("{}", 2**63),
        header("{}", 2**64 - 1),
        header("{}", 10**8 + 1),
        header("{}", 3),
        header(""),
        header("[]"),
        header("{" * 100_000),
        header('{"a":' * 100_000),
        header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),  # the data is missing
        header('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}') + bytes(4),
        header('{"a":{"dtype":"F32","shape":[1099511627776,4194304],"data_offsets":[0,4]}}') + bytes(4),
        header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}') + bytes(8),  # a hole
        header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}') + bytes(4),
        header('{"a":{"dtype":"PICKLE","shape":[1],"data_offsets":[0,4]}}') + bytes(4),
        b"",
        b"\x80",
    ],
)
def test_forged_headers(folder, content):
    path = folder / step_name(2)
    (path / "model.safetensors").write_bytes(content)
    sign(path)
    refused(path, "model.safetensors cannot be read")


def test_giant_header_of_spaces(folder):
    """Legal JSON, but more than the format allows."""
    path = folder / step_name(2)
    with open(path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 120_000_000) + b"{}")
        file.write(b" " * (120_000_000 - 2))
    sign(path)
    refused(path, "model.safetensors cannot be read")


@pytest.mark.parametrize("target", ["outside", "inside"])
@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_linked_file(folder, tmp_path, name, target):
    path = folder / step_name(2)
    real = (tmp_path if target == "outside" else path) / f"real-{name}"
    (path / name).rename(real)
    (path / name).symlink_to(real)
    refused(path, f"{name} is no plain file")


def test_linked_directory(folder, tmp_path):
    (folder / step_name(2)).rename(tmp_path / step_name(2))
    (folder / step_name(2)).symlink_to(tmp_path / step_name(2))
    refused(folder / step_name(2), "is a link")


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "rng.safetensors"])
def test_pipe_that_nobody_writes_to(folder, name):
    (folder / step_name(2) / name).unlink()
    os.mkfifo(folder / step_name(2) / name)
    refused(folder / step_name(2), f"{name} is no plain file")


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "rng.safetensors"])
def test_directory_in_place_of_a_file(folder, name):
    (folder / step_name(2) / name).unlink()
    (folder / step_name(2) / name).mkdir()
    refused(folder / step_name(2), f"{name} is no plain file")


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
@pytest.mark.parametrize(
    "text",
    [
        "[" * 1_000_000,
        '{"a":' * 1_000_000,
        "9" * 5_000_000,
        "\ud800",
        "",
        "null",
        "[]",
        "7",
        '"text"',
        '{"progress": 3, "step": 2, "format": 1, "files": 5, "digest": []}',
    ],
)
def test_json_that_is_none_of_ours(folder, name, text):
    path = folder / step_name(2)
    (path / name).write_bytes(text.encode(errors="surrogatepass"))
    if name == "state.json":
        sign(path)
    refused(path)


@pytest.mark.parametrize("depth", range(900, 1000, 9))
def test_json_nested_to_the_limit(folder, depth):
    """Deep enough for one of the parsers and printers involved, whatever the depth of the caller."""
    path = folder / step_name(2)
    text = f'{{"format": 1, "digest": "x", "more": {"[" * depth}{"]" * depth}}}'
    (path / "manifest.json").write_text(text)
    refused(path)


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_giant_json_is_not_read(folder, name):
    path = folder / step_name(2)
    with open(path / name, "wb") as file:
        file.truncate(checkpoint._LARGEST_JSON + 1)
    if name == "state.json":
        sign(path)
    refused(path, f"{name} is too large to be genuine")


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "2"},
        {"step": 2.0},
        {"step": [2]},
        {"step": None},
        {"step": 10**400},
        {"step": -2},
        {"format": "1"},
        {"format": None},
        {"format": 10**400},
        {"files": FILES},
        {"files": " ".join(FILES)},
        {"files": {}},
        {"files": dict.fromkeys(FILES)},
        {"files": dict.fromkeys(FILES, 3)},
        {"files": {name: {} for name in FILES}},
    ],
)
def test_signed_manifest_of_the_wrong_kind(folder, changes):
    sign(folder / step_name(2), **changes)
    refused(folder / step_name(2))


@pytest.mark.parametrize("progress", [None, 3, [], {}, {"step": "2"}, {"step": 3}])
def test_signed_state_of_the_wrong_kind(folder, progress):
    (folder / step_name(2) / "state.json").write_text(json.dumps({"progress": progress}))
    sign(folder / step_name(2))
    refused(folder / step_name(2))


# ---- best ------------------------------------------------------------------------------------------------------------


def test_best_is_the_one_that_the_newest_names(tmp_path):
    save(tmp_path, 1, 2, 3, best=2)
    assert find_best(tmp_path)[0].step == 2


def test_best_before_any_evaluation_is_the_newest(folder):
    assert find_best(folder)[0].step == 2


def test_damaged_best_is_not_replaced_by_another(tmp_path):
    save(tmp_path, 1, 2, 3, best=2)
    (tmp_path / step_name(2) / "model.safetensors").unlink()
    found, damages = find_best(tmp_path)
    assert found is None
    assert damages == [f"{tmp_path / step_name(2)}: model.safetensors is missing"]


# ---- pruning and sweeping --------------------------------------------------------------------------------------------


def test_best_and_newest_are_kept(tmp_path):
    save(tmp_path, *range(1, 10), keep=3, best=2)
    assert list_steps(tmp_path) == [2, 7, 8, 9]
    assert sorted(path.name for path in tmp_path.iterdir()) == [step_name(step) for step in (2, 7, 8, 9)]


def test_best_among_the_newest_takes_no_extra_place(tmp_path):
    save(tmp_path, *range(1, 10), keep=3, best=8)
    assert list_steps(tmp_path) == [7, 8, 9]


def test_nothing_is_pruned_before_the_new_one_is_durable(tmp_path, monkeypatch):
    save(tmp_path, 1, 2)
    events = []

    def watch(name):
        real = getattr(storage, name)

        def watched(*arguments):
            events.append((name, arguments[0].name, list_steps(tmp_path)))
            return real(*arguments)

        monkeypatch.setattr(storage, name, watched)

    for name in ("commit_directory", "remove_directory", "sync"):
        watch(name)
    save(tmp_path, 3, keep=1)
    removed = [event for event in events if event[0] == "remove_directory"]
    assert [name for _, name, _ in removed] == [step_name(1), step_name(2)]
    first = events.index(removed[0])
    assert events[first - 1] == ("sync", tmp_path.name, [1, 2, 3])  # the new name is on the disk
    assert list_steps(tmp_path) == [3]


def test_failed_save_prunes_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1, 2, 3)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "commit_directory", fail)
    with pytest.raises(TrainingError, match=r"No space left on device.*newest one is step_00000003"):
        save(tmp_path, 4, keep=1)
    assert list_steps(tmp_path) == [1, 2, 3]


def test_leftovers_are_invisible_and_swept(folder):
    copy_of(folder / step_name(1), folder / "x").rename(folder / f".tmp-{step_name(3)}")
    copy_of(folder / step_name(1), folder / "y").rename(folder / f".del-{step_name(4)}")
    (folder / ".tmp-file").write_text("left by something else")
    (folder / ".tmp-link").symlink_to(folder / step_name(1))
    (folder / "notes.txt").write_text("of the user")
    (folder / "x").rmdir()
    (folder / "y").rmdir()
    assert list_steps(folder) == [1, 2] and find_newest(folder)[0].step == 2
    storage.sweep(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", step_name(1), step_name(2)]
    assert holds(open_checkpoint(folder / step_name(1)), 1)  # what a link pointed to is intact


def test_leftovers_of_the_same_step_do_not_hinder(folder):
    for prefix in (".tmp-", ".del-"):
        copy_of(folder / step_name(1), folder / prefix).rename(folder / f"{prefix}{step_name(3)}")
    save(folder, 3, 4, keep=1)
    assert list_steps(folder) == [4] and holds(find_newest(folder)[0], 4)


def test_newer_ones_are_set_aside(tmp_path):
    save(tmp_path, 1, 2, 3)
    assert set_aside_newer(tmp_path, 1) == [step_name(2), step_name(3)]
    assert list_steps(tmp_path) == [1]
    assert holds(open_checkpoint(tmp_path / "set_aside" / step_name(3)), 3)
    save(tmp_path, 2)
    assert set_aside_newer(tmp_path, 1) == [step_name(2)]
    assert set_aside_newer(tmp_path, None) == [step_name(1)]
    assert list_steps(tmp_path) == []
    names = [step_name(1), step_name(2), f"{step_name(2)}.2", step_name(3)]
    assert sorted(path.name for path in (tmp_path / "set_aside").iterdir()) == names


def test_nothing_is_set_aside_without_need(folder):
    assert set_aside_newer(folder, 2) == []
    assert not (folder / "set_aside").exists()


# ---- the writer ------------------------------------------------------------------------------------------------------


def test_training_goes_on_while_the_checkpoint_is_written(tmp_path):
    """What is saved is the state at the call, whatever happens to it afterwards."""
    writer = CheckpointWriter(tmp_path, 3)
    state, record = make_state(1), make_record(1)
    writer.save(state, record, [])
    for tensors in state.values():
        for tensor in tensors.values():
            tensor.zero_()
    record["config"]["best_metric"] = "changed"
    writer.wait()
    found = open_checkpoint(tmp_path / step_name(1))
    assert holds(found, 1) and found.record == make_record(1)
    assert writer.seconds > 0


def test_tensors_that_change_shape_between_saves(tmp_path):
    writer = CheckpointWriter(tmp_path, 3)
    for step, elements in [(1, 300), (2, 600), (3, 30)]:
        writer.save(make_state(step, elements), make_record(step), [])
    writer.wait()
    for step, elements in [(1, 300), (2, 600), (3, 30)]:
        assert holds(open_checkpoint(tmp_path / step_name(step)), step, elements)


def test_error_surfaces_once_and_the_next_save_works(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, 3)
    writer.save(make_state(1), make_record(1), [tmp_path / "missing"])
    writer.save(make_state(2), make_record(2), [])  # does not raise: other processes may be in the midst of a step
    assert writer.failed and list_steps(tmp_path) == []
    with pytest.raises(TrainingError, match="there is none yet"):
        writer.check()
    writer.save(make_state(3), make_record(3), [])
    writer.wait()
    assert list_steps(tmp_path) == [3] and not writer.failed


# The tensors' bytes are held back until the main thread has ended; then there are files to flush, one in several parts.
ENDS_IN_AN_ERROR = """
import sys, threading
from pathlib import Path
from tests.damage import make_record, make_state
from train.engine import storage
from train.engine.writer import CheckpointWriter

real = storage.tensor_chunks

def held_back(tensors):
    threading.main_thread().join()
    yield from real(tensors)

storage.tensor_chunks, storage.FLUSH_BYTES, storage.CHUNK_BYTES = held_back, 1000, 100
CheckpointWriter(Path(sys.argv[1]), 3).save(make_state(1), make_record(1), [])
raise SystemExit(3)
"""


def test_checkpoint_in_flight_is_finished_when_the_training_thread_ends_in_an_error(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", ENDS_IN_AN_ERROR, tmp_path], capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stderr) == (3, "")
    assert holds(open_checkpoint(tmp_path / step_name(1)), 1)


def test_files_named_are_flushed_before_the_checkpoint_exists(tmp_path, monkeypatch):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("{}\n")
    flushed = []
    real = storage.sync

    def sync(path):
        flushed.append((path, list_steps(tmp_path)))
        real(path)

    monkeypatch.setattr(storage, "sync", sync)
    writer = CheckpointWriter(tmp_path, 3)
    writer.save(make_state(1), make_record(1), [metrics])
    writer.wait()
    assert flushed[0] == (metrics, [])
