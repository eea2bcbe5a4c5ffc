"""train/compare.py on run directories written by hand, with known numbers; mistakes are one message and exit code 2."""

import json
import math
import sys

import pytest

from tests.runs import line, start, write_run
from train import compare
from train.comparison.analysis import choose_mode, welch_interval
from train.comparison.run import Run, parse_time
from train.engine.errors import UsageError


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Run the script in tmp_path; return exit code, output and error lines."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            compare.run()
        printed = capsys.readouterr()
        return caught.value.code, printed.out, printed.err.splitlines()

    return call


@pytest.fixture
def numbers(command):
    """Run the script; return the content of its JSON file."""

    def call(*arguments):
        code, _, errors = command(*arguments, "--json", "numbers.json")
        assert (code, errors) == (0, [])
        with open("numbers.json") as file:
            return json.load(file)

    return call


@pytest.fixture
def grid(tmp_path):
    """Two learning rates with two seeds each: 0.8 and 0.9 against 0.5 and 0.7 at step 20."""
    values = {("slow", 0): 0.5, ("slow", 1): 0.7, ("fast", 0): 0.8, ("fast", 1): 0.9}
    return [
        write_run(tmp_path / f"{name}{seed}", [0.1, value], seed=seed, learning_rate=0.1 if name == "fast" else 0.001)
        for (name, seed), value in values.items()
    ]


def plain(text):
    """Return a text with its line breaks undone."""
    return " ".join(text.split())


def refused(command, *arguments):
    """Return the one message of a command that is refused."""
    code, output, errors = command(*arguments)
    assert (code, output) == (2, "")
    (error,) = errors
    assert error.startswith("error: ")
    return error


# ---- values of a run -------------------------------------------------------------------------------------------------


def test_best_last_and_value_at_the_largest_step_that_all_have(tmp_path, numbers):
    write_run(tmp_path / "long", [0.5, 0.9, 0.7, 0.8], seed=0)
    write_run(tmp_path / "short", [0.4, 0.6], seed=1)
    content = numbers("long", "short")
    assert (content["metric"], content["mode"], content["equal_step"]) == ("val/accuracy", "max", 20)
    long, short = content["runs"]
    assert long["best"] == {"step": 20, "value": 0.9} and long["last"] == {"step": 40, "value": 0.8}
    assert long["at_equal_step"] == 0.9 and short["at_equal_step"] == 0.6
    assert content["groups"][0]["mean"] == pytest.approx(0.75)  # of what both have
    assert (long["steps"], long["samples_per_second"], long["starts"]) == (40, 100.0, 1)
    assert any("compared at step 20" in warning and "long" in warning for warning in content["warnings"])


def test_lower_is_better_for_a_loss_and_a_wish_wins(tmp_path, numbers):
    lines = [line(10, 1, train_loss=1.0, val_loss=0.3), line(20, 2, train_loss=1.0, val_loss=0.5)]
    write_run(tmp_path / "one", lines)
    assert numbers("one", "--metric", "val/loss")["runs"][0]["best"]["value"] == 0.3
    assert numbers("one", "--metric", "val/loss", "--mode", "max")["runs"][0]["best"]["value"] == 0.5


def test_time_is_that_of_the_kept_steps_within_starts(tmp_path, numbers):
    # The first start ran until second 30; its step 15 was undone. The second one began an hour later, at step 10. The
    # third one did nothing but score the test split.
    lines = [line(5, 10, train_loss=1.0), line(10, 20, train_loss=1.0, val_accuracy=0.5)]
    lines += [line(15, 3611, train_loss=1.0), line(20, 3625, train_loss=1.0, val_accuracy=0.6)]
    lines += [line(20, 7300, test_accuracy=0.55)]
    write_run(tmp_path / "one", lines, starts=[start(0), start(3600, 10, processes=2), start(7200, 20)])
    (run,) = numbers("one")["runs"]
    assert run["training_seconds"] == 20 + 25
    assert (run["starts"], run["test"]) == (3, {"test/accuracy": 0.55})
    assert run["facts"]["processes"] == "1 then 2"


