"""launch/wandb_sync.py against a server: every row arrives once, whatever was there before."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.wandb_file import HEADER, read_fragment, read_records, write_records
from launch.wandb_sync import find_files
from tests.process.tracked import Tracked, assert_same_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two_starts(tmp_path_factory):
    """The folder of a finished run of two starts without the service, with the steps 1 to 6 and 7 to 9."""
    tracked = Tracked(tmp_path_factory.mktemp("two_starts"))
    for steps in (6, 9):
        tracked.run({"WANDB_MODE": "offline"}, "--max_train_steps", steps)
    return tracked.path


@pytest.fixture
def offline(tracked, two_starts):
    """A copy of that run."""
    shutil.copytree(two_starts, tracked.path, symlinks=True)
    return tracked


def start(tracked, environment, *folders, **constants):
    """Start the script, with other values of some of its constants."""
    script = f"import sys, launch.wandb_sync as script; vars(script).update({constants}); "
    script += "sys.exit(script.main(sys.argv[1:]))"
    command = ["-c", script] if constants else [str(ROOT / "launch" / "wandb_sync.py")]
    hidden = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return subprocess.Popen(
        [sys.executable, *command, *map(str, folders)],
        cwd=tracked.home,
        env={**hidden, "PYTHONPATH": str(ROOT), "HOME": str(tracked.home), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs do not hear it
    )


def sync(tracked, environment, *folders, **constants):
    """Run the script to its end; return its exit code and output."""
    process = start(tracked, environment, *folders, **constants)
    output, _ = process.communicate(timeout=300)
    assert "Traceback" not in output, output
    assert not (tracked.home / "wandb").exists()  # nothing is left where it was started
    return process.returncode, output


@pytest.mark.slow
def test_three_starts_and_a_torn_file(tracked, server):
    """A file without a row, of a start that was killed at once; with it, wandb sync would upload nothing.

    Whether the second start leaves its rows behind depends on when W&B's own process hears of its end.
    """
    offline, online = server.environment(WANDB_MODE="offline"), server.environment()
    every_second = ["--log_every", 2]
    tracked.run(offline, "--max_train_steps", 6, *every_second)
    tracked.start(offline, "--max_train_steps", 14, *every_second, faults=[("die_after", 11)]).wait()
    torn = tracked.path / "wandb" / "offline-run-20200101_000000-aaaaaaaa" / "run-aaaaaaaa.wandb"
    torn.parent.mkdir()
    torn.write_bytes(HEADER)
    tracked.run(offline, "--max_train_steps", 14, *every_second, pictures=True)
    fragments = map(read_fragment, find_files([tracked.path]))
    steps = [step for fragment in fragments if fragment is not None for step in fragment.steps]
    assert steps == [2, 4, 6, 8, 10, 12, 14]  # no step twice: `wandb sync` would do, too
    code, output = sync(tracked, online, tracked.folder)
    assert code == 0, output
    assert output.count("verified") >= 2 and "failed" not in output, output
    assert "skipped: torn, nothing whole in its 7 bytes" in output
    assert_same_rows(server, tracked)
    run = server.only_run()
    assert run.steps == [2, 4, 6, 8, 10, 12, 14]
    assert "test/loss" in run.summary and "curves" in run.summary and "start" in run.settings()
    assert run.uploads[run.summary["curves"]["path"]][:4] == b"\x89PNG"
    code, output = sync(tracked, online, tracked.path)
    assert code == 0 and output.count("was there") >= 2 and "verified" not in output, output
    assert_same_rows(server, tracked)


@pytest.mark.slow
def test_interrupted_upload_is_completed(offline, server):
    """W&B got the first rows of a fragment; uploaded again as a whole, the others would be shifted."""
    code, output = sync(offline, server.environment(), offline.path)
    assert code == 0, output
    run = server.only_run()
    run.rows = {place: row for place, row in run.rows.items() if row["_step"] <= 4}
    run.summary["_step"] = 4
    for mark in offline.path.glob("wandb/*/*.synced"):
        mark.unlink()
    code, output = sync(offline, server.environment(), offline.path)
    assert code == 0 and "uploaded 2 of 6 rows" in output, output
    assert_same_rows(server, offline)


@pytest.mark.slow
def test_start_without_the_service_after_one_that_lost_it(tracked, server):
    """The files of an online start hold what W&B did not take, and the offline start goes on behind them."""
    server.die_after, server.die_of = 0, "error"
    shorter = ("set_attribute", "train.engine.wandb_tracker", "FINISH_TIMEOUT_SECONDS", 5)
    tracked.run(server.environment(), "--max_train_steps", 6, faults=[shorter])
    tracked.run(server.environment(WANDB_MODE="offline"), "--max_train_steps", 9)
    assert server.only_run().steps == []
    server.fault = None
    code, output = sync(tracked, server.environment(), tracked.path)
    assert code == 0, output
    assert_same_rows(server, tracked)


@pytest.mark.slow
def test_failure_has_exit_code_1_and_is_named(offline, server):
    with open(offline.path / "run.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, output = sync(offline, server.environment(), offline.path)
    assert code == 1 and "failed: the run goes on" in output, output
    assert server.runs == {}
    server.fault = "key"
    code, output = sync(offline, server.environment(), offline.path)
    assert code == 1 and "error: W&B does not answer, or refuses the key" in output, output


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["rows", "lost"])
def test_rows_that_are_not_taken_are_noticed(offline, server, fault):
    """W&B's own command tries for hours, or ends with exit code 0; a start after the one that failed waits."""
    server.fault = fault
    seconds = {"rows": 8, "lost": 90}[fault]
    code, output = sync(offline, server.environment(), offline.path, UPLOAD_SECONDS=seconds, ARRIVAL_SECONDS=1)
    assert code == 1 and "failed: not tried" in output, output
    assert {"rows": "failed: took more than 8 s", "lost": "failed: step 6 did not arrive"}[fault] in output, output


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1])
def test_rows_that_no_file_has_come_from_metrics(offline, server, place):
    """A kill of the whole machine leaves less in W&B's file; asked for the second start alone, both are sent."""
    files = find_files([offline.path])
    records = list(read_records(files[place]))
    while len(read_fragment(files[place]).steps) > 1:
        records.pop()
        write_records(files[place], records)
    code, output = sync(offline, server.environment(), files[1].parent)
    assert code == 0, output
    assert f"uploaded 1 of 1 rows and {[5, 2][place]} of metrics.jsonl" in output, output
    assert output.count("verified") == 2 and "7 to 9 " in output, output
    assert_same_rows(server, offline)
    if place == 0:
        run = server.only_run()
        run.rows = {where: row for where, row in run.rows.items() if row["_step"] != 3}
        code, output = sync(offline, server.environment(), offline.path, ARRIVAL_SECONDS=1)
        assert code == 1 and "failed: W&B has 8 of 9 rows, and takes none before its last" in output, output


