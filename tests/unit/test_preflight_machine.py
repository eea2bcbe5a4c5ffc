"""Preflight's checks of the machine: what is wrong is named with what to do, and what is well is left in peace."""

import dataclasses
import json
import os
import shutil
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from tests.subjects import classify_subject, statuses
from train.engine import storage
from train.engine.checks import disk, processes
from train.engine.checks.disk import check_disk, check_folder
from train.engine.checks.processes import check_processes
from train.engine.runtime import Runtime
from train.engine.state import capture


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return classify_subject(tmp_path_factory.mktemp("run"), dataset="blobs", model="mlp", ema_decay=0.9)


@pytest.fixture
def subject(original, monkeypatch):
    """A subject whose parts a test may replace, on a machine without a launcher."""
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return dataclasses.replace(original)


def with_settings(subject, **settings):
    subject.settings = dataclasses.replace(subject.settings, **settings)
    return subject


def find(check, subject, name):
    (found,) = [finding for finding in check(subject) if finding.check == name]
    json.dumps(found.values)
    assert bool(found.causes) == (found.status in ("warn", "fail"))
    return found


def process(host="one", device="cpu:0", gpu=None, gpus=(), unused=None, threads=1, cores=2):
    return {
        "host": host, "device": device, "gpu": gpu, "gpus": list(gpus), "unused": unused, "threads": threads,
        "cores": list(range(cores)),
    }  # fmt: skip


def on_gpus(host, used, visible):
    return [process(host, f"cuda:{number}", gpu, visible) for number, gpu in enumerate(used)]


class Several(Runtime):
    """Two processes, of which the other one says what `change` makes of what this one says."""

    num_processes = 2

    def __init__(self, runtime, change):
        super().__init__(runtime.accelerator, runtime.control)
        self.change = change

    def share(self, value):
        return [value, self.change(dict(value))]


# ---- processes ----


def test_one_process_on_a_cpu_passes(subject):
    found = find(check_processes, subject, "processes")
    assert found.status == "pass", found
    assert "1 x cpu" in found.measured


def judge(everyone, environment=None):
    found = processes._judge_processes(everyone, environment or {})
    json.dumps(found.values)
    return found.status, found.measured, " ".join(found.causes)


@pytest.mark.parametrize(
    "everyone",
    [
        on_gpus("one", ["a"], ["a"]),
        on_gpus("one", ["a", "b"], ["a", "b"]),
        on_gpus("one", ["a", "b"], ["a", "b"]) + on_gpus("two", ["c", "d"], ["c", "d"]),
        # srun --gpus-per-task 1: each process sees one GPU, as number 0.
        [process("one", "cuda:0", "a", ["a"]), process("one", "cuda:0", "b", ["b"])],
        [process(threads=2)],
        [process(cores=64)],
        [process(), process()],
        [process(cores=16), process(cores=16)],
    ],
)
def test_sound_launches_pass(everyone):
    status, measured, _ = judge(everyone)
    assert status == "pass", measured


def test_two_processes_on_one_gpu_fail():
    status, measured, causes = judge(on_gpus("one", ["a", "a", "b"], ["a", "b"]))
    assert status == "fail" and "2 processes share one GPU of one" in measured
    assert "--num_processes 2" in causes


def test_an_idle_gpu_is_a_warning_with_the_command():
    status, measured, causes = judge(on_gpus("one", ["a"], ["a", "b", "c", "d"]))
    assert status == "warn" and "3 of the 4 GPUs of one idle" in measured
    assert "accelerate launch --multi_gpu --num_processes 4" in causes and "CUDA_VISIBLE_DEVICES" in causes


def test_a_gpu_beside_a_run_on_the_cpu_is_a_warning():
    status, measured, _ = judge([process(unused="cuda")])
    assert status == "warn" and "one has a cuda device" in measured


def test_more_threads_than_cores_are_a_warning():
    status, measured, causes = judge([process(threads=4, cores=4)] * 2)
    assert status == "warn" and "8 threads on 4 core(s)" in measured
    assert "OMP_NUM_THREADS=2" in causes
    status, measured, _ = judge([process(cores=2)] * 4)
    assert status == "warn" and "4 processes on 2 core(s)" in measured