def test_throughput_is_a_median(tmp_path, numbers):
    speeds = [1.0, 110.0, 100.0]  # the first line is that of a cold start
    lines = [
        line(n, n, train_loss=1.0, val_accuracy=0.5, perf_samples_per_second=speed) for n, speed in enumerate(speeds)
    ]
    write_run(tmp_path / "one", lines)
    assert numbers("one")["runs"][0]["samples_per_second"] == 100.0


def test_time_of_a_run_without_starts_is_a_bound(tmp_path, command, numbers):
    write_run(tmp_path / "old", [0.5, 0.6], starts=[])
    (run,) = numbers("old")["runs"]
    assert (run["starts"], run["training_seconds"]) == (None, 2)
    assert "<= 2.0 s" in command("old")[1]


def test_time_is_a_bound_where_only_later_starts_are_known(tmp_path, numbers):
    write_run(tmp_path / "old", [0.5, 0.6, 0.7], starts=[start(2, 10)])
    (run,) = numbers("old")["runs"]
    assert (run["starts"], run["training_seconds"]) == (None, 3)


@pytest.mark.parametrize(
    ("metric", "mode"),
    [("val/loss", "min"), ("val/ema_loss", "min"), ("val/loss/1_Hz", "min"), ("val/mse", "min"),
     ("val/accuracy", "max"), ("val/ema_accuracy", "max"), ("val/ms_ssim", "max"), ("val/psnr", "max")],
)  # fmt: skip
def test_mode_follows_the_name(metric, mode):
    assert choose_mode([], metric, None) == mode


def test_mode_of_an_unknown_name_is_that_of_the_runs_or_asked_for():
    told = Run("run", "run", {"best_metric": "val/joy", "best_mode": "max"}, [])
    silent = Run("run", "run", {"best_metric": "val/loss", "best_mode": "min"}, [])
    assert choose_mode([told, silent], "val/joy", None) == "max"
    assert choose_mode([silent], "val/joy", "min") == "min"
    with pytest.raises(UsageError, match="--mode min or --mode max"):
        choose_mode([silent], "val/joy", None)


def test_time_with_any_zone():
    assert parse_time("2026-11-22T10:00:00+0000") == parse_time("2026-11-22T11:00:00.5+01:00") == 1795341600
    assert parse_time("2026-11-22T10:00:00.148235Z") == parse_time("2026-11-22T10:00:00") == 1795341600


# ---- settings and facts ----------------------------------------------------------------------------------------------


def test_only_settings_that_differ_are_shown(tmp_path, command):
    write_run(tmp_path / "one", [0.5], optimizer="sgd", augment=[])
    write_run(tmp_path / "two", [0.5], optimizer="adam", augment=["flip", "crop:4"], batch_size=32)
    _, output, _ = command("one", "two")
    shown = output.split("Settings that differ\n")[1].split("\n\n")[0].splitlines()
    assert [row.split() for row in shown[:3]] == [
        ["run", "augment", "batch_size", "optimizer"],
        ["one", "none", "None", "sgd"],
        ["two", "flip", "crop:4", "32", "adam"],
    ]
    assert shown[3] == "(5 settings are the same in all)"


def test_other_code_and_processes_are_shown(tmp_path, command):
    write_run(tmp_path / "one", [0.5])
    write_run(tmp_path / "two", [0.5], seed=1, starts=[start(commit="b" * 40 + "+changes", processes=4)])
    _, output, _ = command("one", "two")
    shown = output.split("Code, versions and machines that differ\n")[1].split("\n\n")[0].splitlines()
    rows = [row.split() for row in shown]
    assert rows == [["run", "commit", "processes"], ["one", "a" * 10, "1"], ["two", "b" * 10 + "+changes", "4"]]
    assert "all runs: its runs differ in commit" in plain(output)


# ---- groups and verdict ----------------------------------------------------------------------------------------------


