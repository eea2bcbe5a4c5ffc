"""train/evaluate.py and train/predict.py as real processes, on a run that real processes trained."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from tests.process.conftest import Runs
from tests.process.fleet import Fleet
from tests.unit.test_evaluate import own_test, write_images

NUM_TEST = 33  # odd: processes get shares of different size


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on images with two processes, sharded checkpoints and compiled names, and its data."""
    folder = tmp_path_factory.mktemp("trained")
    data = folder / "data"
    write_images(data / "train", 40)
    write_images(data / "test", NUM_TEST // 3, seed=1)
    settings = ["--dataset", data, "--num_train_epochs", 3, "--learning_rate", 3e-3, "--checkpoint_format", "sharded"]
    Runs(folder, "classify").run("run", *settings, "--preflight", "off", processes=2, pictures=True)
    return folder / "run", data


def run(folder, script, *arguments, processes=1):
    return Fleet(folder / "output", script, arguments, processes=processes).wait()


def read_report(finished):
    folder = finished.output.strip().splitlines()[-1].removeprefix("wrote ")
    with open(f"{folder}/evaluation.json") as file:
        return json.load(file)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def assert_close(one, other):
    """Fail unless two values of JSON are the same, floats to 1e-6."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_close(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other):
            assert_close(left, right)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-6)
    else:
        assert one == other


def test_one_and_two_processes_count_every_sample_once_and_say_what_training_said(trained, tmp_path):
    path, _ = trained
    reports, tables = [], []
    for processes in (1, 2):
        predictions = tmp_path / f"{processes}.csv"
        finished = run(tmp_path, "evaluate", path, "--split", "test", "--predictions", predictions, processes=processes)
        assert finished.code == 0, finished.output
        assert finished.output.count("wrote ") == 2
        reports.append(read_report(finished))
        tables.append(read_csv(predictions))
        drawn = finished.output.strip().splitlines()[-1].removeprefix("wrote ") + "/confusion_matrix.png"
        assert Path(drawn).read_bytes() == (path / "plots" / "confusion_matrix.png").read_bytes()
    own = own_test(path)
    for report, table in zip(reports, tables):
        assert report["samples"] == len(table) == sum(map(sum, report["confusion_matrix"])) == NUM_TEST
        assert [int(row["index"]) for row in table] == list(range(NUM_TEST))
        assert report["metrics"]["accuracy"]["value"] == pytest.approx(own["test/accuracy"], abs=1e-12)
        assert report["metrics"]["loss"]["value"] == pytest.approx(own["test/loss"], abs=1e-6)
    assert_close(*reports)
    assert [row["prediction"] for row in tables[0]] == [row["prediction"] for row in tables[1]]


def test_a_single_sample_counts_once_on_two_processes(trained, tmp_path):
    path, data = trained
    (tmp_path / "other" / "dog").mkdir(parents=True)
    shutil.copy(data / "test" / "dog" / "003.png", tmp_path / "other" / "dog")
    finished = run(tmp_path, "evaluate", path, "--dataset", tmp_path / "other", processes=2)
    assert finished.code == 0, finished.output
    report = read_report(finished)
    assert report["samples"] == sum(map(sum, report["confusion_matrix"])) == 1


def test_exported_images_get_the_same_classes(trained, tmp_path):
    path, data = trained
    run(tmp_path, "evaluate", path, "--predictions", tmp_path / "own.csv")
    finished = run(tmp_path, "predict", path, data / "test", "--output", tmp_path / "new.csv")
    assert finished.code == 0, finished.output
    own, new = read_csv(tmp_path / "own.csv"), read_csv(tmp_path / "new.csv")
    assert [row["prediction"] for row in own] == [row["prediction"] for row in new]
    assert len(finished.output.splitlines()) == NUM_TEST + 1


@pytest.mark.parametrize("processes", [1, 2])
def test_what_cannot_be_evaluated_ends_all_processes_with_code_2(trained, tmp_path, processes):
    path, _ = trained
    (tmp_path / "a.csv").write_text("age,label\n1,cat\n")
    before = sorted(path.rglob("*"))
    finished = run(tmp_path, "evaluate", path, "--dataset", tmp_path / "a.csv", processes=processes)
    assert finished.code == 2, finished.output
    assert finished.output.count("error: ") == 1 and "a.csv: has no column 'image'" in finished.output
    assert sorted(path.rglob("*")) == before


def test_predictions_are_made_by_one_process(trained, tmp_path):
    path, data = trained
    finished = run(tmp_path, "predict", path, data / "test", processes=2)
    assert finished.code == 2 and "leave the launcher out" in finished.output
