"""train/compare.py on real runs, on what W&B keeps of runs, and its page in a real browser."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.process.browser import Browser, missing_reason
from tests.runs import BEGIN, write_run

ROOT = Path(__file__).parents[2]
KEY = "0" * 40


def compare(folder, *arguments, code=0, **environment):
    """Run the script; return the content of its JSON file, or its last line of errors."""
    command = [sys.executable, ROOT / "train" / "compare.py", *arguments, "--json", "numbers.json"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    variables = {**inherited, "HOME": str(folder), "PYTHONPATH": str(ROOT), **environment}
    finished = subprocess.run(
        [str(part) for part in command], cwd=folder, env=variables, capture_output=True, text=True, timeout=240
    )
    assert finished.returncode == code, finished.stdout + finished.stderr
    if code:
        return finished.stderr
    return json.loads((folder / "numbers.json").read_text())


# ---- real runs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_settings_with_two_seeds_each(classify):
    names = []
    for rate in (0.0001, 0.01):
        for seed in (0, 1):
            names.append(f"rate{rate}-{seed}")
            options = ("--dataset", "blobs", "--num_train_epochs", 2, "--learning_rate", rate, "--seed", seed)
            classify.run(names[-1], *options)
    classify.run(names[0], *options[:4], "--learning_rate", 0.0001, "--seed", 0)  # finished: only tested once more
    content = compare(classify.folder, *names)
    assert [each["label"] for each in content["groups"]] == ["learning_rate=0.01", "learning_rate=0.0001"]
    assert [each["n"] for each in content["groups"]] == [2, 2]
    assert [run["starts"] for run in content["runs"]] == [2, 1, 1, 1]
    assert len({run["facts"]["data"] for run in content["runs"]}) == 1
    for run in content["runs"]:
        lines = classify.metrics(run["name"])
        scores = {line["step"]: line["val/accuracy"] for line in lines if "val/accuracy" in line}
        assert run["best"]["value"] == max(scores.values()) and run["at_equal_step"] == scores[content["equal_step"]]
        assert run["last"] == {"step": lines[-1]["step"], "value": scores[lines[-1]["step"]]}
        assert run["test"]["test/accuracy"] == lines[-1]["test/accuracy"]
        assert 0 < run["training_seconds"] < 60 and run["samples_per_second"] > 0
    (difference,) = content["differences"]
    assert difference["difference"] == pytest.approx(content["groups"][0]["mean"] - content["groups"][1]["mean"])
    assert set(content["settings_that_differ"]) == {"learning_rate", "seed"}
    assert content["warnings"] == []


# ---- W&B -------------------------------------------------------------------------------------------------------------

OFFLINE = """
import sys, wandb
first, identity, seed = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
config = {"seed": seed, "learning_rate": 1.0, "best_metric": "val/loss", "run_name": identity}
run = wandb.init(project="p", id=identity, name=identity, mode="offline", config=config, resume="allow",
                 settings=wandb.Settings(silent=True))
for step in (first, first + 10):
    run.log({"val/loss": 100.0 / step, "train/loss": float("nan"), "perf/samples_per_second": 50.0}, step=step)
