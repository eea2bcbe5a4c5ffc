"""Command line and recipe to one frozen settings object; errors to one message and an exit code."""

from __future__ import annotations

import dataclasses
import difflib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from train.engine.errors import (
    EXIT_DONE,
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_PREFLIGHT,
    EXIT_STOPPED,
    EXIT_USAGE,
    LostProcessError,
    TrainingError,
    UsageError,
    is_of_exchange,
    is_out_of_memory,
    see,
)
from train.engine.settings import RunSettings, check_settings
from train.engine.signals import StoppedEarlyError, hear_of_launcher_death, leave_on_signals
from train.engine.verify import verify_resume
from train.engine.wandb_service import limit_exit

OTHERS_WAIT_SECONDS = 3

Settings = TypeVar("Settings", bound=RunSettings)


def parse_settings(kind: type[Settings], arguments: Sequence[str], description: str) -> Settings:
    """Read the recipe named by --config, then the flags, which win.

    Raises:
        UsageError: unknown recipe key, unreadable recipe, or values out of range; nothing was written.
        SystemExit: with code 2 for an unknown flag or a malformed value, 0 for --help.
    """
    arguments = _spell_out(arguments)
    recipe = _recipe_path(arguments)
    default = kind() if recipe is None else _read_recipe(kind, recipe)
    settings = tyro.cli(kind, args=list(arguments), default=default, description=description, use_underscores=True)
    problems = check_settings(settings)
    if problems:
        raise UsageError(problems)
    return settings


def _spell_out(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with --preflight alone, at the end or before another flag, as --preflight full."""
    followers = [*arguments[1:], "--"]
    return [
        "--preflight=full" if argument == "--preflight" and following.startswith("--") else argument
        for argument, following in zip(arguments, followers)
    ]


def _recipe_path(arguments: Sequence[str]) -> str | None:
    path = None
    for position, argument in enumerate(arguments):
        if argument == "--config" and position + 1 < len(arguments):
            path = arguments[position + 1]
        elif argument.startswith("--config="):
            path = argument.removeprefix("--config=")
    return path


def _read_recipe(kind: type[Settings], path: str) -> Settings:
    try:
        text = Path(path).read_text(encoding="utf-8")
        values, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: must hold lines of the form 'name: value'")
    assert isinstance(node, yaml.MappingNode)
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    keys = [key.value for key, _ in node.value]
    problems = [f"{path}: {key!r} stands there twice" for key in sorted({key for key in keys if keys.count(key) > 1})]
    for key, value in values.items():
        if key not in types:
            close = difflib.get_close_matches(str(key), types, n=1)
            problems.append(f"{path}: unknown key {key!r}" + (f"; perhaps you meant {close[0]!r}" if close else ""))
        elif value is None and "None" not in types[key]:
            problems.append(f"{path}: {key} has no value; give one or remove the line")
    if problems:
        raise UsageError(problems)
    # The values pass through the parser of the flags: YAML 1.1 reads 1e-3 as text, and there is one set of rules.
    flags = [flag for key, value in values.items() for flag in _as_flags(key, value, types[key])]
    try:
        return tyro.cli(kind, args=flags, prog=Path(sys.argv[0]).name, use_underscores=True)
    except SystemExit:
        print(f"error: --config {path}: the value above is in this file", file=sys.stderr)
        raise


def _as_flags(key: str, value: Any, kind: str) -> list[str]:
    if isinstance(value, bool):
        if kind == "bool":
            return [f"--{key}" if value else f"--no-{key}"]
        value = "yes" if value else "no"  # YAML 1.1 reads no as False, and there are settings that can be "no"
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={value}"]


def settings_to_yaml(settings: RunSettings) -> str:
    """Return the resolved settings as a recipe that `--config` accepts."""
    values = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(settings).items()
        if key != "config"
    }
    return yaml.safe_dump(values, sort_keys=False)


def run_script(
    main: Callable[[Settings], int], kind: type[Settings], description: str, bad_input: type[Exception] = UsageError
) -> None:
    """Parse the command line, run `main`, and leave with its exit code, as `leave_with` says."""

    def work() -> int:
        settings = parse_settings(kind, sys.argv[1:], description)
        return verify_resume(settings, sys.argv[0]) if settings.verify_resume else main(settings)

    leave_with(work, bad_input)


def leave_with(work: Callable[[], int], bad_input: type[Exception] = UsageError) -> None:
    """Run `work`, and leave with its exit code.

    A UsageError, or the script's own `bad_input`, becomes one message and exit code 2; a TrainingError one message and
    exit code 1.
    """
    leave_on_signals()
    hear_of_launcher_death()
    try:
        code = work()
    except UsageError as error:
        code = EXIT_USAGE
        _print_error("\n".join(f"error: {problem}" for problem in error.problems))
    except bad_input as error:
        code = EXIT_USAGE
        _print_error(f"error: {error}")
    except LostProcessError as error:
        code = EXIT_ERROR
        print(f"error: {error}", file=sys.stderr, flush=True)
    except TrainingError as error:
        code = EXIT_ERROR
        _print_error(f"error: {error}")
    except SystemExit as error:  # of the parser
        code = error.code if isinstance(error.code, int) else EXIT_ERROR
    except StoppedEarlyError as error:
        code = EXIT_STOPPED
        _print_error(f"stopped by {error} outside training: there was nothing to save; run the same command again")
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        _print_error("interrupted: nothing was saved at this point; checkpoints already there are intact")
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        code = EXIT_ERROR
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        code = EXIT_ERROR
        if is_of_exchange(error):  # before training; the process that left has said why
            print(
                f"error: rank {os.environ.get('RANK')} on {socket.gethostname()} waits for other processes in vain: "
                f"see what they printed, or {see('a-process-hangs-or-is-lost')} ({str(error).split('. ')[0]})",
                file=sys.stderr,
                flush=True,
            )
        else:  # a defect: not swallowed but shown whole, so that every way out passes through sys.exit below
            traceback.print_exc()
            if is_out_of_memory(error):
                print(f"error: there is not enough memory; {see('out-of-memory')}", file=sys.stderr, flush=True)
    code = _hand_over(code)
    limit_exit(code)
    sys.exit(code)


def _hand_over(code: int) -> int:
    """Leave the exit code where launch/start.py looks for it, and return what its torchrun should see.

    torchrun takes every code but 0 for a crash: it would end or restart the workers that still save. Every code is
    written, so that none of an attempt before stays.
    """
    folder = os.environ.get("EXACT_TRAINING_EXIT_CODES")
    if folder is None:
        return code
    Path(folder, os.environ.get("RANK", "0")).write_text(str(code), encoding="utf-8")
    return EXIT_DONE if code in (EXIT_USAGE, EXIT_PREFLIGHT, EXIT_STOPPED) else code


def _print_error(text: str) -> None:
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # the others found the same, but a machine alone may lack a file
        print(text, file=sys.stderr, flush=True)
    if int(os.environ.get("RANK", "0")) == 0:
        return
    met = getattr(sys.modules.get("torch.distributed"), "is_initialized", bool)  # bool() is False
    if not met():
        # They have not met yet, and torchrun ends all when one has left: rank 0, which says why, is to be the first.
        time.sleep(OTHERS_WAIT_SECONDS)
