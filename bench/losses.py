"""How fast the SSIM loss is, forward and backward, against pytorch-msssim, piq and torchmetrics, in one process.

    python bench/losses.py --repeats 7

Prints a Markdown table. All run in turn on the same images, with the same window (Gaussian, 11 pixels, sigma 1.5); a
ratio is the median of the ratios of each round. The peers come with `pip install -e ".[bench]"`, but for piq, whose
torchvision has no build for CPUs on every index; one that is missing is named and left out.
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import torch

from models.losses import ssim

SHAPES = ((16, 1, 256, 256), (16, 3, 64, 64))
PEERS = {"pytorch-msssim": "pytorch_msssim", "piq": "piq", "torchmetrics": "torchmetrics.functional.image"}
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ways = {"ours": ssim, **_find_peers()}
    print(f"torch {torch.__version__}, float32, {options.threads} thread(s), n = {options.repeats}\n")
    print(
        "| images | way | forward + backward, median ms | least to most | ours is so many times as fast | differs by |"
    )
    print("|---|---|---|---|---|---|")
    for shape in SHAPES:
        targets = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        images = (targets + 0.1 * noise).clamp(0, 1).requires_grad_()
        values = {way: _measure(loss, images, targets)[1] for way, loss in ways.items()}  # and warm up
        milliseconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.repeats):
            for way, loss in ways.items():
                milliseconds[way].append(_measure(loss, images, targets)[0])
        for way, seen in milliseconds.items():
            ratio = statistics.median(other / ours for other, ours in zip(seen, milliseconds["ours"]))
            print(
                f"| {' x '.join(map(str, shape))} | {way} | {statistics.median(seen):.1f} | "
                f"{min(seen):.1f} to {max(seen):.1f} | {ratio:.2f} | {abs(values[way] - values['ours']):.0e} |",
                flush=True,
            )


def _find_peers() -> dict[str, Loss]:
    calls: dict[str, Callable[..., Loss]] = {
        "pytorch-msssim": lambda module: lambda x, y: module.ssim(x, y, data_range=1.0, size_average=False),
        "piq": lambda module: (
            lambda x, y: module.ssim(x, y, kernel_size=11, kernel_sigma=1.5, downsample=False, reduction="none")
        ),
        "torchmetrics": lambda module: (
            lambda x, y: module.structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
        ),
    }
    peers = {}
    for name, module in PEERS.items():
        try:
            peers[f"{name} {version(name)}"] = calls[name](importlib.import_module(module))
        except ImportError:
            print(f"{name} is missing: pip install {name}")
    return peers


def _measure(loss: Loss, images: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    """Return the milliseconds of a forward and a backward pass, and the mean SSIM."""
    images.grad = None
    start = time.perf_counter()
    value = loss(images, targets).mean()
    (1 - value).backward()
    return (time.perf_counter() - start) * 1e3, value.item()


if __name__ == "__main__":
    main()