@pytest.mark.slow
@pytest.mark.parametrize("end", ["service", "person"])
def test_upload_that_ends_early_says_so(offline, server, end):
    """The service goes away, or somebody presses Ctrl-C, while W&B's own upload tries again and again."""
    server.fault = "rows"
    process = start(offline, server.environment(), offline.path, LOOK_SECONDS=1)
    while not any("file_stream" in request for request in server.requests):
        assert process.poll() is None
        time.sleep(0.1)
    if end == "service":
        server.fault = "gone"
        server.close()
    else:
        process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert "Traceback" not in output, output
    assert process.returncode == {"service": 1, "person": 130}[end], output
    assert {"service": "stopped: repeat this when", "person": "interrupted: repeat this"}[end] in output, output


def test_bad_usage_has_exit_code_2(tracked, server):
    code, output = sync(tracked, server.environment(), tracked.folder / "nowhere")
    assert code == 2 and "nowhere: there is no such folder" in output, output
    code, output = sync(tracked, server.environment(), tracked.folder)
    assert code == 2 and "there are no W&B runs below" in output, output
    torn = tracked.path / "wandb" / "offline-run-20200101_000000-aaaaaaaa" / "run-aaaaaaaa.wandb"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(HEADER)
    code, output = sync(tracked, {"WANDB_BASE_URL": server.url}, tracked.folder)
    assert code == 2 and "there is no key" in output, output
    assert server.requests == []


def test_records_of_all_lengths_are_read_as_written(tmp_path):
    """Blocks end anywhere: in a record, between two, and with less room than a chunk's header takes."""
    block = 32 * 1024
    for length in [0, 1, 5000, *range(block - 30, block + 5), 3 * block]:
        records = [bytes([1]) * length, b"", bytes([2]) * 70000, b"end"]
        write_records(tmp_path / "file", records)
        assert list(read_records(tmp_path / "file")) == records, length


def test_torn_file_is_read_up_to_the_tear(tmp_path):
    write_records(tmp_path / "file", [b"one", b"two" * 50000, b"three"])
    content = (tmp_path / "file").read_bytes()
    for length in range(0, len(content), 997):
        (tmp_path / "torn").write_bytes(content[:length])
        assert list(read_records(tmp_path / "torn")) == [b"one", b"two" * 50000][: (length > 16) + (length > 150100)]


def test_files_are_found_below_a_run_a_folder_of_runs_and_their_own_folder_in_the_order_of_the_starts(tmp_path):
    """A copy that followed links has latest-run as a folder: not a start of its own."""
    wandb = tmp_path / "run" / "wandb"
    starts = [
        "run-20260102_000000-id",
        "offline-run-20260103_000000-id",
        "latest-run",
        "offline-run-20260101_000000-id",
    ]
    for name in starts:
        (wandb / name).mkdir(parents=True)
        (wandb / name / "run-id.wandb").write_bytes(HEADER)
    expected = [wandb / starts[place] / "run-id.wandb" for place in (3, 0, 1)]
    assert (
        find_files([tmp_path]) == find_files([tmp_path / "run", wandb]) == find_files([wandb / starts[0]]) == expected
    )
