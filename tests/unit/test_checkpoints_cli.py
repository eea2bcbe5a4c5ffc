"""train/checkpoints.py lists, verifies, compares and exports; mistakes become one message and exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.damage import make_record, make_state, save
from train import checkpoints
from train.engine.checkpoint import step_name
from train.engine.sharded import describe_whole, own_pieces, shard_file
from train.engine.writer import CheckpointWriter

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of steps 10, 20 and 30, of which 20 is the best and has a score."""
    path = tmp_path / "run"
    save(path / "checkpoints", 10, 20, 30, best=20)
    return path


@pytest.fixture
def command(capsys, monkeypatch):
    """Run the script; return exit code, output lines and error lines."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["checkpoints.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            checkpoints.run()
        printed = capsys.readouterr()
        return caught.value.code, printed.out.splitlines(), printed.err.splitlines()

    return call


def save_state(run, step, files, **record):
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    writer = CheckpointWriter(run / "checkpoints", 100)
    writer.save(files, make_record(step) | record, [])
    writer.wait()


def flip(path):
    """Change the last byte of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def refused(command, *arguments):
    """Return the one message of a command that is refused."""
    code, _, errors = command(*arguments)
    assert code == 2
    (error,) = errors
    assert error.startswith("error: ")
    return error


# ---- list and verify -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--verify"]])
def test_list(run, command, options):
    code, lines, errors = command(run, *options)
    assert (code, errors) == (0, [])
    head, ten, twenty, thirty, end = (line.split() for line in lines)
    assert head == ["step", "date", "size", "val/accuracy", "state"]
    assert ten[0] == "10" and ten[3:] == ["0.0", "MB", "-", "valid"]
    assert twenty[0] == "20" and twenty[3:] == ["0.0", "MB", "0.52", "best", "valid"]
    assert thirty[0] == "30" and thirty[3:] == ["0.0", "MB", "-", "valid"]
    assert ten[1].count("-") == 2 and ten[2].count(":") == 2
    assert end[:4] == ["3", "valid,", "0", "damaged"]


def test_size_counts_all_files(run, command):
    path = run / "checkpoints" / step_name(20)
    save(run / "checkpoints", 40, elements=600_000)
    size = sum(file.stat().st_size for file in (run / "checkpoints" / step_name(40)).iterdir()) / 2**20
    _, lines, _ = command(run)
    assert f"{size:.1f} MB" in lines[4] and size > 2
    assert f"{sum(file.stat().st_size for file in path.iterdir()) / 2**20:.1f} MB" in lines[2]


def test_folder_of_checkpoints_is_good_too(run, command):
    assert command(run / "checkpoints") == command(run)


def test_list_looks_at_sizes_and_verify_at_every_byte(run, command):
    flip(run / "checkpoints" / step_name(10) / "model.safetensors")
    code, lines, _ = command(run)
    assert code == 0 and lines[1].endswith("valid")
    assert "--verify reads every byte" in lines[-1]
    code, lines, _ = command(run, "--verify")
    assert code == 3
    assert lines[1].endswith("damaged: model.safetensors was altered (its checksum differs)")
    assert lines[2].endswith("valid")
    assert lines[-1] == "2 valid, 1 damaged"


@pytest.mark.parametrize("options", [[], ["--verify"]])
def test_what_is_missing_is_seen_either_way(run, command, options):
    folder = run / "checkpoints"
    (folder / step_name(10) / "rng.safetensors").unlink()
    (folder / step_name(20) / "manifest.json").unlink()
    (folder / step_name(40)).write_text("no directory")
    code, lines, _ = command(run, *options)
    assert code == 3
    assert lines[1].endswith("damaged: rng.safetensors is missing")
    assert lines[2].endswith("damaged: manifest.json is missing")
    assert lines[3].endswith("valid")
    assert lines[4].endswith("damaged: manifest.json is missing")
    assert lines[-1].startswith("1 valid, 3 damaged")