def test_groups_of_seeds_have_mean_and_deviation(grid, numbers):
    fast, slow = numbers(*grid)["groups"]
    assert (fast["label"], fast["n"], slow["label"]) == ("learning_rate=0.1", 2, "learning_rate=0.001")
    assert (fast["mean"], fast["min"], fast["max"]) == (pytest.approx(0.85), 0.8, 0.9)
    assert fast["standard_deviation"] == pytest.approx(0.1 / math.sqrt(2))
    assert slow["mean"] == pytest.approx(0.6)


def test_names_and_other_harmless_settings_do_not_part_a_group(tmp_path, numbers):
    write_run(tmp_path / "one", [0.5], num_workers=0, log_every=50, checkpoint_every="1 epoch", slots=None)
    write_run(tmp_path / "two", [0.6], seed=1, num_workers=4, log_every=5, checkpoint_every="2 epochs", slots=8)
    (group,) = numbers("one", "two")["groups"]
    assert (group["label"], group["n"]) == ("all runs", 2)


def test_last_values_are_compared_where_a_step_is_not_the_same_number_of_samples(tmp_path, numbers):
    write_run(tmp_path / "small", [0.5, 0.8], batch_size=32)
    write_run(tmp_path / "large", [0.6], batch_size=64)
    content = numbers("small", "large")
    assert (content["equal_step"], content["compared_at_step"]) == (10, None)
    assert [each["label"] for each in content["groups"]] == ["batch_size=32", "batch_size=64"]
    assert content["differences"][0]["difference"] == pytest.approx(0.2)
    (warning,) = content["warnings"]
    assert warning == "batch_size differs between the runs: the last values are compared, whatever they took"


def test_longer_training_is_another_group_although_it_may_be_resumed(tmp_path, numbers):
    write_run(tmp_path / "one", [0.5], num_train_epochs=1)
    write_run(tmp_path / "two", [0.6], num_train_epochs=2)
    assert len(numbers("one", "two")["groups"]) == 2


def test_a_run_once_more_is_no_second_sample(tmp_path, numbers):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        write_run(tmp_path / name, [0.5], seed=seed)
    content = numbers("one", "again", "other")
    assert content["groups"][0]["runs"] == ["one", "other"]
    assert any("again: the run one once more" in warning for warning in content["warnings"])


def test_the_same_seed_with_other_code_is_another_run(tmp_path, numbers):
    write_run(tmp_path / "one", [0.5])
    write_run(tmp_path / "two", [0.6], starts=[start(commit="b" * 40)])
    assert numbers("one", "two")["groups"][0]["n"] == 2


def test_welch_interval_is_that_of_the_textbook():
    # Means 12 and 10, variances 4 and 1, three each: standard error sqrt(5/3), Welch's degrees of freedom
    # (5/3)^2 / ((4/3)^2/2 + (1/3)^2/2) = 2.94, for which the t table has 3.2195.
    low, high = welch_interval([10, 12, 14], [9, 10, 11])
    assert (low + high) / 2 == pytest.approx(2)
    assert (high - low) / 2 == pytest.approx(3.2195 * math.sqrt(5 / 3), rel=1e-3)
    assert welch_interval([9, 10, 11], [10, 12, 14]) == pytest.approx((low, high))
    assert welch_interval([1.0, 1.0], [2.0, 2.0]) is None
    assert welch_interval([1.0], [2.0, 3.0]) is None


def test_two_groups_whose_interval_includes_0(grid, command, numbers):
    (difference,) = numbers(*grid)["differences"]
    assert difference["difference"] == pytest.approx(0.25)
    low, high = difference["interval"]
    assert low < 0 < high and (low + high) / 2 == pytest.approx(0.25)
    output = plain(command(*grid)[1])
    assert "learning_rate=0.1 is better than learning_rate=0.001 by 0.25 in val/accuracy at step 20" in output
    assert "means of 2 and 2 runs, 95 % Welch interval" in output
    assert "includes 0: the choice of seeds may explain the difference" in output


