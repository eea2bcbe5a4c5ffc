"""Flags and recipes become one settings object; mistakes become one message and exit code 2."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from train.classify import ClassifySettings
from train.engine import cli
from train.engine.cli import parse_settings, settings_to_yaml
from train.engine.errors import TrainingError, UsageError
from train.engine.settings import Every, RunSettings, check_settings, parse_every
from train.reconstruct import ReconstructSettings
from train.stateful_lstm import StatefulSettings

RECIPES = Path(cli.__file__).parents[1] / "recipes"


def parse(*arguments):
    return parse_settings(ClassifySettings, [str(argument) for argument in arguments], "Test.")


def problems_of(*arguments):
    with pytest.raises(UsageError) as caught:
        parse(*arguments)
    return caught.value.problems


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refused(capsys, *arguments):
    """Return what is printed when the arguments end the program with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        parse(*arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    return " ".join((printed.out + printed.err).replace("│", " ").split())


def test_no_arguments_give_the_defaults():
    assert parse() == ClassifySettings()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--batch_size", 96, "--learning_rate", "3e-4"),
        ("--batch-size", 96, "--learning-rate", "3e-4"),
        ("--batch_size=96", "--learning-rate=3e-4"),
    ],
)
def test_flags_take_underscores_hyphens_and_equal_signs(arguments):
    assert parse(*arguments) == ClassifySettings(batch_size=96, learning_rate=3e-4)


def test_boolean_flags_switch_on_and_off(recipe):
    assert parse("--deterministic").deterministic is True
    path = recipe("deterministic: true")
    assert parse("--config", path, "--no_deterministic").deterministic is False
    assert parse("--config", path, "--no-deterministic").deterministic is False


def test_recipe_values_of_every_kind(recipe):
    path = recipe(
        """
        learning_rate: 3e-3      # text to YAML 1.1
        weight_decay: 1.0e-2
        batch_size: 96
        compile: true
        dry_run: false
        allow_changes: [seed, slots]
        max_train_steps: null
        slots:
        mixed_precision: "no"
        eval_every: 500
        dataset: some folder/with spaces
        """
    )
    assert parse("--config", path) == ClassifySettings(
        config=str(path),
        learning_rate=3e-3,
        weight_decay=1e-2,
        batch_size=96,
        compile=True,
        allow_changes=("seed", "slots"),
        mixed_precision="no",
        eval_every="500",
        dataset="some folder/with spaces",
    )


def test_recipe_read_as_text_by_yaml_is_a_number_all_the_same(recipe):
    path = recipe("learning_rate: 3e-3")
    assert yaml.safe_load(path.read_text()) == {"learning_rate": "3e-3"}  # else this test proves nothing
    assert parse("--config", path).learning_rate == parse(f"--config={path}").learning_rate == 0.003


def test_flags_win_over_the_recipe_before_and_after_it(recipe):
    path = recipe("seed: 5\nbatch_size: 32\nmax_train_steps: 7\nallow_changes: [seed]")
    settings = parse("--seed", 6, "--config", path, "--max_train_steps", "None", "--allow_changes", "slots")
    assert (settings.seed, settings.batch_size, settings.max_train_steps) == (6, 32, None)
    assert settings.allow_changes == ("slots",)


def test_unknown_recipe_keys_are_all_named_with_file_and_near_match(recipe):
    path = recipe("lerning_rate: 1\nbatch_size: 8\nbatch-size: 4\nzzzz: 5\n7: 8")
    problems = problems_of("--config", path)
    assert problems == [
        f"{path}: unknown key 'lerning_rate'; perhaps you meant 'learning_rate'",
        f"{path}: unknown key 'batch-size'; perhaps you meant 'batch_size'",
        f"{path}: unknown key 'zzzz'",
        f"{path}: unknown key 7",
    ]


@pytest.mark.parametrize("text", ["", "- seed\n- slots", "just words", "5"])
def test_recipe_must_be_a_mapping(recipe, text):
    path = recipe(text)
    assert problems_of("--config", path) == [f"--config {path}: must hold lines of the form 'name: value'"]


@pytest.mark.parametrize("text", ["seed: [1", "\tseed: 1", "seed: 1: 2", "a: !!python/object:os.system {}"])
def test_recipe_of_invalid_yaml_is_refused_with_its_name(recipe, text):
    path = recipe(text)
    (problem,) = problems_of("--config", path)
    assert problem.startswith(f"--config {path}: is not valid YAML: ")


def test_recipe_that_cannot_be_read_is_refused_with_its_name(tmp_path):
    missing = tmp_path / "missing.yaml"
    assert problems_of("--config", missing) == [f"--config {missing}: cannot be read (No such file or directory)"]
    assert problems_of("--config", tmp_path) == [f"--config {tmp_path}: cannot be read (Is a directory)"]
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"seed: \xff\xfe")
    (problem,) = problems_of("--config", binary)
    assert problem.startswith(f"--config {binary}: is not valid YAML")