def test_hosts_are_counted_apart():
    assert judge([process("one", threads=2), process("two", threads=2)])[0] == "pass"


def test_cores_that_torchrun_leaves_idle_are_a_warning():
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}
    status, measured, causes = judge([process(cores=64)] * 2, torchrun)
    assert status == "warn" and "62 of 64 cores" in measured and "OMP_NUM_THREADS=32" in causes
    assert judge([process(cores=4)] * 2, torchrun)[0] == "pass"


def test_tasks_that_nothing_runs_in_are_a_warning():
    status, measured, _ = judge([process()], {"SLURM_NTASKS": "4"})
    assert status == "warn" and "SLURM allotted 4 tasks" in measured


def test_facts_come_from_all_processes(subject):
    def elsewhere(facts):
        return {**facts, "host": "elsewhere", "threads": 999}

    subject.runtime = Several(subject.runtime, elsewhere)
    found = find(check_processes, subject, "processes")
    assert found.status == "warn" and "999 threads" in found.measured and "on 2 host(s)" in found.measured


# ---- precision ----


@pytest.mark.parametrize(
    ("able", "status"),
    [
        ({"architecture": "x86_64", "avx512_bf16": True}, "pass"),
        ({"architecture": "x86_64", "amx_bf16": True}, "pass"),
        ({"architecture": "x86_64", "avx2": True}, "warn"),
        ({"architecture": "aarch64", "bf16": True}, "pass"),
        ({"architecture": "aarch64", "neon": True}, "warn"),
        ({"architecture": "riscv64"}, "pass"),
    ],
)
def test_bf16_is_for_processors_that_have_it(subject, monkeypatch, able, status):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    subject.runtime = SimpleNamespace(
        device=torch.device("cpu"),
        accelerator=SimpleNamespace(mixed_precision="bf16", autocast=lambda: torch.autocast("cpu", torch.bfloat16)),
    )
    found = processes._judge_precision(with_settings(subject, mixed_precision="bf16"))
    assert found.status == status, found
    assert "bf16 (asked for), products in bfloat16" in found.measured
    assert ("cannot be told" in found.measured) == (able["architecture"] == "riscv64")


def test_float32_passes_on_any_processor(subject, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"})
    found = find(check_processes, subject, "precision")
    assert found.status == "pass" and found.values["dtype"] == "float32"


def test_another_precision_than_announced_fails(subject):
    subject.runtime = SimpleNamespace(
        device=torch.device("cpu"),
        accelerator=SimpleNamespace(mixed_precision="bf16", autocast=lambda: torch.autocast("cpu", enabled=False)),
    )
    found = processes._judge_precision(subject)
    assert found.status == "fail" and "float32" in found.measured and "bfloat16" in found.expected


# ---- the run's folder ----


def listed(subject):
    return sorted(str(path) for path in subject.session.run.path.rglob("*"))


def test_a_folder_that_can_be_written_passes_and_stays_clean(subject):
    before = listed(subject)
    assert find(check_folder, subject, "run folder").status == "pass"
    assert listed(subject) == before


def test_what_a_killed_preflight_left_is_no_hindrance(subject):
    left = subject.session.run.checkpoints / ".tmp-preflight-00000"
    left.mkdir()
    (left / "file").touch()
    assert find(check_folder, subject, "run folder").status == "pass"
    assert not left.exists()


def test_a_dry_run_has_no_folder(subject):
    subject.session = dataclasses.replace(subject.session, run=None)
    for check, name in ((check_folder, "run folder"), (check_disk, "disk space")):
        assert statuses(check(subject)) == {name: "skip"}


@pytest.mark.parametrize("call", ["mkdir", "fsync", "write", "rename"])
def test_a_folder_that_cannot_be_written_fails(subject, monkeypatch, call):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    broken = SimpleNamespace(**{name: getattr(os, name) for name in dir(os) if not name.startswith("__")})
    setattr(broken, call, refuse)
    monkeypatch.setattr(storage, "os", broken)
    monkeypatch.setattr(disk, "SIGHT_SECONDS", 0.0)
    found = find(check_folder, subject, "run folder")
    assert found.status == "fail" and "Read-only file system" in found.measured
    assert "0 of 1 process(es)" in found.measured and "--output_dir" in found.causes[0]
    storage.sweep(subject.session.run.checkpoints)


def test_bytes_that_come_back_otherwise_fail(subject, monkeypatch):
    monkeypatch.setattr(disk, "_write", lambda path, content: storage.write_durably(path, [content[:-1]]))
    monkeypatch.setattr(disk, "SIGHT_SECONDS", 0.0)
    found = find(check_folder, subject, "run folder")
    assert found.status == "fail" and "other bytes" in found.measured


@pytest.mark.parametrize(("layout", "status"), [("sharded", "fail"), ("whole", "warn")])
def test_a_folder_that_another_host_does_not_see(subject, layout, status):
    subject.runtime = Several(subject.runtime, lambda facts: {**facts, "host": "far", "sees": False})
    found = find(check_folder, with_settings(subject, checkpoint_format=layout), "run folder")
    assert found.status == status and "rank 1 on far do" in found.measured
    assert "all hosts share" in found.causes[0]


@pytest.mark.parametrize(("layout", "status"), [("sharded", "fail"), ("whole", "warn")])
def test_a_folder_that_another_host_cannot_write(subject, layout, status):
    subject.runtime = Several(subject.runtime, lambda facts: {**facts, "host": "far", "error": "No space left"})
    found = find(check_folder, with_settings(subject, checkpoint_format=layout), "run folder")
    assert found.status == status and "not rank 1 on far: No space left" in found.measured


def test_a_token_of_an_earlier_start_is_not_taken_for_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "SIGHT_SECONDS", 0.0)
    sign = tmp_path / "token"
    assert not disk._wait_for_token(sign, "new")
    sign.write_text("old")
    assert not disk._wait_for_token(sign, "new")
    sign.write_text("new")
    assert disk._wait_for_token(sign, "new")