def test_two_groups_whose_interval_excludes_0(tmp_path, command):
    for seed, (good, bad) in enumerate([(0.90, 0.50), (0.91, 0.51), (0.92, 0.52)]):
        write_run(tmp_path / f"good{seed}", [good], seed=seed, learning_rate=0.1)
        write_run(tmp_path / f"bad{seed}", [bad], seed=seed)
    output = plain(command(*(f"{name}{seed}" for name in ("good", "bad") for seed in range(3)))[1])
    assert "excludes 0: the choice of seeds hardly explains the difference" in output
    assert "comparisons at once" not in output


def test_the_better_group_of_a_loss_is_the_lower_one(tmp_path, numbers):
    for name, loss in (("good", 0.2), ("bad", 0.6)):
        write_run(tmp_path / name, [line(10, 1, train_loss=1.0, val_loss=loss)], model=name)
    (difference,) = numbers("bad", "good", "--metric", "val/loss")["differences"]
    assert (difference["better"], difference["worse"]) == ("model=good", "model=bad")
    assert difference["difference"] == pytest.approx(0.4) and difference["interval"] is None


def test_single_runs_say_nothing_about_chance(tmp_path, command):
    write_run(tmp_path / "one", [0.5], model="mlp")
    write_run(tmp_path / "two", [0.75], model="cnn")
    output = plain(command("one", "two")[1])
    assert "model=cnn is better than model=mlp by 0.25 in val/accuracy at step 10" in output
    assert "One run each says nothing about chance" in output


def test_several_groups_are_compared_with_the_best_and_cautioned(tmp_path, command, numbers):
    for name, value in (("a", 0.5), ("b", 0.9), ("c", 0.7)):
        write_run(tmp_path / name, [value], model=name)
    pairs = [(each["better"], each["worse"]) for each in numbers("a", "b", "c")["differences"]]
    assert pairs == [("model=b", "model=c"), ("model=b", "model=a")]
    assert "2 comparisons at once" in plain(command("a", "b", "c")[1])


@pytest.mark.parametrize(("fingerprint", "warned"), [("f" * 32, False), ("e" * 32, True), (None, True)])
def test_other_data_are_not_comparable(tmp_path, numbers, fingerprint, warned):
    write_run(tmp_path / "one", [0.5], dataset="/here/digits")
    write_run(tmp_path / "two", [0.5], dataset="/there/digits", fingerprint=fingerprint)
    assert any("not comparable" in warning for warning in numbers("one", "two")["warnings"]) == warned


@pytest.mark.parametrize("change", [{"best_metric": "val/joy"}, {"validation_data": "other.csv"}, {"ssim_weight": 0.5}])
def test_other_measures_are_not_comparable(tmp_path, numbers, change):
    lines = [line(10, 1, train_loss=1.0, val_loss=0.5)]
    write_run(tmp_path / "one", lines)
    write_run(tmp_path / "two", lines, **change)
    (warning,) = numbers("one", "two", "--metric", "val/loss")["warnings"]
    assert warning.startswith("not comparable") and next(iter(change)).split("_")[0] in warning


# ---- wrong input -----------------------------------------------------------------------------------------------------


def test_no_such_run(tmp_path, command):
    assert "runs/NAME" in refused(command, tmp_path / "nothing")
    (tmp_path / "runs").mkdir()
    assert "no such run" in refused(command, "runs/deeper/NAME")  # no question to W&B: the first folder is here


def test_folder_that_is_no_run(tmp_path, command):
    write_run(tmp_path / "runs" / "one", [0.5])
    assert "runs: is no run" in (error := refused(command, "runs")) and "holds the runs one" in error
    (tmp_path / "empty").mkdir()
    assert "empty: is no run" in refused(command, "empty")


def test_file_that_is_no_run(tmp_path, command):
    (tmp_path / "notes.txt").write_text("hello")
    assert "is a file" in refused(command, "notes.txt")


def test_damaged_run_json(tmp_path, command):
    (write_run(tmp_path / "one", [0.5]) / "run.json").write_text("{")
    assert "damaged" in refused(command, "one")


