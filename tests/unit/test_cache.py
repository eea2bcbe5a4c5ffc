"""Decoded images are kept, found again, and never taken for what they are not."""

import multiprocessing
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from data_modules import cache
from data_modules.decoding import Decoder
from tests.sources import COLOUR, encode, everything, images, load, numbers, pixels, refusal, write, write_tree

CONTEXT = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A folder for caches of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "exact-training" / "images"


@pytest.fixture
def file(tmp_path):
    """A Parquet file of twenty images."""
    return write(tmp_path / "file.parquet")


@pytest.fixture
def no_decoding(monkeypatch):
    """Make decoding fail from when it is called."""

    def fail(self, encoded):
        raise AssertionError("an image is decoded")

    return lambda: monkeypatch.setattr(Decoder, "decode", fail)


def caches(home):
    """Return the caches in a folder, which holds nothing else but their locks."""
    found = sorted(home.iterdir()) if home.exists() else []
    folders = [path for path in found if path.is_dir()]
    assert all(len(path.name) == 32 and path.name.isalnum() for path in folders), found
    assert {path.name for path in found} - {path.name for path in folders} <= {f"{p.name}.lock" for p in folders}
    return folders


def built(data):
    """Say whether images were decoded and kept."""
    return any("images once; kept in" in note for note in data.notes)


def right(data):
    """Say whether all images of a data set of twenty are there with the right pixels."""
    return sorted(numbers(data.train) + numbers(data.validation)) == list(range(20))


def test_the_second_load_maps_the_same_file(file, home, no_decoding):
    first = load(file)
    assert built(first) and len(caches(home)) == 1
    content = {path: path.read_bytes() for path in caches(home)[0].iterdir()}
    assert sorted(path.name for path in content) == ["images.npy", "measured.npy", "meta.json"]
    no_decoding()
    second = load(file)
    assert not built(second) and right(second)
    assert second.describe() == first.describe()
    assert content == {path: path.read_bytes() for path in caches(home)[0].iterdir()}
    # What is done to images in memory does not reach the file.
    everything(second.train)["inputs"].zero_()
    second.train.samples.images_NCHW.zero_()
    assert right(load(file))


def test_the_place_is_noted_and_is_that_of_the_standard(file, home, tmp_path, monkeypatch):
    assert f"decoded 20 images once; kept in {home}/" in "\n".join(load(file).notes)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_folder() == tmp_path / "home" / ".cache" / "exact-training" / "images"


def test_the_bad_are_remembered(tmp_path, home, no_decoding):
    path = write(tmp_path / "a.parquet", [*COLOUR[:3], b"bad", *COLOUR[4:12], None, *COLOUR[13:]])
    message = refusal(path)
    assert len(caches(home)) == 1
    no_decoding()
    assert refusal(path) == message
    data = load(path, on_bad_sample="skip")
    assert [text.split(": ")[0] for text in data.skipped] == [f"{path}, row 3", f"{path}, row 12"]
    assert sorted(numbers(data.train) + numbers(data.validation)) == [n for n in range(20) if n not in (3, 12)]


def test_whatever_changes_the_pixels_changes_the_cache(tmp_path, home):
    load(write(tmp_path / "a.parquet"))
    load(write(tmp_path / "b.parquet"))
    assert len(caches(home)) == 1  # the same images in another place
    load(tmp_path / "a.parquet", image_size=3)
    assert len(caches(home)) == 2
    load(write(tmp_path / "c.parquet", [COLOUR[1], COLOUR[0], *COLOUR[2:]]))
    assert len(caches(home)) == 3
    load(write(tmp_path / "d.parquet", COLOUR[:10], [0, 1] * 5))
    assert len(caches(home)) == 4


def test_bytes_that_are_cut_in_other_places_are_other_images():
    class Fake:
        def __init__(self, cells):
            import datasets

            cells = [None if cell is None else {"bytes": cell, "path": None} for cell in cells]
            features = datasets.Features({"x": datasets.Image()})
            self.data = datasets.Dataset.from_dict({"x": cells}, features=features)

    stamps = {
        cache.EncodedColumn(Fake(cells), "x").stamp()
        for cells in ([b"ab", b"c"], [b"a", b"bc"], [b"abc", b""], [b"c", b"ab"], [b"abc", None], [b"ab", b"c", None])
    }
    assert len(stamps) == 6
    # A part of a table is its own images, not those of the table.
    whole = Fake([b"a", b"b", b"c", b"d"])
    parts = []
    for start in (0, 2):
        part = Fake([b"x"])
        part.data = whole.data.select(range(start, start + 2))
        parts.append(cache.EncodedColumn(part, "x").stamp())
    assert parts[0] != parts[1] and parts[0] == cache.EncodedColumn(Fake([b"a", b"b"]), "x").stamp()