def test_nothing_but_damaged_ones(run, command):
    for path in (run / "checkpoints").iterdir():
        (path / "state.json").unlink()
    code, lines, _ = command(run)
    assert code == 3 and lines[-1].startswith("0 valid, 3 damaged")


def test_run_without_checkpoints(tmp_path, command):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    code, lines, _ = command(tmp_path / "run")
    assert code == 0 and lines[-1].startswith("0 valid, 0 damaged")


def test_one_that_is_pruned_meanwhile_is_not_called_damaged(run, command, monkeypatch):
    from train.engine import checkpoint

    listed = checkpoint.list_steps(run / "checkpoints")
    monkeypatch.setattr(checkpoint, "list_steps", lambda folder: [*listed, 40])
    code, lines, _ = command(run)
    assert code == 0 and lines[-1].startswith("3 valid, 0 damaged")


# ---- compare ---------------------------------------------------------------------------------------------------------


def test_equal(run, command, tmp_path):
    save(tmp_path / "other" / "checkpoints", 20)
    for other in (20, "best", run / "checkpoints" / step_name(20), tmp_path / "other" / "checkpoints" / step_name(20)):
        code, lines, errors = command(run, "--diff", 20, other)
        assert (code, lines, errors) == (0, ["all 6 tensors are equal, bit by bit"], [])


def test_different(run, command):
    code, lines, _ = command(run, "--diff", 10, "latest")
    assert code == 1
    assert lines[-1] == "6 of 6 tensors differ"
    assert "optimizer linear.bias/step: 1 of 1 elements differ, by 20 at most" in lines


def test_differences_are_counted_and_measured(run, command):
    state = make_state(10)
    state["model"]["linear.weight"][3, 1] += 0.5
    state["model"]["linear.weight"][5, 2] -= 2.0
    state["optimizer"]["linear.bias/exp_avg"][0] = float("nan")
    state["model"]["more"] = torch.zeros(2)
    state["rng"]["process_00000/torch"] = torch.zeros(3)
    del state["optimizer"]["linear.bias/step"]
    save_state(run, 11, state)
    paths = {step: run / "checkpoints" / step_name(step) for step in (10, 11)}
    code, lines, _ = command(run, "--diff", 10, 11)
    assert code == 1
    assert lines == [
        "model linear.weight: 2 of 300 elements differ, by 2 at most",
        f"model more: missing in {paths[10]}",
        "optimizer linear.bias/exp_avg: 1 of 7 elements differ, by nan at most",
        f"optimizer linear.bias/step: missing in {paths[11]}",
        "rng process_00000/torch: torch.float32 (16,) against torch.float32 (3,)",
        "5 of 7 tensors differ",
    ]


@pytest.mark.parametrize(
    ("one", "other", "text"),
    [
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), ""),
        (torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), "1 of 2 elements differ, by 0 at most"),
        (torch.tensor(2**62), torch.tensor(2**62 + 1), "1 of 1 elements differ, by 0 at most"),
        (torch.tensor([True, False]), torch.tensor([True, True]), "1 of 2 elements differ, by 1 at most"),
        (torch.zeros(0, 3), torch.zeros(0, 3), ""),
        (torch.zeros(3), torch.zeros(3, dtype=torch.float64), "torch.float32 (3,) against torch.float64 (3,)"),
        (torch.tensor([3 + 4j]), torch.tensor([0j]), "1 of 1 elements differ, by 5 at most"),
        (torch.ones(2).to(torch.float8_e4m3fn), torch.zeros(2).to(torch.float8_e4m3fn), "2 of 2 elements differ, by 1"),
        (torch.tensor([7], dtype=torch.uint64), torch.tensor([5], dtype=torch.uint64), "1 of 1 elements differ, by 2"),
        (torch.eye(3), torch.eye(3).t().contiguous().t(), ""),
    ],
)
def test_tensors_of_all_kinds(one, other, text):
    found = checkpoints.compare_tensors(one, other)
    assert found.startswith(text) and bool(found) == bool(text)