run.summary.update({"test/loss": 0.25})
run.finish()
"""


def write_offline(folder, first, identity, seed):
    """Make a real offline run with two evaluations; return its folder."""
    folder.mkdir()
    command = [sys.executable, "-c", OFFLINE, str(first), identity, str(seed)]
    subprocess.run(command, cwd=folder, check=True, timeout=120, capture_output=True)
    return next(folder.glob("wandb/offline-run-*"))


@pytest.mark.slow
def test_offline_files_of_wandb_and_run_directories_mix(tmp_path):
    first = write_offline(tmp_path / "a", 10, "aaaaaaaa", 1)
    second = write_offline(tmp_path / "b", 30, "aaaaaaaa", 1)
    lines = [{"step": step, "time": BEGIN + step, "val/loss": 1.0, "train/loss": 1.0} for step in (20, 40)]
    write_run(tmp_path / "local", lines, best_metric="val/loss", learning_rate=1, best_mode="min")
    content = compare(tmp_path, first, next(second.glob("*.wandb")), "local")
    offline, local = content["runs"]
    assert (offline["name"], offline["steps"], offline["starts"]) == ("aaaaaaaa", 40, 2)
    assert offline["best"] == {"step": 40, "value": 2.5} and offline["test"] == {"test/loss": 0.25}
    assert offline["samples_per_second"] == 50.0 and 0 < offline["training_seconds"] < 60
    assert (content["mode"], content["equal_step"], local["at_equal_step"]) == ("min", 40, 1.0)
    assert "learning_rate" not in content["settings_that_differ"]  # 1.0 is 1
    assert any("starts of one run, put together" in warning for warning in content["warnings"])
    torn = tmp_path / "torn.wandb"
    torn.write_bytes(next(first.glob("*.wandb")).read_bytes()[:7])
    other = tmp_path / "other.wandb"
    other.write_bytes(b"no such thing at all")
    errors = compare(tmp_path, torn, other, code=2).splitlines()
    assert "torn fragment" in errors[0] and "W&B cannot read other.wandb" in errors[1]


RUN = {
    "projectId": "7", "id": "UnVu", "name": "abcd", "displayName": "<b>far</b>", "state": "finished", "tags": [],
    "config": json.dumps({"seed": {"value": 3}, "best_metric": {"value": "val/loss"}, "_wandb": {"value": {}}}),
    "summaryMetrics": json.dumps({"test/loss": 0.25}), "systemMetrics": "{}", "createdAt": "2026-11-22T10:00:00Z",
    "commit": "abc", "historyKeys": {"lastStep": 20}, "user": {"name": "n", "username": "u"},
    "parquetHistory": {"parquetUrls": [], "liveData": [{"_step": 10}, {"_step": 20}]},
    "history": [
        json.dumps({"_step": 10, "_timestamp": BEGIN + 5, "val/loss": 1.5, "train/loss": 2.0}),
        json.dumps({"_step": 20, "_timestamp": BEGIN + 9, "val/loss": "NaN", "train/loss": 1.0}),
    ],
}  # fmt: skip


class Answers(BaseHTTPRequestHandler):
    """W&B's GraphQL, as far as one run of its public API needs it."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            viewer = {
                "id": "1",
                "entity": "e",
                "username": "u",
                "flags": "{}",
                "teams": {"edges": []},
                "email": "a@b.c",
            }
            known = asked.get("variables", {}).get("name", "abcd") == "abcd"
            answer = {"data": {"viewer": viewer, "project": {"run": RUN if known else None}}}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_run_of_wandb_through_its_public_api(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    variables = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": KEY}
    try:
        content = compare(tmp_path, "e/p/abcd", **variables)
        error = compare(tmp_path, "e/p/unknown", code=2, **variables)
    finally:
        server.shutdown()
        server.server_close()
    (run,) = content["runs"]
    assert (run["name"], run["config"]) == ("<b>far</b>", {"seed": 3, "best_metric": "val/loss"})
    assert run["best"] == {"step": 10, "value": 1.5} and run["last"] == {"step": 20, "value": None}
    assert (run["test"], run["starts"], run["facts"]) == ({"test/loss": 0.25}, None, {"commit": "abc"})
    assert run["training_seconds"] == 9
    assert error.startswith("error: e/p/unknown: no such folder, and W&B gives no such run (")
    assert len(error.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("key", "words"), [("", "without a key"), (KEY, "W&B gives no such run")])
def test_no_key_or_no_network_is_one_message(tmp_path, key, words):
    variables = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": key}
    (error,) = compare(tmp_path, "e/p/abcd", code=2, **variables).splitlines()
    assert error.startswith("error: e/p/abcd: no such folder") and words in error


# ---- the page in a browser -------------------------------------------------------------------------------------------

IMAGES = "[...document.images].map(image => [image.complete, image.naturalWidth > 0, image.currentSrc.length])"
LOOKS = "getComputedStyle(document.body).color + getComputedStyle(document.body).backgroundColor"


@pytest.mark.slow
def test_page_in_a_browser(tmp_path):
    reason = missing_reason()
    if reason is not None:
        pytest.skip(reason)
    names = ["<script>document.title = 'broken in'<", "a_very_long_name_" * 5, "b", "c"]
    settings = {f"setting_number_{n}": "wide " * 4 for n in range(8)}
    for seed, name in enumerate(names):
        write_run(tmp_path / name, [0.5, 0.6 + seed / 10], seed=seed, **(settings if seed % 2 else {}))
    compare(tmp_path, *(tmp_path / name for name in names), "--html", "a.html")
    page = tmp_path / "a.html"
    with Browser(tmp_path / "profile") as browser:
        looks, pictures = {}, {}
        for width, dark in ((1200, False), (400, False), (400, True)):
            browser.show(page, width=width, dark=dark)
            images = browser.ask(IMAGES)
            assert len(images) == 2 and all(complete and loaded for complete, loaded, _ in images)
            looks[dark], pictures[dark] = browser.ask(LOOKS), [length for *_, length in images]
            assert browser.ask("innerWidth") == width
            assert browser.ask("document.documentElement.scrollWidth") <= width
            assert browser.ask("[...document.images].every(image => image.getBoundingClientRect().right <= innerWidth)")
            assert browser.requests() == [page.as_uri()]
            assert browser.complaints() == []
        assert looks[True] != looks[False] and pictures[True] != pictures[False]
        assert browser.ask("document.title") == "4 runs, val/accuracy (higher is better)"
        assert browser.ask("document.scripts.length") == 0
        heads = browser.ask("[...document.querySelectorAll('h2')].map(head => head.textContent)")
        assert heads[:2] == ["Runs", "Settings that differ"]
        cells = browser.ask("[...document.querySelectorAll('table')][0].innerText")
        assert names[0] in cells and names[1] in cells
        assert browser.ask("document.querySelectorAll('details').length") == 4
        assert "interval" in browser.ask("document.querySelector('.verdict').innerText")
