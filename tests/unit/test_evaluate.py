"""train/evaluate.py and train/predict.py, in this process: arithmetic by hand, other data, and what is refused."""

import csv
import json
import math
import shutil
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from train import classify, evaluate, predict, reconstruct, stateful_lstm
from train.engine import session
from train.evaluation import judging
from train.evaluation import results as results_module
from train.evaluation.pictures import draw_confusion_matrix
from train.evaluation.tables import to_markdown

CLASSES = ("cat", "dog", "emu")


def write_images(folder, count, classes=CLASSES, seed=0, side=8):
    """Write grey images that are brighter the later their class is among CLASSES, folder by folder."""
    noise = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = noise.normal(60 + 50 * CLASSES.index(name), 40, (side, side)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")
    return folder


def write_people(path, count, seed=0, classes=CLASSES, header=("age", "town", "label")):
    """Write rows whose label follows from age and town."""
    chance = np.random.default_rng(seed)
    with open(path, "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(header)
        for number in range(count):
            name = classes[number % len(classes)]
            place = CLASSES.index(name)
            values = {"age": round(chance.normal(20 + 20 * place, 8), 2), "town": f"0{chance.integers(1, 4)}"}
            lines.writerow([values.get(column, name) for column in header])
    return path


def train(script, kind, folder, name, **settings):
    """Train in this process, without the pictures at the end, which take a second; return the folder of the run."""
    common = {"output_dir": str(folder), "run_name": name, "tracker": ("none",)}
    if script is not stateful_lstm:
        common["preflight"] = "off"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "draw_curves", lambda *_: None)
        assert script.main(kind(**{**common, **settings})) == 0
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def pictures(folder):
    """A run on images, and the data that it was trained on."""
    data = folder / "pictures"
    write_images(data / "train", 30)
    write_images(data / "test", 11, seed=1)
    run = train(
        classify, classify.ClassifySettings, folder, "images",
        dataset=str(data), num_train_epochs=3, learning_rate=3e-3, ema_decay=0.9, best_metric="val/ema_loss",
        best_mode="min",
    )  # fmt: skip
    return run, data


@pytest.fixture(scope="module")
def people(folder):
    """A run on a table, and its file."""
    file = write_people(folder / "people.csv", 120)
    settings = {"dataset": str(file), "num_train_epochs": 20, "learning_rate": 1e-2, "categorical_columns": ("town",)}
    return train(classify, classify.ClassifySettings, folder, "table", **settings), file


@pytest.fixture
def drawn():
    """Draw all pictures, which takes most of the time of an evaluation."""


@pytest.fixture(autouse=True)
def _few_pictures(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        for name in ("draw_confusion_matrix", "draw_reliability"):
            monkeypatch.setattr(results_module, name, lambda *_: None)


@pytest.fixture
def command(capsys, monkeypatch):
    """Run a script in this process; return exit code, output and lines of errors."""

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            script.run()
        printed = capsys.readouterr()
        return caught.value.code, printed.out, printed.err.splitlines()

    return call


@pytest.fixture
def results(command):
    """Evaluate; return what is in evaluation.json and the folder of it."""

    def call(run, *arguments):
        code, out, errors = command(evaluate, run, *arguments)
        assert (code, errors) == (0, []), (out, errors)
        written = run.__class__(out.strip().splitlines()[-1].removeprefix("wrote "))
        return json.loads((written / "evaluation.json").read_text()), written

    return call


def own_test(run):
    """Return the results on the test split that training wrote."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {name: value for line in lines for name, value in line.items() if name.startswith("test/")}


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- arithmetic ------------------------------------------------------------------------------------------------------

LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 2])
PREDICTED = np.array([0, 1, 0, 1, 1, 0, 2, 2])


def logits_of(predicted, num_classes, margin=2.0):
    return np.eye(num_classes, dtype=np.float32)[predicted] * margin


def test_scores_of_classes_by_hand():
    report = judging.judge_classifier(logits_of(PREDICTED, 4), LABELS, ["a", "b", "c", "d"])
    assert report["confusion_matrix"] == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]]
    scores = [[one[name]["value"] for name in ("precision", "recall", "f1")] for one in report["classes"]]
    expected = [[2 / 3, 2 / 3, 2 / 3], [2 / 3, 1, 4 / 5], [1, 2 / 3, 4 / 5], [0, 0, 0]]
    assert np.allclose(scores, expected)
    assert [one["support"] for one in report["classes"]] == [3, 2, 3, 0]
    metrics = {name: entry["value"] for name, entry in report["metrics"].items()}
    sure = math.exp(2) / (math.exp(2) + 3)
    assert metrics["accuracy"] == 6 / 8
    assert math.isclose(metrics["macro_f1"], (2 / 3 + 4 / 5 + 4 / 5) / 3)  # d has no sample, so it does not count
    assert math.isclose(metrics["loss"], -(6 * math.log(sure) + 2 * math.log((1 - sure) / 3)) / 8, rel_tol=1e-6)
    assert "top_5_accuracy" not in metrics


def test_top_5_counts_labels_among_the_five_likeliest_where_there_are_six_classes():
    logits = np.tile(np.arange(6, dtype=np.float32), (4, 1))
    report = judging.judge_classifier(logits, np.array([5, 1, 0, 0]), list("abcdef"))
    entry = report["metrics"]["top_5_accuracy"]
    assert entry["value"] == 0.5 and entry["interval"][0] <= 0.5 <= entry["interval"][1]


def test_calibration_error_by_hand():
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.38, 0.62], [0.62, 0.38]])
    found = judging.calibrate(probabilities, np.array([0, 1, 1, 0]))
    # Two answers at 0.95, half of them right; two at 0.62, both right.
    assert math.isclose(found["ece"], (2 * abs(0.5 - 0.95) + 2 * abs(1 - 0.62)) / 4)
    assert [(one["samples"], one["accuracy"]) for one in found["bins"]] == [(2, 1.0), (2, 0.5)]
    assert judging.calibrate(np.array([[1.0, 0.0]]), np.array([0]))["ece"] == 0


def test_intervals_hold_the_estimate_and_come_out_the_same_again():
    chance = np.random.default_rng(0)
    labels = chance.integers(0, 3, 200)
    logits = (np.eye(3)[labels] * 1.5 + chance.normal(size=(200, 3))).astype(np.float32)
    report = judging.judge_classifier(logits, labels, CLASSES)
    entries = [*report["metrics"].values()]
    entries += [one[name] for one in report["classes"] for name in ("precision", "recall", "f1")]
    for entry in entries:
        low, high = entry["interval"]
        assert low < entry["value"] < high
    # For a share of n samples the width is that of the normal distribution, 2 * 1.96 * sqrt(p * (1 - p) / n).
    accuracy = report["metrics"]["accuracy"]
    width = 2 * 1.96 * math.sqrt(accuracy["value"] * (1 - accuracy["value"]) / 200)
    assert accuracy["interval"][1] - accuracy["interval"][0] == pytest.approx(width, rel=0.15)
    assert judging.judge_classifier(logits, labels, CLASSES) == report


def test_errors_of_a_sequence_are_drawn_by_blocks():
    errors = np.repeat(np.random.default_rng(0).normal(size=20) ** 2, 50)[:, None]
    alone = judging.judge_means(["loss"], errors)["loss"]
    blocks = judging.judge_means(["loss"], errors, block=50)["loss"]
    assert [alone["value"], blocks["value"]] == pytest.approx([errors.mean()] * 2)
    widths = [high - low for low, high in (alone["interval"], blocks["interval"])]
    assert widths[1] > 4 * widths[0]  # 20 numbers, not 1,000
    assert judging.judge_means(["loss"], errors, block=200)["loss"]["interval"] is None


def test_many_classes_are_cut_to_the_worst(tmp_path):
    names = [f"class | {number}" for number in range(60)]
    labels = np.arange(60).repeat(2)
    report = judging.judge_classifier(logits_of(np.where(labels == 7, 8, labels), 60), labels, names)
    text = to_markdown({
        "dataset": "a", "split": "b", "samples": 120, "step": 1, "weights": "model", "run": "c", **report,
    })  # fmt: skip
    assert "20 of 60 classes" in text and "class \\| 7 " in text and "taken for" in text and len(text) < 4000
    draw_confusion_matrix(report["confusion_matrix"], ["$a", "b$", *names[2:]], tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width > 400


# ---- the run's own data ----------------------------------------------------------------------------------------------


def test_the_average_of_the_weights_gives_what_training_said_of_it(pictures, results, drawn):
    run, _ = pictures
    report, written = results(run)
    own = own_test(run)
    assert report["weights"] == "ema" and report["samples"] == 33
    assert report["metrics"]["accuracy"]["value"] == pytest.approx(own["test/accuracy"], abs=1e-12)
    assert report["metrics"]["loss"]["value"] == pytest.approx(own["test/loss"], rel=1e-6)
    assert written.name == f"test-step_{report['step']:08d}"
    assert {path.name for path in written.iterdir()} == {
        "evaluation.json", "evaluation.md", "confusion_matrix.png", "reliability.png",
    }  # fmt: skip


def test_a_step_and_another_split_can_be_chosen(pictures, results, tmp_path):
    run, _ = pictures
    first, *_, latest = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    report, written = results(run, "--checkpoint", int(latest[5:]), "--split", "validation")
    assert written.name == f"validation-{latest}"
    again, _ = results(run, "--checkpoint", "latest", "--split", "validation", "--predictions", tmp_path / "a.parquet")
    assert again == report
    earlier, written = results(run, "--checkpoint", int(first[5:]), "--split", "validation")
    assert written.name == f"validation-{first}" and earlier["metrics"]["loss"] != report["metrics"]["loss"]
    table = pq.read_table(tmp_path / "a.parquet").to_pydict()
    # The rows of the training split that were cut for validation, sorted by class as the folders are.
    assert table["index"] == sorted(table["index"]) and table["index"][-1] > 60
    assert [CLASSES[index // 30] for index in table["index"]] == table["label"]
    assert np.allclose(sum(np.array(table[f"probability_{name}"]) for name in CLASSES), 1)


def test_without_a_test_split_validation_is_taken(people, results):
    run, _ = people
    report, _ = results(run)
    assert report["split"] == "validation" and report["samples"] == 12


def test_data_that_changed_are_refused(people, command, tmp_path):
    run, file = people
    before = file.read_text()
    try:
        write_people(file, 120, seed=5)
        code, _, errors = command(evaluate, run)
    finally:
        file.write_text(before)
    assert code == 2 and "has changed since" in errors[0] and "--dataset" in errors[0]


# ---- other data ------------------------------------------------------------------------------------------------------


def test_classes_in_another_order_or_fewer_are_matched_by_name(pictures, results, tmp_path):
    run, data = pictures
    report, _ = results(run, "--predictions", tmp_path / "own.csv")
    own = {(row["label"], row["index"]): row for row in read_csv(tmp_path / "own.csv")}
    for names in (("emu", "dog"), ("dog",), ("dog", "cat", "emu")):
        other = tmp_path / "-".join(names) / "x"
        other.mkdir(parents=True)
        for name in names:
            shutil.copytree(data / "test" / name, other / name)
        found, written = results(run, "--dataset", other, "--predictions", tmp_path / "other.csv")
        assert written.name.startswith("x-all-step_")
        rows = read_csv(tmp_path / "other.csv")
        assert {row["label"] for row in rows} == set(names)
        if len(names) == 3:
            assert found["confusion_matrix"] == report["confusion_matrix"]
        same = [row for row in own.values() if row["label"] in names]
        assert sorted((row["label"], row["prediction"], row["probability_emu"]) for row in rows) == sorted(
            (row["label"], row["prediction"], row["probability_emu"]) for row in same
        )
    counts = np.array(found["confusion_matrix"])
    assert counts.sum() == 33


def test_class_labels_with_other_numbers_are_matched_by_name(people, results, tmp_path):
    datasets = pytest.importorskip("datasets")
    run, _ = people
    names = ["emu", "cat"]
    columns = {"age": [20.0, 60.0, 21.0], "town": ["01", "02", "03"], "label": [1, 0, 1]}
    features = datasets.Features(
        age=datasets.Value("float64"), town=datasets.Value("string"), label=datasets.ClassLabel(names=names)
    )
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "saved"))
    report, _ = results(run, "--dataset", tmp_path / "saved")
    assert [one["support"] for one in report["classes"]] == [2, 0, 1]
    assert report["metrics"]["accuracy"]["value"] == 1


def test_a_file_with_the_rows_of_training_gives_the_same_answers(people, results, tmp_path):
    """Zip codes stay text, although all of this file look like numbers; the order of columns is free."""
    run, file = people
    (tmp_path / "a").mkdir()
    other = tmp_path / "a" / "people.csv"
    rows = read_csv(file)
    with open(other, "w", newline="") as lines:
        writer = csv.DictWriter(lines, ["label", "extra", "town", "age"])
        writer.writeheader()
        writer.writerows([{**row, "extra": 1} for row in rows])
    whole, _ = results(run, "--split", "train", "--predictions", tmp_path / "own.csv")
    results(run, "--dataset", other, "--label_column", "label", "--predictions", tmp_path / "other.csv")
    found = read_csv(tmp_path / "other.csv")
    own = read_csv(tmp_path / "own.csv")
    assert len(own) == whole["samples"] == 108 and len(found) == 120
    for row in own:
        twin = found[int(row["index"])]
        assert row["label"] == twin["label"] and row["prediction"] == twin["prediction"]
        assert float(row["probability_cat"]) == pytest.approx(float(twin["probability_cat"]), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("emu", "cow"), ["class 'cow'", "column 'label'", "'cat', 'dog', 'emu'", "line 4"]),
        (("age,", "size,"), ["has no column 'age'", "size, town, label"]),
        (("label", "kind"), ["Name it with --label_column"]),
        (("01", "01,7"), ["line", "4 cells, the header has 3"]),
        (("dog", ""), ["line 3", "is missing"]),
        ((",0", "1e999,0"), ["line", "column 'age'"]),
    ],
)
def test_other_data_that_cannot_be_used_are_named(people, command, tmp_path, change, said):
    run, _ = people
    text = write_people(tmp_path / "a.csv", 30).read_text()
    (tmp_path / "a.csv").write_text(text.replace(*change))
    before = sorted(run.rglob("*"))
    code, _, errors = command(evaluate, run, "--dataset", tmp_path / "a.csv", "--predictions", tmp_path / "p.csv")
    assert code == 2 and len(errors) == 1 and all(part in errors[0] for part in said), errors
    assert "a.csv" in errors[0] and "on_bad_sample" not in errors[0]
    assert sorted(run.rglob("*")) == before and not (tmp_path / "p.csv").exists()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(people, tmp_path):
    """A copy of a run, to be damaged."""
    return shutil.copytree(people[0], tmp_path / "run")


def remove_checkpoints(run):
    for path in (run / "checkpoints").glob("step_*"):
        shutil.rmtree(path)


def damage_checkpoints(run):
    for path in (run / "checkpoints").glob("step_*/model.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


def block_results(run):
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    (run / "evaluation").write_text("a file")


@pytest.mark.parametrize(
    ("damage", "arguments", "said"),
    [
        (shutil.rmtree, [], "is no folder; give the folder of a run"),
        (lambda run: shutil.rmtree(run / "checkpoints"), [], "holds no checkpoints"),
        (remove_checkpoints, [], "holds no checkpoints"),
        (damage_checkpoints, [], "was altered"),
        (lambda run: None, ["--checkpoint", "7"], "step of the run ("),
        (lambda run: None, ["--checkpoint", "worst"], "neither best, latest nor a step"),
        (lambda run: None, ["--split", "exam"], "no split 'exam', choose with --split from: train, validation"),
        (lambda run: (run / "preprocessing.json").unlink(), [], "preprocessing.json: cannot be read"),
        (lambda run: (run / "preprocessing.json").write_text("{"), [], "preprocessing.json: is damaged"),
        (lambda run: None, ["--predictions", "a.txt"], "must end in .csv or .parquet"),
        (lambda run: None, ["--predictions", "nowhere/a.csv"], "make the folder"),
        (lambda run: None, ["--label_column", "label"], "named by --dataset; leave it out"),
        (lambda run: None, ["--dataset", "nowhere.csv"], "no such file or folder"),
        (block_results, [], "cannot be written (File exists)"),
    ],
)
def test_bad_usage_is_one_message_and_nothing_is_written(broken, command, damage, arguments, said):
    damage(broken)
    before = sorted(broken.rglob("*"))
    code, _, errors = command(evaluate, broken, *arguments)
    assert code == 2 and errors[0].startswith("error: ") and said in errors[0], errors
    assert sorted(broken.rglob("*")) == before


def test_preprocessing_of_another_run_is_refused(broken, pictures, command):
    shutil.copy(pictures[0] / "preprocessing.json", broken)
    code, _, errors = command(evaluate, broken)
    assert code == 2 and "another normalization" in errors[0]


def test_a_run_on_points_that_are_made_says_that_no_file_has_such_samples(folder, results, command):
    run = train(classify, classify.ClassifySettings, folder, "blobs", dataset="blobs", num_train_epochs=1)
    assert results(run)[0]["samples"] == 400
    (folder / "a.jsonl").write_text('{"inputs": [1.0, 2.0], "label": "left"}\n')
    for script, arguments in ((evaluate, ["--dataset"]), (predict, [])):
        code, _, errors = command(script, run, *arguments, folder / "a.jsonl")
        assert code == 2 and "was trained on blobs, whose samples are in no file" in errors[0]


def test_a_model_that_answers_nan_is_named(people, command, monkeypatch):
    from train.evaluation import answers

    run, _ = people
    monkeypatch.setattr(
        answers, "build_answer", lambda *_: ([], lambda batch: torch.full((len(batch["labels"]), 3), math.nan))
    )
    code, _, errors = command(evaluate, run)
    assert code == 2 and "NaN or infinity to 12 of 12 samples, first number 0" in errors[0]


# ---- predictions -----------------------------------------------------------------------------------------------------


def test_predictions_of_images_are_those_of_evaluation(pictures, results, command, tmp_path):
    run, data = pictures
    results(run, "--predictions", tmp_path / "own.csv")
    code, out, errors = command(predict, run, data / "test", "--top", 2, "--output", tmp_path / "new.csv")
    assert (code, errors) == (0, [])
    own, new = read_csv(tmp_path / "own.csv"), read_csv(tmp_path / "new.csv")
    assert [row["prediction"] for row in new] == [row["prediction"] for row in own]
    assert [row["sample"].split("/")[-2] for row in new] == [row["label"] for row in own]
    for one, other in zip(own, new):
        assert float(one["probability_dog"]) == pytest.approx(float(other["probability_dog"]), abs=1e-6)
    name, _, told = out.splitlines()[0].partition(": ")
    first, share, second, _ = told.split()
    assert name == str(data / "test" / "cat" / "000.png")
    assert first == new[0]["prediction"] != second and float(share) == pytest.approx(
        float(new[0][f"probability_{first}"]), abs=1e-4
    )


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_predictions_of_rows_need_no_label(people, results, command, tmp_path, suffix):
    run, _ = people
    (tmp_path / "labelled").mkdir()
    labelled = write_people(tmp_path / "labelled" / "a.csv", 9, seed=3)
    results(run, "--dataset", labelled, "--predictions", tmp_path / "own.csv")
    own = read_csv(tmp_path / "own.csv")
    rows = [{"age": float(row["age"]), "town": row["town"]} for row in read_csv(labelled)]
    if suffix == "csv":
        (tmp_path / "new.csv").write_text("age,town\n" + "".join(f"{row['age']},{row['town']}\n" for row in rows))
    elif suffix == "jsonl":
        (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow as pa

        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "new.parquet")
    code, out, errors = command(predict, run, tmp_path / f"new.{suffix}", "--output", tmp_path / "out.jsonl")
    assert (code, errors) == (0, [])
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in found] == [row["prediction"] for row in own]
    where = {"csv": "line 2", "jsonl": "line 1", "parquet": "row 0"}[suffix]
    assert out.splitlines()[0].startswith(f"{tmp_path / f'new.{suffix}'}, {where}: ")


def write_bad_files(folder):
    (folder / "text.png").write_text("no image")
    Image.new("L", (9, 8)).save(folder / "wide.png")
    (folder / "empty").mkdir()
    (folder / "word.csv").write_text("age,town\nold,01\n")
    (folder / "size.csv").write_text("size,town\n1,01\n")
    (folder / "none.csv").write_text("age,town\n")
    (folder / "a.txt").write_text("some words\n")


@pytest.mark.parametrize(
    ("which", "name", "said"),
    [
        ("images", "text.png", "text.png cannot be decoded (no known image format)"),
        ("images", "wide.png", "wide.png is 8 x 9 pixels (height x width), the first image 8 x 8; train with"),
        ("images", "empty", "empty: the folder holds no file of the kinds"),
        ("images", "nowhere.png", "nowhere.png: no such file or folder"),
        ("table", "word.csv", "word.csv, line 2: column 'age' is 'old', not a number"),
        ("table", "size.csv", "size.csv: has no column 'age'"),
        ("table", "none.csv", "none.csv: has no rows"),
        ("table", "a.txt", "a.txt: the run takes table samples, in files of the kinds .csv"),
    ],
)
def test_samples_that_cannot_be_used_are_named(pictures, people, command, tmp_path, which, name, said):
    write_bad_files(tmp_path)
    run = {"images": pictures[0], "table": people[0]}[which]
    code, out, errors = command(predict, run, tmp_path / name, "--output", tmp_path / "out.csv")
    assert code == 2 and out == "" and len(errors) == 1 and said in errors[0], errors
    assert not (tmp_path / "out.csv").exists()


def test_a_file_that_is_read_is_not_written_over(people, command):
    run, file = people
    before = file.read_bytes()
    code, _, errors = command(predict, run, file, "--output", file)
    assert code == 2 and "one of the files to be read" in errors[0] and file.read_bytes() == before


def test_a_line_has_one_class_or_more(people, command):
    run, file = people
    code, _, errors = command(predict, run, file, "--top", 0)
    assert code == 2 and errors == ["error: --top 0: must be 1 or more"]
    _, out, _ = command(predict, run, file, "--top", 9)
    assert all(f" {name} " in out.splitlines()[0] for name in CLASSES)


def test_texts_come_from_lines_files_and_stdin(folder, command, results, tmp_path, monkeypatch):
    data = folder / "reviews.csv"
    words = [("good film", "pos"), ("bad film", "neg")] * 40
    data.write_text(
        "review,label\n" + "".join(f"a very {text} it was {n},{label}\n" for n, (text, label) in enumerate(words))
    )
    settings = {"dataset": str(data), "num_train_epochs": 8, "learning_rate": 2e-2, "min_count": 1}
    run = train(classify, classify.ClassifySettings, folder, "texts", **settings)
    report, _ = results(run)
    assert report["metrics"]["accuracy"]["value"] == 1
    lines = "what a bad film\n\na very good one it was\n"
    (tmp_path / "a.txt").write_text(lines)
    code, out, errors = command(predict, run, tmp_path / "a.txt")
    assert (code, errors) == (0, [])
    told = [line.rpartition(": ")[2].split()[0] for line in out.splitlines()]
    assert told == ["neg", "pos"] and "a.txt, line 3: " in out
    monkeypatch.setattr(sys.stdin, "read", lambda: lines, raising=False)
    assert command(predict, run, "-")[1].replace("-, line", "line") == out.replace(
        f"{tmp_path / 'a.txt'}, line", "line"
    )


def test_scans_of_digits_are_scaled_to_the_levels_of_training(folder, command, tmp_path):
    from data_modules.embedded import load_digits

    settings = {"num_train_epochs": 2, "learning_rate": 5e-3}
    run = train(classify, classify.ClassifySettings, folder, "digits", **settings)
    test = load_digits().test
    pixels = test.samples.tensors["inputs"][:40, 0].float()
    for number, image in enumerate(pixels):  # 17 grey levels, as a file of 256
        scaled = (image * 255 / 16).round().byte().numpy()
        Image.fromarray(scaled).save(tmp_path / f"{number:02d}.png")
    command(evaluate, run, "--predictions", tmp_path / "own.csv")
    code, out, _ = command(predict, run, tmp_path)
    assert code == 0
    told = [line.rpartition(": ")[2].split()[0] for line in out.splitlines()]
    assert told == [row["prediction"] for row in read_csv(tmp_path / "own.csv")][:40]


# ---- autoencoders and sequences --------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [{"kl_weight": 1e-3}, {"ssim_weight": 0.0}])
def test_reconstructions_are_judged_as_in_training(results, command, tmp_path, part):
    data = tmp_path / "waves"
    write_images(data / "train", 16, side=16)
    write_images(data / "test", 3, seed=1, side=16)
    settings = {"dataset": str(data), "num_train_epochs": 2, "bottleneck": 8, "width": 8, **part}
    run = train(reconstruct, reconstruct.ReconstructSettings, tmp_path, "waves-run", **settings)
    report, written = results(run, "--predictions", tmp_path / "a.csv")
    own = own_test(run)
    assert set(report["metrics"]) == {"loss", "mse", "psnr", "ssim", *(["kl"] if "kl_weight" in part else [])}
    for name in report["metrics"]:
        assert report["metrics"][name]["value"] == pytest.approx(own[f"test/{name}"], rel=1e-5), name
        low, high = report["metrics"][name]["interval"]
        assert low < own[f"test/{name}"] < high
    assert (written / "worst.png").exists()
    rows = read_csv(tmp_path / "a.csv")
    assert len(rows) == 9 and np.mean([float(row["mse"]) for row in rows]) == pytest.approx(own["test/mse"], rel=1e-5)

    code, out, _ = command(predict, run, data / "test", "--output", tmp_path / "new")
    assert code == 0 and len(out.splitlines()) == 10
    errors = read_csv(tmp_path / "new" / "errors.csv")
    assert [float(row["mse"]) for row in errors] == pytest.approx([float(row["mse"]) for row in rows], rel=1e-4)
    picture = np.asarray(Image.open(tmp_path / "new" / errors[4]["file"])) / 255
    original = np.asarray(Image.open(errors[4]["sample"])) / 255
    assert np.square(picture - original).mean() == pytest.approx(float(errors[4]["mse"]), rel=0.05)
    code, _, messages = command(predict, run, data / "test", "--top", 3)
    assert code == 2 and "is for classes" in messages[0]
    code, _, messages = command(predict, run, data / "test", "--output", tmp_path / "new")
    assert code == 2 and "must be a new folder" in messages[0]


def test_a_sequence_is_judged_as_in_training(folder, results, command, tmp_path):
    chance = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        inputs = chance.normal(size=(6000, 2))
        np.save(folder / f"{name}.npy", np.column_stack([inputs, inputs.sum(axis=1)]).astype(np.float32))
    files = {"data": str(folder / "a.npy"), "test_data": str(folder / "b.npy")}
    settings = {**files, "num_train_epochs": 1, "window": 50, "hidden_size": 4, "engine": "eager"}
    run = train(stateful_lstm, stateful_lstm.StatefulSettings, folder, "sequence", **settings)
    report, _ = results(run, "--predictions", tmp_path / "a.csv")
    own = own_test(run)["test/loss"]
    assert report["metrics"]["loss"]["value"] == pytest.approx(own, rel=1e-6)
    assert report["metrics"]["loss"]["interval"][0] < own < report["metrics"]["loss"]["interval"][1]
    rows = read_csv(tmp_path / "a.csv")
    errors = [(float(row["prediction"]) - float(row["target"])) ** 2 for row in rows]
    assert len(rows) == 6000 and np.mean(errors) == pytest.approx(own, rel=1e-5)
    other, written = results(run, "--dataset", folder / "c.npy")
    assert other["samples"] == 6000 and written.name.startswith("c-all-step_")
    code, _, messages = command(evaluate, run, "--split", "validation")
    assert code == 2 and "choose with --split from: train, test" in messages[0]
    code, _, messages = command(predict, run, folder / "c.npy")
    assert code == 2 and "train/evaluate.py" in messages[0]