def test_a_changed_file_of_the_same_name_is_decoded_again(tmp_path, home):
    tree = write_tree(tmp_path / "tree", (("train", 20),))
    first = load(tree)
    assert built(first) and right(first) and not built(load(tree))
    path = tree / "train" / "cat" / "4.png"
    changed = encode(pixels(4, 3) ^ 255)
    assert len(changed) == path.stat().st_size  # what tells them apart is the time
    path.write_bytes(changed)
    data = load(tree)
    assert built(data) and data.fingerprint != first.fingerprint
    inverted = torch.from_numpy(pixels(4, 3) ^ 255).permute(2, 0, 1)
    assert any(torch.equal(image, inverted) for split in (data.train, data.validation) for image in images(split))
    path.unlink()
    assert f"{path}" not in "".join(load(tree).skipped)  # the folder has nineteen images now


@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "gone", "header"])
@pytest.mark.parametrize("name", ["images.npy", "measured.npy", "meta.json"])
def test_a_damaged_cache_is_noticed_and_made_again(file, home, name, damage):
    first = load(file)
    (path,) = (folder / name for folder in caches(home))
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        if damage == "flip":
            content[-2] ^= 4
        elif damage == "header":
            content[:40] = bytes(40)
        path.write_bytes({"cut": content[:-5], "empty": b""}.get(damage, content))
    second = load(file)
    assert built(second) and right(second) and second.describe() == first.describe()
    assert not built(load(file)) and len(caches(home)) == 1


def test_any_damaged_byte_of_headers_and_of_what_is_bad_is_noticed(tmp_path, home):
    file = write(tmp_path / "a.parquet", [*COLOUR[:3], b"bad", *COLOUR[4:]])
    first = load(file, on_bad_sample="skip")
    draw = random.Random(0)
    for name in ("images.npy", "measured.npy", "meta.json"):
        (path,) = (folder / name for folder in caches(home))
        sound = path.read_bytes()
        for place in [draw.randrange(min(128, len(sound))) for _ in range(6)]:
            damaged = bytearray(sound)
            damaged[place] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            data = load(file, on_bad_sample="skip")
            assert (data.describe(), data.skipped) == (first.describe(), first.skipped), (name, place)
            assert sorted(numbers(data.train) + numbers(data.validation)) == [n for n in range(20) if n != 3]
            path.write_bytes(sound)


def test_a_cache_that_is_too_large_to_verify_is_still_of_the_right_size(file, home, monkeypatch):
    load(file)
    monkeypatch.setattr(cache, "VERIFIED", 0)
    (path,) = (folder / "images.npy" for folder in caches(home))
    path.write_bytes(path.read_bytes()[:-1])
    assert built(load(file))


def _load_and_tell(source, answers, barrier):
    barrier.wait()
    data = load(source)
    answers.put((os.getpid(), built(data), right(data), data.fingerprint))