@pytest.mark.parametrize("lines", [[], [line(10, 1, train_loss=1.0)]])
def test_run_without_evaluation(tmp_path, command, lines):
    """It has just begun, and the others are compared."""
    write_run(tmp_path / "one", [0.5])
    path = write_run(tmp_path / "two", lines or [0.5])
    if not lines:
        (path / "metrics.jsonl").unlink()
    assert refused(command, "two") == "error: two: has no evaluation yet, nothing to compare"
    code, output, _ = command("one", "two")
    assert code == 0
    assert "two: has no evaluation yet" in output


def test_all_problems_are_said_at_once(tmp_path, command):
    code, _, errors = command("nothing", "neither")
    assert code == 2 and len(errors) == 2


def test_unknown_metric_names_those_there_are(tmp_path, command):
    write_run(tmp_path / "one", [0.5])
    assert refused(command, "one", "--metric", "val/f1") == "error: one: has no val/f1, but val/accuracy"


def test_different_best_metrics_need_a_choice(tmp_path, command):
    write_run(tmp_path / "one", [0.5])
    write_run(tmp_path / "two", [0.5], best_metric="val/loss")
    assert "choose with --metric" in refused(command, "one", "two")


def test_torn_metrics_are_used_up_to_there(tmp_path, numbers):
    path = write_run(tmp_path / "one", [0.5, 0.6])
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "val/accu')
    content = numbers("one")
    assert content["runs"][0]["last"] == {"step": 20, "value": 0.6}
    assert content["warnings"] == ["one: metrics.jsonl is torn after line 2; used up to there"]


def test_same_run_twice_counts_once(tmp_path, numbers):
    write_run(tmp_path / "one", [0.5])
    content = numbers("one", "one/", tmp_path / "one")
    assert len(content["runs"]) == 1
    assert any("counted once" in warning for warning in content["warnings"])


def test_a_copy_of_a_run_that_went_another_way_is_a_run(tmp_path, numbers):
    one, two = write_run(tmp_path / "one", [0.5]), write_run(tmp_path / "two", [0.6], learning_rate=0.1)
    (two / "run.json").write_text((one / "run.json").read_text())
    assert len(numbers("one", "two")["groups"]) == 2


def test_one_run_is_reported_and_there_is_nothing_to_compare(tmp_path, command):
    write_run(tmp_path / "one", [0.5])
    code, output, _ = command("one")
    assert code == 0 and output.startswith("one run, val/accuracy") and "Nothing to compare" in output


def test_nan_is_no_best_and_leaves_the_statistics(tmp_path, command, numbers):
    write_run(tmp_path / "one", [0.5, math.nan])
    write_run(tmp_path / "two", [0.6, 0.7], seed=1)
    content = numbers("one", "two")
    assert content["runs"][0]["best"] == {"step": 10, "value": 0.5} and content["runs"][0]["last"]["value"] is None
    assert content["groups"][0]["mean"] == 0.7 and content["groups"][0]["n"] == 1
    assert "one: 1 of 2 values of val/accuracy are NaN or infinite" in content["warnings"]
    assert numbers(write_run(tmp_path / "late", [math.nan, 0.3]))["runs"][0]["best"] == {"step": 20, "value": 0.3}
    write_run(tmp_path / "three", [math.nan], model="bad")
    code, output, _ = command("three", "one", "--png", "a.png", "--html", "a.html")
    assert code == 0 and "left out" in output


def test_runs_without_a_common_step(tmp_path, numbers):
    write_run(tmp_path / "one", [line(10, 1, train_loss=1.0, val_accuracy=0.5)])
    write_run(tmp_path / "two", [line(15, 1, train_loss=1.0, val_accuracy=0.7)], model="cnn")
    content = numbers("one", "two")
    assert content["equal_step"] is None and content["runs"][0]["at_equal_step"] is None
    assert content["differences"][0]["difference"] == pytest.approx(0.2)
    assert any("the last values are compared" in warning for warning in content["warnings"])