def sharded(tensors, processes):
    """Return the files of a part that several processes would save."""
    return {rank: own_pieces(tensors, rank, processes) for rank in range(processes)}


def save_sharded(run, step, state, processes):
    files = {"rng": state["rng"]}
    for part in ("model", "optimizer"):
        for rank, pieces in sharded(state[part], processes).items():
            files[shard_file(part, rank, processes)] = pieces
    save_state(run, step, files, whole={part: describe_whole(state[part]) for part in ("model", "optimizer")})


def test_sharded_and_whole_are_comparable(run, command, tmp_path):
    save_sharded(tmp_path / "other", 20, make_state(20), 3)
    other = tmp_path / "other" / "checkpoints" / step_name(20)
    assert len(list(other.iterdir())) == 9
    assert command(run, "--diff", 20, other)[:2] == (0, ["all 6 tensors are equal, bit by bit"])
    state = make_state(20)
    state["model"]["linear.bias"][-1] += 1
    save_sharded(tmp_path / "third", 20, state, 2)
    code, lines, _ = command(run, "--diff", other, tmp_path / "third" / "checkpoints" / step_name(20))
    assert code == 1 and lines == [
        "model linear.bias: 1 of 7 elements differ, by 1 at most",
        "1 of 6 tensors differ",
    ]


def test_shards_that_do_not_fit_together(run, command):
    state = make_state(20)
    whole = {part: describe_whole(state[part]) for part in ("model", "optimizer")}
    files = {part: state[part] for part in ("optimizer", "rng")}
    pieces = sharded(state["model"], 2)
    pieces[1].popitem()
    save_state(run, 40, files | {shard_file("model", rank, 2): pieces[rank] for rank in range(2)}, whole=whole)
    assert "the shards lack a piece of" in refused(command, run, "--diff", 20, 40)


# ---- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "step"), [("latest", 30), ("best", 20), (10, 10), ("path", 20)])
def test_export(run, command, tmp_path, which, step):
    out = tmp_path / "weights.safetensors"
    if which == "path":
        which = run / "checkpoints" / step_name(20)
    code, lines, errors = command(run, "--export", which, out)
    assert (code, errors) == (0, [])
    assert lines == [f"{out}: 2 tensors, 0.0 MB, from model of step {step}"]
    loaded, saved = load_file(out), make_state(step)["model"]
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert sorted(os.listdir(tmp_path)) == ["run", "weights.safetensors"]


def test_averaged_weights_are_exported_where_they_were_judged(run, command, tmp_path):
    averages = make_state(5)["model"]
    config = {"config": {"best_metric": "val/ema_accuracy"}}
    save_state(run, 40, make_state(40) | {"ema": averages}, **config)
    code, lines, _ = command(run, "--export", 40, tmp_path / "weights.safetensors")
    assert code == 0 and "from ema of step 40" in lines[0]
    assert torch.equal(load_file(tmp_path / "weights.safetensors")["linear.bias"], averages["linear.bias"])


def test_tied_weights_are_exported_under_all_names(run, command, tmp_path):
    """So that the model they came from takes them as they are."""
    save_state(run, 40, make_state(40), aliases={"head.weight": "linear.weight"})
    command(run, "--export", 40, tmp_path / "weights.safetensors")
    loaded = load_file(tmp_path / "weights.safetensors")
    assert torch.equal(loaded["head.weight"], loaded["linear.weight"])
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(3, 100), "head": torch.nn.Linear(3, 100, bias=False)})
    model.linear.bias = torch.nn.Parameter(torch.zeros(7))
    model.head.weight = model.linear.weight
    model.load_state_dict(loaded)


def test_export_of_shards(run, command, tmp_path):
    save_sharded(run, 40, make_state(40), 3)
    assert command(run, "--export", "latest", tmp_path / "weights.safetensors")[0] == 0
    assert torch.equal(
        load_file(tmp_path / "weights.safetensors")["linear.weight"], make_state(40)["model"]["linear.weight"]
    )


