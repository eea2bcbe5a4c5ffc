"""What W&B and TensorBoard get, row by row, from runs that are killed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from launch.wandb_file import read_records
from tests.cluster import network
from tests.process.fleet import Fleet
from tests.process.tracked import SETTINGS, assert_same_rows
from tests.wandb_server import WandbServer
from train.engine.cli import parse_settings, settings_to_yaml
from train.engine.errors import UsageError
from train.engine.settings import RunSettings

# ---- what arrives ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_run_with_exact_rows_over_three_starts_with_a_kill(tracked, server):
    """The first start is stopped by its length, the second killed between two checkpoints, the third ends."""
    online = server.environment()
    tracked.run(online, "--max_train_steps", 6)
    assert_same_rows(server, tracked)
    tracked.start(online, "--max_train_steps", 14, faults=[("die_after", 11)]).wait()
    tracked.run(online, "--max_train_steps", 14)
    steps = [start["step"] for start in tracked.identity()["starts"]]
    assert steps in ([0, 6, 8], [0, 6, 6])  # the checkpoint of step 8 is written beside the steps after it
    assert_same_rows(server, tracked)
    row = server.only_run().history[-1]
    for name in ("train/grad_norm", "train/learning_rate", "perf/samples_per_second", "perf/memory_mb", "val/loss"):
        assert name in row, name
    assert server.only_run().settings()["start"]["step"] == steps[-1]
    assert set(tracked.identity()["result"]) >= {"test/loss"} <= set(server.only_run().summary)


def test_rows_that_a_killed_start_never_sent_are_sent_by_the_next(tracked, server):
    """The first start finds no service and is killed with its files; the second sends everything from metrics.jsonl."""
    offline = server.environment(WANDB_MODE="offline")
    tracked.start(offline, "--max_train_steps", 14, faults=[("die_after", 7)]).wait()
    for file in tracked.path.glob("wandb/*run-*/*.wandb"):
        os.truncate(file, 7)
    tracked.run(server.environment(), "--max_train_steps", 9)
    assert_same_rows(server, tracked)


def test_what_describes_a_run_arrives(tracked, server):
    mine = {"WANDB_RUN_GROUP": "my group", "WANDB_TAGS": "one,two", "WANDB_JOB_TYPE": "sweep", "WANDB_NAME": "my name"}
    mine |= {
        "WANDB_ENTITY": "team",
        "WANDB_PROJECT": "my project",
        "SLURM_JOB_ID": "4711",
        "SLURM_ARRAY_JOB_ID": "4700",
    }
    tracked.run(server.environment(**mine), "--max_train_steps", 2, "--learning_rate", 0.002)
    run = server.only_run()
    assert (run.entity, run.project, run.tags) == ("team", "my project", ["one", "two"])
    assert {name: run.fields[name] for name in ("groupName", "jobType", "displayName")} == {
        "groupName": "my group",
        "jobType": "sweep",
        "displayName": "my name",
    }
    settings, (start,) = run.settings(), tracked.identity()["starts"]
    assert (settings["learning_rate"], settings["model"]) == (0.002, "mlp")
    assert settings["start"]["scheduler"] == {"SLURM_JOB_ID": "4711", "SLURM_ARRAY_JOB_ID": "4700"}
    assert settings["start"]["commit"] == start["commit"]
    if start["commit"] is not None:
        assert start["commit"].startswith(run.fields["commit"])


def test_defaults_and_pictures_arrive(tracked, server):
    tracked.run(server.environment(SLURM_ARRAY_JOB_ID="4700"), "--max_train_steps", 2, pictures=True)
    run = server.only_run()
    assert [run.fields[name] for name in ("groupName", "jobType", "displayName")] == ["4700", "classify", "run"]
    assert run.project == "exact-training"
    for picture in (run.history[0]["first_batch"], run.summary["curves"], run.summary["confusion_matrix"]):
        assert run.uploads[picture["path"]][:4] == b"\x89PNG"


def test_pictures_of_the_other_scripts_arrive(tracked, server, tmp_path):
    """Reconstructions with the row of their step, the answers of a stateful model at the end."""
    common = ["--tracker", "wandb", "--output_dir", tmp_path]
    reconstruct = ["--run_name", "images", "--preflight", "off", "--max_train_steps", 2, "--batch_size", 8]
    stateful = ["--run_name", "answers", "--max_train_steps", 2, "--window", 50, "--engine", "eager"]
    for script, arguments in (("reconstruct", reconstruct), ("stateful_lstm", stateful)):
        environment = server.environment(HOME=str(tracked.home))
        finished = Fleet(
            tmp_path / "output", script, [*common, *arguments], environment=environment, pictures=True
        ).wait()
        assert finished.code == 0, finished.output
    runs = {run.fields["displayName"]: run for run in server.runs.values()}
    assert runs["images"].fields["jobType"] == "reconstruct"
    assert runs["images"].history[-1]["_step"] == 2
    for run, picture in (
        (runs["images"], runs["images"].history[-1]["reconstructions"]),
        (runs["answers"], runs["answers"].summary["answers"]),
    ):
        assert run.uploads[picture["path"]][:4] == b"\x89PNG"


@pytest.mark.slow
def test_checkpoints_become_artifacts_without_a_copy(tracked):
    """Offline; W&B's file names the checkpoints where they lie, and the home directory stays small."""
    tracked.run({"WANDB_MODE": "offline"}, "--max_train_steps", 8, "--wandb_artifact")
    (file,) = tracked.path.glob("wandb/offline-run-*/*.wandb")
    records = [Record.FromString(content) for content in read_records(file)]
    artifacts = [record.request.log_artifact.artifact for record in records if record.request.HasField("log_artifact")]
    artifacts += [record.artifact for record in records if record.HasField("artifact")]
    assert {alias for artifact in artifacts for alias in artifact.aliases} >= {"best", "final"}
    for artifact in artifacts:
        (weights,) = [entry for entry in artifact.manifest.contents if entry.path == "model.safetensors"]
        assert weights.local_path.startswith(str(tracked.path / "checkpoints" / "step_"))
    copies = [path for path in [*tracked.home.rglob("*"), *(tracked.path / "wandb").rglob("*")] if path.is_file()]
    assert not [path for path in copies if path.stat().st_size == Path(weights.local_path).stat().st_size]