def test_file_that_cannot_be_written(tmp_path, command):
    write_run(tmp_path / "one", [0.5])
    code, output, errors = command("one", "--markdown", "nowhere/a.md", "--html", "no/a.html")
    assert code == 2 and output == "" and len(errors) == 2
    assert errors[0] == "error: nowhere/a.md: there is no folder nowhere"
    (tmp_path / "a.md").mkdir()
    code, _, (error,) = command("one", "--markdown", "a.md")
    assert code == 2 and error.startswith("error: a.md: cannot be written")


# ---- output ----------------------------------------------------------------------------------------------------------


def test_terminal_is_120_columns_and_loses_no_column(tmp_path, command):
    settings = {f"setting_number_{n}": n for n in range(12)}
    write_run(tmp_path / ("a_very_long_name_" * 6), [0.5], **settings)
    write_run(tmp_path / "two", [0.5], **{name: value + 100 for name, value in settings.items()})
    _, output, _ = command("a_very_long_name_" * 6, "two")
    assert max(map(len, output.splitlines())) <= 120
    for name, value in settings.items():
        assert name in output and str(value + 100) in output


def test_markdown_has_the_same_content_and_escapes_names(tmp_path, grid, command):
    write_run(tmp_path / "evil", [0.1, 0.2], model="<script>|x")
    assert command(*grid, "evil", "--markdown", "a.md")[0] == 0
    text = (tmp_path / "a.md").read_text()
    assert "<script>" not in text and "model=&lt;script&gt;\\|x" in text
    tables = [row for row in text.splitlines() if row.startswith("|")]
    assert sum(row.startswith("| slow0 |") for row in tables) == 2
    assert "| learning_rate=0.1, model=None | 2 | 0.85 | 0.070711 | 0.8 | 0.9 |" in tables
    assert "comparisons at once" in text and "8 settings" not in text and "settings are the same in all" in text


def test_control_characters_do_not_reach_the_terminal(tmp_path, command):
    write_run(tmp_path / "one", [0.5], model="\x1b[31mred\nline")
    write_run(tmp_path / "two", [0.5], model="cnn")
    _, output, _ = command("one", "two")
    assert "\x1b" not in output and "red line" in output


def test_page_is_one_file_that_escapes_what_comes_from_runs(tmp_path, grid, command):
    write_run(tmp_path / "<script>alert(1)<", [0.1, 0.2], model='"><img src=x onerror=alert(1)>')
    assert command(*grid, tmp_path / "<script>alert(1)<", "--html", "a.html")[0] == 0
    page = (tmp_path / "a.html").read_text()
    assert "<script" not in page and "<img src=x" not in page
    assert "&lt;script&gt;alert(1)&lt;" in page
    assert "http:" not in page and "https:" not in page and "url(" not in page
    assert page.count('src="data:image/png;base64,') == 2 and page.count("<details>") == 5


def test_picture_is_a_png_and_needs_no_display(tmp_path, grid, command, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    assert command(*grid, "--png", "a.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_curves_of_a_group_are_its_mean_in_a_band(tmp_path, grid):
    from matplotlib.figure import Figure

    from train.comparison.pictures import draw_panel
    from train.comparison.report import build_report
    from train.comparison.sources import read_runs

    report = build_report(*read_runs([str(path) for path in grid]), None, None)
    axes = Figure().subplots()
    draw_panel(axes, report.groups, "val/accuracy")
    fast, slow = axes.get_lines()
    assert [label.get_text() for label in axes.get_legend().get_texts()] == [
        "learning_rate=0.1 (mean of 2)", "learning_rate=0.001 (mean of 2)",
    ]  # fmt: skip
    assert list(fast.get_xdata()) == [10, 20]
    assert list(fast.get_ydata()) == pytest.approx([0.1, 0.85]) and list(slow.get_ydata()) == pytest.approx([0.1, 0.6])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.1, 0.85 + 0.1 / math.sqrt(2)))