# ---- disk space ----

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.mark.parametrize(
    ("share", "status"), [(0.99, "fail"), (1.0, "warn"), (1.99, "warn"), (2.01, "pass"), (100, "pass")]
)
def test_room_for_the_checkpoints(subject, monkeypatch, share, status):
    needed = find(check_disk, subject, "disk space").values["needed"]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, int(needed * share)))
    found = find(check_disk, subject, "disk space")
    assert found.status == status
    assert found.status == "pass" or "--keep_checkpoints" in found.causes[0]


def test_no_room_for_more_files_fails(subject, monkeypatch):
    monkeypatch.setattr(disk, "_free_inodes", lambda folder: 10)
    found = find(check_disk, subject, "disk space")
    assert found.status == "fail" and "10 more files" in found.measured
    monkeypatch.setattr(disk, "_free_inodes", lambda folder: None)
    assert find(check_disk, subject, "disk space").status == "pass"


def test_frozen_parameters_have_no_moments(tmp_path):
    subject = classify_subject(tmp_path, dataset="blobs", model="mlp")
    size = find(check_disk, subject, "disk space").values["one_checkpoint"]
    first = next(subject.state.model.parameters()).requires_grad_(False)
    assert find(check_disk, subject, "disk space").values["one_checkpoint"] == size - 2 * 4 * first.numel()


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_checkpoint_is_as_large_as_it_turns_out_to_be(tmp_path, optimizer, ema):
    """Against what capture returns after a step, but for the generators and counters, which are small change."""
    subject = classify_subject(tmp_path, dataset="blobs", model="mlp", optimizer=optimizer, ema_decay=ema)
    found = find(check_disk, subject, "disk space")
    subject.losses(subject.samples(8))["loss"].mean().backward()
    subject.state.optimizer.step()
    files, _ = capture(subject.state, subject.runtime)
    tensors = [tensor for part in files if part != "rng" for name, tensor in files[part].items() if tensor.ndim]
    assert found.values["one_checkpoint"] == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert found.values["copies"] == subject.settings.keep_checkpoints + 2


def test_checkpoints_that_are_there_give_their_room_back(subject, monkeypatch):
    monkeypatch.setattr(disk, "SMALL_FILES", 0)
    before = find(check_disk, subject, "disk space").values["needed"]
    folder = subject.session.run.checkpoints / "step_00000007"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(100))
    try:
        found = find(check_disk, subject, "disk space")
        assert found.values["needed"] == before - 100 and "less 0.1 kB" in found.measured
    finally:
        shutil.rmtree(folder)
