"""What theory says of training on several processes: bytes, seconds, efficiency, memory. No measuring, no torch.

Legend: N processes, P parameters, b bytes of a gradient or weight on the wire, L latency of a message in seconds,
W bytes per second that a process can send, T samples of the global batch, F operations of a sample, forward and
backward, R operations per second that a process reaches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log2

WAYS = ("ddp", "exact", "fsdp2")
BUCKET = 25 * 2**20  # bytes that DistributedDataParallel sends together (torch's default)
BACKWARD = 2 / 3  # share of the computation behind which gradients can be sent
ADAM_BYTES = 16  # a parameter in float32: weight, gradient and Adam's two moments


@dataclass(frozen=True)
class Link:
    """What connects a process with the next; nominal, in one direction."""

    name: str
    bytes_per_second: float
    latency: float  # seconds of a message


@dataclass(frozen=True)
class Work:
    """A model and its global batch."""

    name: str
    parameters: float
    operations: float  # floating point operations of a sample, forward and backward
    batch: int  # samples of an optimizer step over all processes
    units: int  # parts of the model that FSDP2 fetches one by one


@dataclass(frozen=True)
class Traffic:
    """What a process sends in an optimizer step."""

    bytes: float
    messages: float  # one after another


# Sources: IEEE 802.3ae, 802.3by and 802.3ba for Ethernet; NVIDIA's ConnectX-7 data sheet for NDR InfiniBand; NVIDIA's
# H100 data sheet for NVLink 4 (900 GB/s in both directions together). Latencies are assumed: TCP, RDMA, NVLink.
LINKS = (
    Link("10 GbE", 1.25e9, 30e-6),
    Link("25 GbE", 3.125e9, 30e-6),
    Link("100 Gb/s", 12.5e9, 10e-6),
    Link("400 Gb/s InfiniBand", 50e9, 5e-6),
    Link("NVLink 4", 450e9, 3e-6),
)
TOKENS = 1024
# A transformer takes 6 operations for each parameter and token (Kaplan et al. 2020). mnist_cnn: 12.0 million
# multiplications of a forward pass, counted from its layers; ResNet-50: 4.1 billion at 224 x 224 (torchvision's
# table of weights). Backward is twice forward.
WORKS = (
    Work("1.2 M, mnist_cnn, 1,024 images", 1.2e6, 3 * 2 * 12.0e6, 1024, 4),
    Work("25.6 M, ResNet-50, 2,048 images", 25.6e6, 3 * 2 * 4.1e9, 2048, 16),
    Work("100 M, transformer, 0.5 M tokens", 100e6, 6 * 100e6 * TOKENS, 512, 12),
    Work("1 B, transformer, 0.5 M tokens", 1e9, 6 * 1e9 * TOKENS, 512, 24),
    Work("7 B, transformer, 0.5 M tokens", 7e9, 6 * 7e9 * TOKENS, 512, 32),
)


def ideal_bytes(way: str, processes: int, parameters: float, width: int = 4) -> float:
    """Return the bytes b P 2 (N-1)/N, log2 N or 3 (N-1)/N times that a process sends in a step.

    ddp: ring all-reduce. exact: recursive doubling. fsdp2: weights fetched for forward and again for backward,
    gradients reduced and scattered, each (N-1)/N.

    Raises:
        ValueError: no such way.
    """
    others = (processes - 1) / processes
    rounds = {"ddp": 2 * others, "exact": log2(processes), "fsdp2": 3 * others}
    if way not in rounds:
        raise ValueError(f"{way} is none of {', '.join(rounds)}")
    return rounds[way] * width * parameters


def traffic(way: str, processes: int, work: Work) -> Traffic:
    """Return bytes and messages of a step; DDP sends buckets, FSDP2 units, exact reduction all at once."""
    buckets = max(1.0, 4 * work.parameters / BUCKET)
    messages = {
        "ddp": 2 * (processes - 1) * buckets,
        "exact": log2(processes),
        "fsdp2": 3 * (processes - 1) * work.units,
    }
    return Traffic(ideal_bytes(way, processes, work.parameters), messages[way])


def exchange_seconds(sent: Traffic, link: Link) -> float:
    """Return bytes / W + messages L."""
    return sent.bytes / link.bytes_per_second + sent.messages * link.latency


def compute_seconds(work: Work, processes: int, rate: float) -> float:
    """Return T F / (N R): the global batch is the setting, each process has its share."""
    return work.batch * work.operations / processes / rate


def efficiency(way: str, work: Work, processes: int, link: Link, rate: float, *, overlap: bool = True) -> float:
    """Return the share of a step in which a process computes.

    With overlap DDP hides what is sent behind the backward pass, FSDP2 behind all of the computation; exact reduction
    begins when the backward pass is over and hides nothing.
    """
    compute = compute_seconds(work, processes, rate)
    hidden = {"ddp": BACKWARD, "exact": 0.0, "fsdp2": 1.0}[way] * compute if overlap else 0.0
    exposed = max(0.0, exchange_seconds(traffic(way, processes, work), link) - hidden)
    return compute / (compute + exposed)


def state_bytes(way: str, work: Work, processes: int) -> float:
    """Return the bytes of weights, gradients and Adam's moments that a process holds, activations not counted."""
    if way != "fsdp2":
        return ADAM_BYTES * work.parameters
    return ADAM_BYTES * work.parameters / processes + 2 * 4 * work.parameters / work.units  # a unit and the next


def paper(rate: float) -> Iterator[str]:
    """Yield the lines of the tables of expected efficiency and memory, in Markdown."""
    yield f"Each process reaches {rate / 1e12:,.0f} TFLOP/s. Percent of a step spent computing: DDP / exact / FSDP2.\n"
    yield f"| model, global batch | processes | {' | '.join(link.name for link in LINKS)} |"
    yield "|---" * (2 + len(LINKS)) + "|"
    for work in WORKS:
        for processes in (8, 64):
            cells = [
                " / ".join(f"{100 * efficiency(way, work, processes, link, rate):.0f}" for way in WAYS)
                for link in LINKS
            ]
            yield f"| {work.name} | {processes} | {' | '.join(cells)} |"
    yield "\n| parameters | sent in a step by one of 64: DDP | exact | FSDP2 | state: DDP, exact | FSDP2 of 8 | of 64 |"
    yield "|---" * 7 + "|"
    for work in WORKS:
        sent = [f"{ideal_bytes(way, 64, work.parameters) / 1e9:,.3g} GB" for way in WAYS]
        held = [state_bytes("ddp", work, 64), state_bytes("fsdp2", work, 8), state_bytes("fsdp2", work, 64)]
        yield f"| {work.name.split(',')[0]} | {' | '.join(sent + [f'{size / 1e9:,.3g} GB' for size in held])} |"
