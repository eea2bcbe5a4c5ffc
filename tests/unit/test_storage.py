"""Files are whole or not there: whatever call fails, whenever the power goes, however full the disk is."""

import errno
import os
import random
import shutil
import subprocess
import threading

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from tests.damage import holds, make_record, make_state, save
from train.engine import storage
from train.engine.checkpoint import find_newest, list_steps, open_checkpoint, step_name
from train.engine.errors import TrainingError
from train.engine.writer import CheckpointWriter

# ---- tensors ---------------------------------------------------------------------------------------------------------


def write(tensors):
    """Return the bytes of a file of tensors."""
    return b"".join(bytes(chunk) for chunk in storage.tensor_chunks(tensors))


def some(dtype, *shape):
    """Return a tensor of random bits; NaN in many formats among them."""
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return bits.view(dtype).reshape(shape)


def assert_bits_equal(one, other):
    assert one.dtype == other.dtype and one.shape == other.shape
    if one.numel():
        one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 0, 2), (2, 3, 5)])
@pytest.mark.parametrize("dtype", storage.DTYPE_NAMES, ids=str)
def test_library_reads_what_it_would_have_written(dtype, shape):
    tensors = {"a": some(dtype, *shape), "b": some(dtype, *shape)}
    content = write(tensors)
    assert content == safetensors.torch.save(tensors)
    for name, tensor in safetensors.torch.load(content).items():
        assert_bits_equal(tensor, tensors[name])


def test_all_dtypes_in_one_file(tmp_path):
    tensors = {f"{number} {shape}": some(dtype, *shape)
               for number, dtype in enumerate(storage.DTYPE_NAMES) for shape in [(), (0,), (3,), (2, 5)]}  # fmt: skip
    path = tmp_path / "all.safetensors"
    storage.write_durably(path, storage.tensor_chunks(tensors))
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_bits_equal(loaded[name], tensor)
        assert loaded[name].data_ptr() % tensor.element_size() == 0
    with safe_open(path, framework="pt") as reader:
        assert reader.metadata() is None


@pytest.mark.parametrize(
    "view",
    [
        lambda whole: whole.t(),
        lambda whole: whole[::2, 1::3],
        lambda whole: whole[3],
        lambda whole: whole[1, 2],
        lambda whole: whole[:, :0],
        lambda whole: whole[0].expand(5, 8),
        lambda whole: whole.reshape(2, 3, 2, 4).contiguous(memory_format=torch.channels_last),
        lambda whole: whole.requires_grad_(),
        lambda whole: torch.nn.Parameter(whole),
    ],
)
def test_tensors_that_lie_otherwise_in_memory(view):
    tensor = view(torch.randn(6, 8))
    (loaded,) = safetensors.torch.load(write({"x": tensor})).values()
    assert_bits_equal(loaded, tensor.detach())


@pytest.mark.parametrize("lazy", [lambda x: x.conj(), lambda x: torch._neg_view(x), lambda x: x.conj().imag])
def test_lazy_tensors_are_saved_by_their_value(tmp_path, lazy):
    tensor = lazy(torch.tensor([1 + 2j, 3 - 4j]))
    writer = CheckpointWriter(tmp_path, 1)
    writer.save(make_state(1) | {"ema": {"x": tensor}}, make_record(1), [])
    writer.wait()
    assert torch.equal(open_checkpoint(tmp_path / step_name(1)).load()["ema"]["x"], tensor)


def test_no_tensors_at_all():
    assert safetensors.torch.load(write({})) == {}


@pytest.mark.parametrize("name", ["", "a/b.c", "ümlaut", "日本", 'quote"\\', "line\nbreak", "x" * 5000])
def test_names_of_all_kinds(name):
    assert set(safetensors.torch.load(write({name: torch.ones(2), "other": torch.ones(1)}))) == {name, "other"}