@pytest.mark.parametrize(
    ("text", "named"),
    [("learning_rate: fast", "--learning_rate"), ("lr_scheduler: cosin", "--lr_scheduler")],
)
def test_malformed_recipe_value_names_key_and_file(recipe, capsys, text, named):
    path = recipe(text)
    printed = refused(capsys, "--config", path)
    assert named in printed
    assert path.name in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: null", "seed has no value"),
        ("allow_changes: null", "allow_changes has no value"),
        ("seed: 1\nseed: 2", "'seed' stands there twice"),
    ],
)
def test_recipe_without_a_value_or_with_two_is_refused(recipe, text, message):
    (problem,) = problems_of("--config", recipe(text))
    assert message in problem


def test_no_in_a_recipe_is_a_word_where_the_setting_is_one(recipe):
    settings = parse("--config", recipe("mixed_precision: no\nrun_name: -x"), "--run_name", "x")
    assert settings.mixed_precision == "no"


def test_seconds_are_no_interval():
    with pytest.raises(ValueError, match="no interval"):
        parse_every("10 s")


def test_consent_to_a_setting_that_does_not_exist_is_refused():
    (problem,) = problems_of("--allow_changes", "nonsense")
    assert "there is no nonsense" in problem


def test_unknown_flag_is_refused_with_the_nearest(capsys):
    printed = refused(capsys, "--batchsize", 4)
    assert "--batchsize" in printed
    assert "Perhaps you meant: --batch_size" in printed


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        ([], "quick"),
        (["--preflight"], "full"),
        (["--preflight", "--seed", "3"], "full"),
        (["--seed", "3", "--preflight"], "full"),
        (["--preflight", "lr"], "lr"),
        (["--preflight=off"], "off"),
        (["--preflight", "quick", "--seed", "3"], "quick"),
    ],
)
def test_preflight_alone_means_all_of_it(arguments, mode):
    assert parse(*arguments).preflight == mode


def test_preflight_of_another_word_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--preflight", "fast")
    assert caught.value.code == 2
    assert "quick" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--batch_size", "five"], "--batch_size"),
        (["--batch_size", "5.5"], "--batch_size"),
        (["--lr_scheduler", "cosin"], "'cosine'"),
        (["--config"], "--config"),
        (["stray"], "stray"),
    ],
)
def test_malformed_flags_are_refused(capsys, arguments, named):
    assert named in refused(capsys, *arguments)


OUT_OF_RANGE = {
    "log_every": 0,
    "keep_checkpoints": 0,
    "seed": -1,
    "run_name": "a/b",
    "num_train_epochs": 0,
    "batch_size": 0,
    "lr_step_size": 0,
    "max_train_steps": 0,
    "micro_batch_size": 0,
    "slots": 0,
    "warmup_steps": -1,
    "lr_patience": -1,
    "early_stopping_patience": -1,
    "num_workers": -1,
    "weight_decay": float("nan"),
    "max_grad_norm": float("inf"),
    "early_stopping_min_delta": -0.1,
    "learning_rate": 0.0,
    "lr_gamma": 1.5,
    "ema_decay": 1.0,
    "checkpoint_every": "1 hour",
    "eval_every": "10 minutes",
}


def test_values_out_of_range_are_all_reported_at_once():
    arguments = [part for name, value in OUT_OF_RANGE.items() for part in (f"--{name}", value)]
    problems = problems_of(*arguments)
    assert sorted(problem.split()[0].strip("-:") for problem in problems) == sorted(OUT_OF_RANGE)
    assert "--batch_size 0: must be 1 or more" in problems
    assert "--learning_rate 0.0: must be above 0 and finite" in problems


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_each_value_out_of_range_is_reported_alone(name):
    (problem,) = check_settings(ClassifySettings(**{name: OUT_OF_RANGE[name]}))
    assert problem.startswith(f"--{name}")


def test_values_at_the_border_are_accepted():
    ones = dict.fromkeys(("log_every", "keep_checkpoints", "num_train_epochs", "batch_size", "lr_step_size"), 1)
    ones |= dict.fromkeys(("max_train_steps", "micro_batch_size", "slots"), 1)
    zeros = dict.fromkeys(("seed", "warmup_steps", "lr_patience", "early_stopping_patience", "num_workers"), 0)
    zeros |= dict.fromkeys(("weight_decay", "max_grad_norm", "early_stopping_min_delta", "ema_decay"), 0.0)
    settings = ClassifySettings(**ones, **zeros, lr_gamma=1.0, run_name="_a.b+c=d-1", checkpoint_every="0.5 min")
    assert check_settings(settings) == []


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-x", "a/b", "a b", "a\nb", "ü"])
def test_run_names_that_are_no_plain_folder_are_refused(name):
    assert len(check_settings(RunSettings(run_name=name))) == 1


