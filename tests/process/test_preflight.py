"""Preflight in real processes: exit codes, the report, and that it leaves no trace in the run that follows."""

import json

import pytest

SHORT = ("--model", "mnist_cnn", "--max_train_steps", 6, "--log_every", 1, "--batch_size", 48)
PLACES = {
    "one process": {"processes": 1},
    "two processes": {"processes": 2},
    "FSDP2": {"processes": 2, "faults": [("use_fsdp2",)]},
    "FSDP2 by layers": {"processes": 2, "faults": [("use_fsdp2", "Conv2d", "Linear")]},
}


def findings(classify, name, file="preflight.json"):
    report = json.loads((classify.folder / name / file).read_text())
    return {finding["check"]: finding for finding in report["findings"]}


@pytest.mark.parametrize("where", PLACES)
def test_neither_quick_nor_full_changes_the_run(classify, where):
    """mnist_cnn has dropout; six steps, an evaluation and a checkpoint are the same to the last bit."""
    place = PLACES[where]
    classify.run("without", *SHORT, "--preflight", "off", **place)
    quick = classify.run("quick", *SHORT, **place)
    assert "preflight quick:" in quick.output
    full = classify.run("full", *SHORT, "--preflight", **place)
    assert "preflight full:" in full.output
    assert classify.steps("full") == []
    classify.run("full", *SHORT, **place)
    for name in ("quick", "full"):
        classify.assert_same("without", name, 6)
        assert classify.file("without", 6, "rng.safetensors") == classify.file(name, 6, "rng.safetensors")


@pytest.mark.parametrize("where", PLACES)
def test_full_preflight_passes_and_reports(classify, where):
    finished = classify.run(
        "run", "--preflight", "--ema_decay", 0.9, "--micro_batch_size", 16, pictures=True, **PLACES[where]
    )
    found = findings(classify, "run")
    assert {finding["status"] for finding in found.values()} <= {"pass", "skip", "warn"}, finished.output
    assert found["round trip"]["status"] == "pass"
    folder = classify.folder / "run"
    assert {"preflight.json", "preflight.md"} <= {path.name for path in folder.iterdir()}
    assert {path.name for path in (folder / "plots").iterdir()} == {"first_batch.png", "preflight.png"}
    assert list((folder / "checkpoints").iterdir()) == []
    assert not (folder / "metrics.jsonl").exists()


def test_a_failed_check_ends_with_3_and_names_the_cause(classify):
    finished = classify.start("run", "--preflight", "--learning_rate", 10).wait()
    assert finished.code == 3
    assert findings(classify, "run")["step size"]["status"] == "fail"
    assert "FAIL step size" in finished.output and "--learning_rate" in finished.output


def test_a_failed_check_ends_all_processes_with_3(classify):
    finished = classify.start("run", "--preflight", "--learning_rate", 10, processes=2).wait()
    assert finished.codes == [3, 3]


def test_learning_rates_are_tried(classify):
    finished = classify.run("run", "--preflight", "lr")
    assert (classify.folder / "run" / "plots" / "learning_rate.png").exists()
    assert list(findings(classify, "run", "preflight_lr.json")) == ["learning rate"]
    assert "preflight lr: 1 passed" in finished.output


def test_preflight_of_a_run_with_checkpoints_leaves_them_alone(classify):
    classify.run("run", *SHORT)
    before = {
        path: path.read_bytes() for path in (classify.folder / "run").rglob("*.*") if "preflight" not in path.name
    }
    looked = classify.run("run", *SHORT, "--preflight")
    assert "has checkpoints; a fresh start is examined" in looked.output and "refused" not in looked.output
    other = classify.run("run", *SHORT, "--learning_rate", 0.002, "--preflight")
    assert "training would be refused" in other.output and "learning_rate: 0.001 in the checkpoint" in other.output
    after = {path: path.read_bytes() for path in (classify.folder / "run").rglob("*.*") if "preflight" not in path.name}
    for kept in before.keys() | after.keys():
        assert kept.name in ("run.lock", "first_batch.png") or before[kept] == after[kept], kept


def test_a_resumed_run_looks_at_the_machine_only(classify):
    classify.run("run", *SHORT)
    again = classify.run("run", *SHORT, "--max_train_steps", 8)
    assert "resuming" in again.output
    assert "preflight quick: " in again.output
    assert "loss at initialisation" in findings(classify, "run")  # of the first start


def test_dry_run_writes_nothing(classify):
    for preflight in (["--preflight"], []):
        classify.run("run", "--dry_run", *preflight)
    assert not (classify.folder / "run").exists()
