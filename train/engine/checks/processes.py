"""Processes and devices, and the precision they compute in."""

from __future__ import annotations

import os
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from train.engine.checks.finding import Finding, Status, judge
from train.engine.checks.subject import Subject
from train.engine.runtime import Runtime

IDLE_CORES = 8  # of a machine with fewer, nobody misses some
AUTOCAST = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
# Names in torch.cpu.get_capabilities() by processor architecture (torch 2.13).
BF16_INSTRUCTIONS = {"x86_64": ("avx512_bf16", "amx_bf16"), "aarch64": ("bf16", "sve_bf16"), "arm64": ("bf16",)}


class _Problem(NamedTuple):
    status: Status
    said: str
    cause: str


def check_processes(subject: Subject) -> Iterator[Finding]:
    """See that there are as many processes as were meant, each with a device of its own, and in which precision."""
    yield _judge_processes(subject.runtime.share(_describe_process(subject.runtime)), os.environ)
    yield _judge_precision(subject)


def _describe_process(runtime: Runtime) -> dict[str, Any]:
    """Return, in plain values, what a process has of its machine."""
    device = runtime.device
    seen = [_identify_gpu(number) for number in range(torch.cuda.device_count())]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return {
        "host": socket.gethostname(),
        "device": str(device),
        "gpu": seen[device.index or 0] if device.type == "cuda" else None,
        "gpus": seen,
        "unused": accelerator.type if accelerator is not None and device.type == "cpu" else None,
        "threads": torch.get_num_threads(),
        "cores": sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1)),
    }


def _identify_gpu(number: int) -> str:
    """Return what tells a GPU from all others. Each process may number those it sees from 0."""
    properties = torch.cuda.get_device_properties(number)
    return str(getattr(properties, "uuid", number))


def _judge_processes(everyone: list[dict[str, Any]], environment: Mapping[str, str]) -> Finding:
    problems = _find_idle_tasks(len(everyone), environment)
    by_host: dict[str, list[dict[str, Any]]] = {}
    for facts in everyone:
        by_host.setdefault(facts["host"], []).append(facts)
    for host, local in by_host.items():
        problems += _find_gpu_problems(host, local, len(everyone), len(by_host))
        problems += _find_thread_problems(host, local, environment)
    devices = Counter(facts["device"].split(":")[0] for facts in everyone)
    parts = [
        f"{len(everyone)} process(es) on {len(by_host)} host(s)",
        " and ".join(f"{count} x {kind}" for kind, count in devices.items()),
    ]
    if "cpu" in devices:
        first = everyone[0]
        parts.append(f"{first['threads']} thread(s) each, {len(first['cores'])} core(s)")
    problems.sort(key=lambda problem: problem.status != "fail")
    return judge(
        "processes",
        not problems,
        ", ".join([*parts, *(problem.said for problem in problems)]),
        "as many processes as were meant, each with a device of its own, and no device idle",
        tuple(dict.fromkeys(problem.cause for problem in problems)),
        otherwise=problems[0].status if problems else "fail",
        processes=[{key: value for key, value in facts.items() if key != "cores"} for facts in everyone],
        cores={host: len(_cores(local)) for host, local in by_host.items()},
    )


def _find_idle_tasks(num_processes: int, environment: Mapping[str, str]) -> list[_Problem]:
    """Find tasks of SLURM that nothing runs in."""
    allotted = int(environment.get("SLURM_NTASKS") or 1)
    if "SLURM_STEP_NUM_TASKS" not in environment and num_processes < allotted:
        return [
            _Problem(
                "warn",
                f"SLURM allotted {allotted} tasks",
                f"the job asks for tasks that nothing runs in: torchrun --nproc_per_node {allotted} {_script()}, or "
                "ask for --ntasks=1 with --cpus-per-task",
            )
        ]
    return []