@pytest.mark.slow
def test_no_other_host_is_contacted(tracked):
    """In a network that leads nowhere, but would count what is sent there."""
    reason = network.missing_reason()
    if reason is not None:
        pytest.skip(reason)
    script = """
        sysctl -qw net.ipv6.conf.default.disable_ipv6=1 && ip link set lo up &&
        ip link add out type veth peer name far && ip address add 10.9.9.1/24 dev out &&
        ip link set far up && ip link set out up && ip route add default dev out &&
        mount -t sysfs sysfs /sys && mount --bind "$1" /etc/resolv.conf && shift && "$@"
        echo sent $(cat /sys/class/net/out/statistics/tx_packets)
        python3 -c 'import socket; socket.getaddrinfo("example.org", 443)' 2> /dev/null
        echo sent then $(cat /sys/class/net/out/statistics/tx_packets)
    """
    names = tracked.folder / "resolv.conf"
    names.write_text("nameserver 10.9.9.9\n")
    command = ["unshare", "--net", "--mount", "sh", "-c", script, "sh", names, sys.executable, "-m", __name__]
    hidden = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    finished = subprocess.run(
        [*command, tracked.folder],
        cwd=Path(__file__).parents[2],
        env={**hidden, "HOME": str(tracked.home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert "steps [1, 2, 3, 4]" in finished.stdout, finished.stdout
    assert "sent 0\n" in finished.stdout and "sent then" in finished.stdout, finished.stdout
    assert "sent then 0\n" not in finished.stdout, finished.stdout


def _train_beside_server(folder):
    """Train with a server in the same network, and print what it got."""
    server = WandbServer()
    arguments = ["--output_dir", folder, "--run_name", "run", "--max_train_steps", 4, *SETTINGS]
    finished = Fleet(Path(folder), "classify", arguments, environment=server.environment()).wait()
    print(finished.output, "steps", server.only_run().steps)


# ---- TensorBoard, and several at once --------------------------------------------------------------------------------


def test_tensorboard_shows_each_step_once_after_a_kill(tracked, server):
    """Beside W&B; the killed start wrote steps that the next one repeats."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    both = {"tracker": ("wandb", "tensorboard")}
    tracked.start(server.environment(), "--max_train_steps", 10, faults=[("die_after", 7)], **both).wait()
    tracked.run(server.environment(), "--max_train_steps", 10, **both)
    shown = EventAccumulator(str(tracked.path / "tensorboard"))
    shown.Reload()
    points = shown.Scalars("train/loss")
    assert [point.step for point in points] == list(range(1, 11))
    losses = [row["train/loss"] for row in tracked.rows().values()]
    assert [point.value for point in points] == pytest.approx(losses)
    assert shown.Scalars("test/loss")[0].step == 10
    assert_same_rows(server, tracked)


def test_missing_tensorboard_is_refused_before_anything_is_written(tracked):
    fleet = tracked.start({}, tracker=("tensorboard",), faults=[("hide_package", "tensorboard")])
    finished = fleet.wait()
    assert finished.code == 2, finished.output
    assert "error: --tracker" in finished.output and "pip install tensorboard" in finished.output
    assert not tracked.path.exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [("none", ("none",)), ("wandb", ("wandb",)), ("[wandb, tensorboard]", ("wandb", "tensorboard"))],
)
def test_recipes_name_one_tracker_or_several(tmp_path, monkeypatch, line, expected):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # as if all packages were there
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"tracker: {line}\n")
    settings = parse_settings(RunSettings, ["--config", str(recipe)], "")
    assert settings.tracker == expected
    recipe.write_text(settings_to_yaml(settings))
    assert parse_settings(RunSettings, ["--config", str(recipe)], "") == settings


def test_none_stands_alone():
    with pytest.raises(UsageError, match="none alone"):
        parse_settings(RunSettings, ["--tracker", "none", "wandb"], "")


if __name__ == "__main__":
    _train_beside_server(sys.argv[1])