def test_settings_written_as_a_recipe_are_read_back_the_same(recipe):
    changed = ClassifySettings(
        run_name="007",
        allow_changes=("seed", "slots"),
        deterministic=True,
        mixed_precision="no",
        tracker=("none",),
        checkpoint_every="500",
        learning_rate=1e-05,
        weight_decay=1e22,
        max_train_steps=10,
        best_mode="min",
        validation_split="val",
        seed=2**32 - 1,
    )
    for settings in (ClassifySettings(), changed):
        path = recipe(settings_to_yaml(settings))
        assert parse("--config", path) == dataclasses.replace(settings, config=str(path))
        assert settings_to_yaml(parse("--config", path)) == path.read_text()  # where a recipe lies is no part of it


@pytest.mark.parametrize(
    "text",
    ["no", "yes", "~", "null", "1e3", "0x10", "007", "2024-01-01", "12:30", "a: b", "# c", "[1]", "a b", "é", ""],
)
def test_text_that_yaml_would_change_survives_a_round_trip(recipe, text):
    path = recipe(settings_to_yaml(ClassifySettings(label_column=text)))
    assert parse("--config", path).label_column == text


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_that_come_with_the_scripts_are_accepted(path):
    script = re.search(r"train/(\w+)\.py", path.read_text())[1]  # the first line of each says what it is for
    kinds = {"classify": ClassifySettings, "reconstruct": ReconstructSettings, "stateful_lstm": StatefulSettings}
    kind = kinds[script]
    assert parse_settings(kind, ["--config", str(path)], "Test.") != kind(config=str(path))


@pytest.mark.parametrize("kind", ["classify.ClassifySettings", "stateful_lstm.StatefulSettings"])
def test_help_and_import_of_the_script_leave_torch_alone(kind):
    code = f"""
import json, sys
import train.classify, train.stateful_lstm
from train.engine.cli import parse_settings
try:
    parse_settings(train.{kind}, ["--help"], "About this script.")
except SystemExit as end:
    print(json.dumps([end.code, sorted({{"torch", "numpy", "datasets", "accelerate"}} & set(sys.modules))]))
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "About this script." in printed and "--num_train_epochs" in printed
    assert json.loads(printed.splitlines()[-1]) == [0, []]


@pytest.mark.parametrize(
    ("text", "every"),
    [
        ("500", Every(500, "steps")),
        (" 1 step ", Every(1, "steps")),
        ("20 steps", Every(20, "steps")),
        ("2.0", Every(2, "steps")),
        ("1 epoch", Every(1, "epochs")),
        ("2epochs", Every(2, "epochs")),
        ("3 ep", Every(3, "epochs")),
        ("10 minutes", Every(10, "minutes")),
        ("1 minute", Every(1, "minutes")),
        ("0.5 min", Every(0.5, "minutes")),
    ],
)
def test_intervals_that_are_accepted(text, every):
    assert parse_every(text) == every


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "0 epochs",
        "-5",
        "+5",
        "1.5",
        "0.5 epochs",
        "epoch",
        "1 hour",
        "5 x",
        "1e3",
        "1 2",
        "1,000",
        "nan",
        "inf",
    ],
)
def test_intervals_that_are_refused_say_what_is_accepted(text):
    with pytest.raises(ValueError, match="is no interval; write '500'") as caught:
        parse_every(text)
    assert repr(text) in str(caught.value) and "minutes" in str(caught.value)


def test_minutes_are_refused_where_steps_are_needed():
    with pytest.raises(ValueError, match="is no interval") as caught:
        parse_every("10 minutes", minutes=False)
    assert "or '10 minutes'" not in str(caught.value)


def test_intervals_in_steps():
    assert Every(500, "steps").in_steps(30) == 500
    assert Every(2, "epochs").in_steps(30) == 60
    assert Every(2, "minutes").in_steps(30) is None


@pytest.mark.parametrize(
    ("outcome", "code", "printed"),
    [
        (0, 0, ""),
        (75, 75, ""),
        (UsageError(["first", "second"]), 2, "error: first\nerror: second\n"),
        (TrainingError("lost"), 1, "error: lost\n"),
    ],
)
def test_outcomes_become_exit_codes_and_messages(monkeypatch, capsys, outcome, code, printed):
    def main(settings):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit) as caught:
        cli.run_script(main, ClassifySettings, "Test.")
    assert caught.value.code == code
    assert capsys.readouterr().err == printed


def test_an_unforeseen_error_shows_where_it_happened(monkeypatch, capsys):
    def main(settings):
        raise KeyError("surprise")

    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit) as caught:
        cli.run_script(main, ClassifySettings, "Test.")
    assert caught.value.code == 1
    assert "Traceback" in (printed := capsys.readouterr().err) and "surprise" in printed


def test_exit_codes_left_for_the_launcher_are_of_the_latest_attempt(tmp_path, monkeypatch):
    monkeypatch.setenv("EXACT_TRAINING_EXIT_CODES", str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    seen = []
    for code in (75, 2, 3, 1, 0):
        seen.append((cli._hand_over(code), (tmp_path / "1").read_text()))
    assert seen == [(0, "75"), (0, "2"), (0, "3"), (1, "1"), (0, "0")]