def test_bytes_depend_on_the_content_only():
    tensors = make_state(1)["optimizer"]
    backwards = dict(reversed(tensors.items()))
    other_memory = {name: tensor.clone().t().contiguous().t() for name, tensor in tensors.items() if tensor.ndim == 2}
    assert write(tensors) == write(backwards) == write(tensors | other_memory)
    assert write(tensors) != write(make_state(2)["optimizer"])


def test_dtype_that_the_format_lacks():
    with pytest.raises(ValueError, match=r"tensor 'z' has dtype torch.complex128"):
        write({"a": torch.ones(1), "z": torch.ones(1, dtype=torch.complex128)})


# ---- plain files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, storage.CHUNK_BYTES - 1, storage.CHUNK_BYTES, 2 * storage.CHUNK_BYTES + 3])
def test_size_and_checksum_of_any_length(tmp_path, size):
    content = random.Random(size).randbytes(size)
    chunks = [content[: size // 3], memoryview(content)[size // 3 :]]
    entry = storage.write_durably(tmp_path / "file", chunks)
    assert (tmp_path / "file").read_bytes() == content
    assert entry["size"] == size
    assert storage.checksum(tmp_path / "file") == entry
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644 & ~_umask()


def _umask():
    value = os.umask(0)
    os.umask(value)
    return value


def test_system_that_takes_a_little_at_a_time(tmp_path, monkeypatch):
    """As it may for any write: over a network, or interrupted by a signal."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: real(descriptor, content[:7]))
    content = random.Random(0).randbytes(1000)
    entry = storage.write_durably(tmp_path / "file", [content[:500], content[500:]])
    assert (tmp_path / "file").read_bytes() == content and storage.checksum(tmp_path / "file") == entry


def test_existing_file_or_link_is_not_written_over(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError):
            storage.write_durably(tmp_path / name, [b"new"])
    assert (tmp_path / "file").read_text() == "kept" and not (tmp_path / "elsewhere").exists()


def test_replaced_file(tmp_path):
    path = tmp_path / "run.json"
    for text in ("one", "two, longer", ""):
        (tmp_path / ".tmp-run.json").write_text("left by a killed process")
        storage.replace_file(path, text)
        assert path.read_text() == text
    assert os.listdir(tmp_path) == ["run.json"]


# ---- atomic directories ----------------------------------------------------------------------------------------------


def test_directory_appears_whole(tmp_path):
    final = tmp_path / "final"

    def fill(path):
        assert path.parent == tmp_path and path != final and not final.exists()
        storage.write_durably(path / "file", [b"content"])
        assert not final.exists()

    storage.commit_directory(final, fill)
    assert (final / "file").read_bytes() == b"content"
    assert os.listdir(tmp_path) == ["final"]


def test_directory_that_could_not_be_filled_is_not_there(tmp_path):
    def fill(path):
        storage.write_durably(path / "file", [b"content"])
        raise OSError(errno.EIO, "broken")

    with pytest.raises(OSError, match="broken"):
        storage.commit_directory(tmp_path / "final", fill)
    assert not (tmp_path / "final").exists()
    storage.sweep(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("exchange", [True, False], ids=["at once", "where the system cannot"])
def test_an_existing_directory_is_replaced_when_the_new_one_is_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(storage.ctypes, "CDLL", lambda name: object())
    final = tmp_path / "final"
    storage.commit_directory(final, lambda path: (path / "file").write_text("old"))

    def fail(path):
        (path / "file").write_text("new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        storage.commit_directory(final, fail)
    assert (final / "file").read_text() == "old"
    storage.commit_directory(final, lambda path: (path / "other").write_text("new"))
    assert os.listdir(final) == ["other"]
    assert os.listdir(tmp_path) == ["final"]


def test_a_directory_is_never_away_while_it_is_replaced(tmp_path, monkeypatch):
    renamed = []
    monkeypatch.setattr(storage.os, "rename", lambda *paths: renamed.append(paths))
    (tmp_path / "final").mkdir()
    storage.commit_directory(tmp_path / "final", lambda path: (path / "file").write_text("new"))
    assert (tmp_path / "final" / "file").read_text() == "new" and renamed == []


def test_removed_tree_leaves_what_links_point_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("kept")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("tree", "link", "dangling", "absent"):
        storage.remove_tree(tmp_path / name)
    assert os.listdir(tmp_path) == ["real"] and (tmp_path / "real" / "file").read_text() == "kept"


# ---- calls that fail -------------------------------------------------------------------------------------------------


class Proxy:
    """Stands in for a module."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)


class FailingDisk(Proxy):
    """The module `os`, of which one call that touches the disk fails, or that call and all later ones."""

    def __init__(self, victim, code, *, for_good=False, short=False):
        super().__init__(os)
        self.victim = victim  # number of the call that fails
        self.code = code
        self.for_good = for_good
        self.short = short  # a write that fails writes a part first, as on a disk that is just full
        self.count = 0
        self.shutil = Proxy(shutil)
        self.shutil.rmtree = self.rmtree

    def _fails(self):
        self.count += 1
        return self.count == self.victim or (self.for_good and self.count > self.victim)

    def _call(self, name, *arguments):
        if self._fails():
            raise OSError(self.code, os.strerror(self.code))
        return getattr(os, name)(*arguments)

    def open(self, *arguments):
        return self._call("open", *arguments)

    def fsync(self, *arguments):
        return self._call("fsync", *arguments)

    def mkdir(self, *arguments):
        return self._call("mkdir", *arguments)

    def rename(self, *arguments):
        return self._call("rename", *arguments)

    def replace(self, *arguments):
        return self._call("replace", *arguments)

    def unlink(self, *arguments):
        return self._call("unlink", *arguments)

    def write(self, descriptor, content):
        if self.short and self.count + 1 == self.victim and len(content) > 1:
            self.short = False
            return os.write(descriptor, content[: len(content) // 2])  # the call for the rest fails
        return self._call("write", descriptor, content)

    def close(self, descriptor):
        os.close(descriptor)
        if self._fails():  # as network file systems do
            raise OSError(self.code, os.strerror(self.code))

    def rmtree(self, path):
        if self._fails():
            os.unlink(next(entry.path for entry in os.scandir(path)))
            raise OSError(self.code, os.strerror(self.code))
        shutil.rmtree(path)


@pytest.mark.parametrize("short", [False, True], ids=["", "short"])
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_each_call_of_a_save_fails_in_turn(tmp_path, monkeypatch, code, for_good, short):
    """The newest whole checkpoint stays, nothing half is visible, and on a mended disk the next save works."""
    save(tmp_path / "pristine", 1, 2)
    steps = []
    for victim in range(1, 1000):
        folder = shutil.copytree(tmp_path / "pristine", tmp_path / f"{victim}")
        metrics = tmp_path / f"{victim}.jsonl"
        metrics.write_text("{}\n")
        writer = CheckpointWriter(folder, keep=2)
        disk = FailingDisk(victim, code, for_good=for_good, short=short)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "os", disk)
            patch.setattr(storage, "shutil", disk.shutil)
            writer.save(make_state(3), make_record(3), [metrics])
            if disk_failed := _wait(writer, disk):
                assert os.strerror(code) in str(disk_failed)
                assert str(folder) in str(disk_failed)
        found, damages = find_newest(folder)
        assert damages == [] and holds(found, found.step)
        assert all(holds(open_checkpoint(folder / step_name(step)), step) for step in list_steps(folder))
        if not disk_failed:
            assert list_steps(folder) == [2, 3]
            break
        assert found.step in (2, 3)
        assert f"the newest one is {step_name(found.step)}" in str(disk_failed)
        steps.append(found.step)
        before = list_steps(folder)

        # The disk is mended. The same process goes on, or another one starts.
        if victim % 2:
            storage.sweep(folder)
            writer = CheckpointWriter(folder, keep=2)
        writer.save(make_state(4), make_record(4), [metrics])
        writer.wait()
        assert list_steps(folder) == [*before, 4][-2:]
        assert holds(find_newest(folder)[0], 4)
        storage.sweep(folder)
        assert {path.name for path in folder.iterdir()} == {step_name(step) for step in list_steps(folder)}
    # Up to the rename the new one is not there; from then on it is, also where pruning fails.
    assert steps == sorted(steps) and steps.count(2) >= 20 and steps.count(3) >= 3


def _wait(writer, disk):
    """Return the error of a save, None if there was none; it must tell exactly if a call failed."""
    try:
        writer.wait()
    except TrainingError as error:
        assert disk.count >= disk.victim
        return error
    assert disk.count < disk.victim
    return None


@pytest.mark.parametrize(("victim", "flush_bytes"), [(1, 1), (2, 1), (5, 1), (1, 3000)])
def test_flush_that_fails_while_the_file_is_written(tmp_path, monkeypatch, victim, flush_bytes):
    """It happens in another thread, and may be the only time that the system reports the loss."""
    save(tmp_path, 1)
    count = 0

    def fdatasync(descriptor):
        nonlocal count
        count += 1
        if count == victim:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(storage, "CHUNK_BYTES", 100)
    monkeypatch.setattr(storage, "FLUSH_BYTES", flush_bytes)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with pytest.raises(TrainingError, match="Input/output error"):
        save(tmp_path, 2, elements=20_000 if flush_bytes == 1 else 1_000)  # 1,000: one flush for each file
    assert count >= victim
    assert list_steps(tmp_path) == [1] and holds(find_newest(tmp_path)[0], 1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_each_call_of_a_replacement_fails_in_turn(tmp_path, monkeypatch, code):
    path = tmp_path / "run.json"
    for victim in range(1, 100):
        path.write_text("old")
        disk = FailingDisk(victim, code, short=True)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "os", disk)
            try:
                storage.replace_file(path, "new, and longer")
                break
            except OSError as error:
                failure = error
        assert failure.errno == code
        assert path.read_text() in ("old", "new, and longer")
        storage.replace_file(path, "newer")
        assert path.read_text() == "newer"
    assert victim > 6 and path.read_text() == "new, and longer"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        folder = disk / "checkpoints"
        elements = 30_000  # about 240 kB a checkpoint
        save(folder, 1, 2, elements=elements)
        filler = disk / "filler"
        for size in range(900_000, 100_000, -50_000):  # from no room at all to room enough
            filler.unlink(missing_ok=True)
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            filler.write_bytes(bytes(max(0, free - 900_000 + size)))
            try:
                save(folder, 3, elements=elements)
                break
            except TrainingError as error:
                failure = error
            assert "No space left on device" in str(failure)
            found, damages = find_newest(folder)
            assert damages == [] and found.step == 2 and holds(found, 2, elements)
            storage.sweep(folder)
        assert size < 800_000  # it failed in several places before
        assert list_steps(folder) == [1, 2, 3] and holds(find_newest(folder)[0], 3, elements)
        filler.unlink()
        save(folder, 4, elements=elements)
        assert holds(find_newest(folder)[0], 4, elements)
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- power loss ------------------------------------------------------------------------------------------------------


class VolatileDisk(Proxy):
    """The module `os`, which remembers what the disk held after each call, and what had been flushed by then.

    What a power loss leaves is, for each file and each directory by itself, its content at some moment between its
    latest flush and the loss. Nothing may be deleted while it watches: it tells files apart by their numbers. One call
    at a time: files are flushed in other threads than the one that writes.
    """

    def __init__(self, root):
        super().__init__(os)
        self.root = root
        self.lock = threading.Lock()
        self.history = []  # after each call: number -> content, bytes for files, name -> number for directories
        self.flushed = []  # number -> position in the history
        self.remember({})
        self.flushed = [dict.fromkeys(self.history[0], 0)]  # what is there at the start is safe

    def remember(self, flushed):
        nodes = {}
        for folder, folders, files in os.walk(self.root):
            here = {name: os.stat(os.path.join(folder, name)).st_ino for name in (*folders, *files)}
            nodes[os.stat(folder).st_ino] = here
            for name in files:
                with open(os.path.join(folder, name), "rb") as file:
                    nodes[here[name]] = file.read()
        self.history.append(nodes)
        self.flushed.append((self.flushed[-1] if self.flushed else {}) | flushed)

    def fsync(self, descriptor):
        with self.lock:
            os.fsync(descriptor)
            self.remember({os.fstat(descriptor).st_ino: len(self.history)})

    def _change(self, name, *arguments):
        with self.lock:
            result = getattr(os, name)(*arguments)
            self.remember({})
            return result

    def open(self, *arguments):
        return self._change("open", *arguments)

    def write(self, *arguments):
        return self._change("write", *arguments)

    def mkdir(self, *arguments):
        return self._change("mkdir", *arguments)

    def rename(self, *arguments):
        return self._change("rename", *arguments)

    def after_loss(self, moment, pick_file, pick_folder, target):
        """Lay out what the disk holds if the power goes at a moment."""

        def lay(number, path):
            is_folder = isinstance(self.history[moment][number], dict)
            first = self.flushed[moment].get(number)
            pick = pick_folder if is_folder else pick_file
            chosen = pick(-1 if first is None else first, moment)  # -1: it never had any content
            content = self.history[chosen].get(number) if chosen >= 0 else None
            if is_folder:
                path.mkdir()
                for name, child in (content or {}).items():
                    lay(child, path / name)
            else:
                path.write_bytes(content or b"")

        lay(os.stat(self.root).st_ino, target)


def earliest(first, last):
    return first


def latest(first, last):
    return last


def anything(number):
    return random.Random(number).randint


@pytest.mark.parametrize(
    ("pick_file", "pick_folder"),
    [(earliest, earliest), (earliest, latest), (latest, earliest), *((anything(n), anything(-n)) for n in range(1, 4))],
    ids=["nothing is written unasked", "names before content", "content before names", "any 1", "any 2", "any 3"],
)
def test_power_loss_at_every_call(tmp_path, monkeypatch, pick_file, pick_folder):
    """What was announced as saved is there, and what is there is whole."""
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    disk = VolatileDisk(folder)
    announced = [1]
    with monkeypatch.context() as patch:
        patch.setattr(storage, "os", disk)
        for step in (2, 3):
            save(folder, step)
            announced += [step - 1] * (len(disk.history) - len(announced) - 1) + [step]
    assert len(announced) == len(disk.history) > 30
    seen = set()
    for moment, step in enumerate(announced):
        target = tmp_path / f"after {moment}"
        disk.after_loss(moment, pick_file, pick_folder, target)
        found, damages = find_newest(target)
        assert damages == [] and found.step >= step and holds(found, found.step), moment
        seen.add(found.step)
        storage.sweep(target)
        assert {path.name for path in target.iterdir()} == {step_name(step) for step in range(1, found.step + 1)}
    assert seen == {1, 2, 3}


def test_a_flusher_has_flushed_all_at_its_end_and_says_what_it_could_not(tmp_path, monkeypatch):
    """A process of several has nobody else who flushes its files: rank 0 may be on another machine."""
    flushed = []
    monkeypatch.setattr(storage, "sync", lambda path: flushed.append(path.name))
    with storage.Flusher() as flusher:
        for number in range(20):
            flusher.add(tmp_path / str(number))
    assert sorted(flushed, key=int) == [str(number) for number in range(20)]

    def fail(path):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(storage, "sync", fail)
    with pytest.raises(OSError, match="broken"), storage.Flusher() as flusher:
        flusher.add(tmp_path / "0")