def test_processes_that_want_it_at_once_get_one_whole_cache(file, home, monkeypatch):
    slow = Decoder.decode
    monkeypatch.setattr(Decoder, "decode", lambda self, encoded: time.sleep(0.01) or slow(self, encoded))
    answers, barrier = CONTEXT.Queue(), CONTEXT.Barrier(3)
    processes = [CONTEXT.Process(target=_load_and_tell, args=(file, answers, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    told = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sum(was_built for _, was_built, _, _ in told) == 1
    assert all(was_right for _, _, was_right, _ in told) and len({checksum for *_, checksum in told}) == 1
    assert len(caches(home)) == 1


def _load_slowly(source, started):
    slow = Decoder.decode

    def decode(self, encoded):
        started.set()
        time.sleep(0.004)
        return slow(self, encoded)

    Decoder.decode = decode
    load(source)


def test_a_build_that_is_killed_leaves_nothing_that_is_taken_for_whole(file, home):
    draw = random.Random(0)
    interrupted = 0
    for _ in range(10):
        started = CONTEXT.Event()
        process = CONTEXT.Process(target=_load_slowly, args=(file, started))
        process.start()
        assert started.wait(60)
        time.sleep(draw.uniform(0, 0.11))
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        interrupted += any(path.name.startswith(".") for path in home.iterdir())
        data = load(file)
        assert right(data) and built(data) == (process.exitcode == -signal.SIGKILL and built(data))
        assert len(caches(home)) == 1  # what the killed one left is gone
        shutil.rmtree(home)
    assert interrupted >= 3


def _file_in_the_way(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("")
    return "Not a directory"


def _full_disk(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    return "No space left on device"


def _quota(tmp_path, monkeypatch):
    def refuse(handle, offset, length):
        assert length >= 20 * 3 * 4 * 6
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    return "Disk quota exceeded"


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("obstacle", [_file_in_the_way, _full_disk, _quota])
def test_without_a_cache_images_are_decoded_at_each_start(file, tmp_path, home, monkeypatch, obstacle, lazy):
    expected = load(file)
    shutil.rmtree(tmp_path / "cache")
    reason = obstacle(tmp_path, monkeypatch)
    if lazy and obstacle is not _file_in_the_way:
        return  # such a cache takes next to no space
    if lazy:
        monkeypatch.setattr(cache, "LARGEST", 0)
    for _ in range(2):
        data = load(file)
        assert right(data) and data.normalization == expected.normalization
        assert data.fingerprint == expected.fingerprint
        said = f"no cache can be kept in {home} ({reason}): images are decoded at each start"
        assert said in data.notes and not built(data)
    if obstacle is not _file_in_the_way:
        assert [path for path in home.iterdir() if path.is_dir()] == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(file, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    data = load(file)
    assert right(data) and any("Permission denied" in note for note in data.notes)


def test_large_sets_are_checked_once_and_decoded_as_they_are_needed(file, home, monkeypatch):
    kept = load(file)
    monkeypatch.setattr(cache, "LARGEST", 20 * 3 * 4 * 6 - 1)
    data = load(file)
    assert any(note.startswith("checked 20 images once; kept in") for note in data.notes)
    calls = []
    decode = Decoder.decode
    monkeypatch.setattr(Decoder, "decode", lambda self, encoded: calls.append(1) or decode(self, encoded))
    again = load(file)
    assert calls == [] and again.describe() == data.describe() and again.normalization == kept.normalization
    assert right(again) and len(calls) == 20
    monkeypatch.setattr(cache, "LARGEST", 20 * 3 * 4 * 6)
    assert load(file).fingerprint == kept.fingerprint
    assert sorted(len(list(folder.iterdir())) for folder in caches(home)) == [2, 3]


@pytest.mark.parametrize("lazy", [False, True])
def test_several_processes_decode_exactly_what_one_does(tmp_path, home, monkeypatch, lazy):
    encoded = [b"bad" if number % 7 == 3 else COLOUR[number] for number in range(20)]
    path = write(tmp_path / "a.parquet", encoded, [0, 0, 1, 1] * 5)
    if lazy:
        monkeypatch.setattr(cache, "LARGEST", 0)
    alone = load(path, on_bad_sample="skip")
    shutil.rmtree(home)
    monkeypatch.setattr(cache, "ALONE", 2)
    monkeypatch.setattr(cache, "CHUNK", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    told = refusal(path)
    assert told.startswith(f"{path}, row 3: ")  # the first bad one, not the first that was found
    shutil.rmtree(home)
    together = load(path, on_bad_sample="skip")
    assert torch.equal(torch.get_rng_state(), before)
    assert built(together) or lazy
    assert together.describe() == alone.describe() and together.skipped == alone.skipped
    assert [text.split(": ")[0] for text in together.skipped] == [f"{path}, row {row}" for row in (3, 10, 17)]
    for one, other in zip(alone.splits().values(), together.splits().values()):
        assert torch.equal(images(one), images(other)) and torch.equal(one.labels, other.labels)


def test_several_processes_name_the_first_image_of_another_size(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "ALONE", 2)
    monkeypatch.setattr(cache, "CHUNK", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    other = encode(pixels(0, 3, height=9))
    path = write(tmp_path / "a.parquet", [*COLOUR[:6], other, *COLOUR[7:15], other, *COLOUR[16:]])
    assert refusal(path).startswith(f"{path}, row 6: the image is 9 x 6 pixels")


def test_images_in_memory_are_those_of_the_file(file):
    data = load(file)
    expected = np.stack([pixels(number, 3).transpose(2, 0, 1) for number in range(20)])
    assert np.array_equal(data.train.samples.gather(torch.arange(20))["inputs"].numpy(), expected)