def _find_gpu_problems(host: str, local: list[dict[str, Any]], num_processes: int, num_hosts: int) -> list[_Problem]:
    """Find GPUs of a host that several processes have, or none."""
    problems = []
    used = Counter(facts["gpu"] for facts in local if facts["gpu"] is not None)
    shared = [gpu for gpu, count in used.items() if count > 1]
    if shared:
        count = max(used.values())
        problems.append(
            _Problem(
                "fail",
                f"{count} processes share one GPU of {host}",
                f"more processes than GPUs: --num_processes {num_processes - sum(used.values()) + len(used)}, or let "
                "CUDA_VISIBLE_DEVICES name all GPUs",
            )
        )
    idle = {gpu for facts in local for gpu in facts["gpus"]} - used.keys()
    if used and idle:
        command = f"accelerate launch --multi_gpu --num_processes {len(used) + len(idle)}"
        command += "" if num_hosts == 1 else f" on each of {num_hosts} nodes (times the nodes)"
        problems.append(
            _Problem(
                "warn",
                f"{len(idle)} of the {len(used) + len(idle)} GPUs of {host} idle",
                f"fewer processes than GPUs: {command} {_script()}. If that is meant, say so with CUDA_VISIBLE_DEVICES",
            )
        )
    unused = next((facts["unused"] for facts in local if facts["unused"] is not None), None)
    if unused is not None:
        problems.append(
            _Problem(
                "warn",
                f"{host} has a {unused} device, and computes on the CPU",
                f"the launcher asks for the CPU: accelerate launch {_script()}, without use_cpu or ACCELERATE_USE_CPU",
            )
        )
    return problems


def _find_thread_problems(host: str, local: list[dict[str, Any]], environment: Mapping[str, str]) -> list[_Problem]:
    """Find more threads than cores; or idle cores that torchrun, not the user, left so."""
    if not local[0]["device"].startswith("cpu"):  # cpu:0 under torchrun
        return []
    threads, cores = sum(facts["threads"] for facts in local), len(_cores(local))
    fitting = max(1, cores // len(local))
    if threads > max(cores, len(local)):
        return [
            _Problem(
                "warn",
                f"{threads} threads on {cores} core(s) of {host}",
                f"threads take the cores from each other: OMP_NUM_THREADS={fitting}",
            )
        ]
    if len(local) > cores:
        return [
            _Problem(
                "warn",
                f"{len(local)} processes on {cores} core(s) of {host}",
                f"processes take the cores from each other: start {cores}",
            )
        ]
    # A single thread that the user asked for and the one that torchrun sets by itself look alike; the latter is
    # common on large machines. One process alone has what the user set, and is left in peace.
    alone = len(local) == 1 or "TORCHELASTIC_RUN_ID" not in environment
    if not alone and threads == len(local) and cores >= max(IDLE_CORES, 4 * threads):
        return [
            _Problem(
                "warn",
                f"{cores - threads} of {cores} cores of {host} idle",
                f"torchrun sets OMP_NUM_THREADS=1 where it is not set: OMP_NUM_THREADS={fitting}",
            )
        ]
    return []


def _cores(local: list[dict[str, Any]]) -> set[int]:
    return {core for facts in local for core in facts["cores"]}


def _script() -> str:
    return f"{os.path.relpath(sys.argv[0]) if sys.argv[0] else 'SCRIPT'} ..."


def _judge_precision(subject: Subject) -> Finding:
    accelerator, device = subject.runtime.accelerator, subject.runtime.device
    ones = torch.ones(8, 8, device=device)
    with accelerator.autocast():
        dtype = (ones @ ones).dtype
    origin = "the launcher's" if subject.settings.mixed_precision is None else "asked for"
    name = str(accelerator.mixed_precision)
    measured = f"{name} ({origin}), products in {_plain(dtype)} on {device.type}"
    values: dict[str, Any] = {"mixed_precision": name, "dtype": _plain(dtype), "device": device.type}
    if dtype != AUTOCAST[name]:
        cause = f"autocast is off or of another type: --mixed_precision {name}, and the launcher's YAML"
        return judge("precision", False, measured, f"products in {_plain(AUTOCAST[name])}", (cause,), **values)
    native = None if dtype != torch.bfloat16 else _has_bf16(device)
    if native is None and dtype == torch.bfloat16:
        measured += "; whether the processor has instructions for it cannot be told"
    return judge(
        "precision",
        native is not False,
        measured if native is not False else f"{measured}, which has no instructions for it",
        "the precision asked for, and a device that is made for it",
        (
            "bf16 is emulated here, and slower than float32: --mixed_precision no"
            + (", or fp16" if device.type == "cuda" else ""),
        ),
        otherwise="warn",
        **values,
    )


def _has_bf16(device: torch.device) -> bool | None:
    """Say whether a device multiplies in bfloat16 by itself; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return None
    able = torch.cpu.get_capabilities()
    names = BF16_INSTRUCTIONS.get(str(able.get("architecture")).lower())
    return None if names is None else any(bool(able.get(name)) for name in names)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