def test_export_falls_back_and_says_so(run, command, tmp_path):
    flip(run / "checkpoints" / step_name(30) / "model.safetensors")
    code, lines, errors = command(run, "--export", "latest", tmp_path / "weights.safetensors")
    assert code == 0 and "of step 20" in lines[0]
    assert len(errors) == 1 and errors[0].startswith("skipped a checkpoint: ") and "was altered" in errors[0]


def test_nothing_is_overwritten(run, command, tmp_path):
    out = tmp_path / "weights.safetensors"
    out.write_text("kept")
    assert "exists already" in refused(command, run, "--export", "best", out)
    assert out.read_text() == "kept"
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "nothing")
    assert "exists already" in refused(command, run, "--export", "best", link)
    assert link.is_symlink() and not (tmp_path / "nothing").exists()


def test_failed_export_leaves_nothing(run, command, tmp_path, monkeypatch):
    from train.engine import storage

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", fail)
    out = tmp_path / "weights.safetensors"
    assert "No space left on device" in refused(command, run, "--export", "best", out)
    assert os.listdir(tmp_path) == ["run"]


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--diff", 10, 11], "11: neither best, latest, a step of the run (10, 20, 30) nor the folder"),
        (["--diff", "bset", 10], "bset: neither best, latest"),
        (["--diff", 10, "9" * 5000], "neither best, latest"),
        (["--export", "best", "weights.pt"], "weights.pt must end in .safetensors"),
        (["--export", "best", "missing/weights.safetensors"], "cannot write missing/weights.safetensors"),
        (["--export", 40, "weights.safetensors"], "40: neither best, latest"),
    ],
)
def test_bad_input(run, command, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    assert text in refused(command, run, *arguments)
    assert os.listdir(tmp_path) == ["run"]


def test_bad_run(command, tmp_path):
    assert "holds no checkpoints" in refused(command, tmp_path)
    assert "is no folder" in refused(command, tmp_path / "missing")
    (tmp_path / "file").write_text("")
    assert "is no folder" in refused(command, tmp_path / "file", "--verify")
    (tmp_path / "checkpoints").mkdir()
    assert "holds no checkpoints" in refused(command, tmp_path, "--export", "latest", "x.safetensors")


def test_damaged_ones_are_neither_compared_nor_exported(run, command, tmp_path):
    flip(run / "checkpoints" / step_name(20) / "model.safetensors")
    out = tmp_path / "weights.safetensors"
    for arguments in (["--diff", 20, 30], ["--export", 20, out], ["--export", "best", out]):
        assert "model.safetensors was altered" in refused(command, run, *arguments)
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["run", "--verfy"],
        ["run", "--ver"],
        ["run", "--diff", "1"],
        ["run", "--export", "best"],
        ["run", "--verify", "--diff", "1", "2"],
        ["run", "--diff", "1", "2", "--export", "best", "x.safetensors"],
    ],
)
def test_bad_usage(command, arguments):
    code, lines, errors = command(*arguments)
    assert code == 2 and lines == [] and errors[0].startswith("usage:")


def test_relative_paths(run, command, monkeypatch):
    monkeypatch.chdir(run / "checkpoints" / step_name(10))
    assert command("../..", "--diff", ".", 10)[0] == 0
    monkeypatch.chdir(run / "checkpoints")
    assert command(".", "--diff", step_name(10), 10)[0] == 0
    assert len(command(".")[1]) == 5


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; sys.argv = ['checkpoints.py', '--help']\n"
        "from train import checkpoints\n"
        "try: checkpoints.run()\n"
        "except SystemExit as leaving: assert leaving.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--export WHICH OUT.safetensors" in finished.stdout


def test_from_the_command_line(run):
    command = [sys.executable, ROOT / "train" / "checkpoints.py", run, "--verify"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "3 valid, 0 damaged" in finished.stdout and finished.stderr == ""
