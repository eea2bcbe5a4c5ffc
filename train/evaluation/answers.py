"""What a model answers to every sample of a split, each once, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from data_modules.loader import EvaluationLoader
from train.engine.contract import Batch, Slot
from train.engine.errors import UsageError
from train.engine.runtime import Runtime
from train.evaluation.samples import Part
from train.evaluation.trained_run import TrainedRun

BATCH = {"classify": 512, "reconstruct": 64}  # samples of one process, as in the evaluation of training
LARGEST_PSNR = 100.0  # as in training


def load_batches(run: TrainedRun, part: Part, runtime: Runtime) -> EvaluationLoader:
    """Return this process's share of a split."""
    return EvaluationLoader(
        part.data,
        part.split,
        BATCH[run.kind],
        rank=runtime.rank,
        num_processes=runtime.num_processes,
        device=runtime.device,
        num_workers=run.config["num_workers"],
    )


def build_answer(run: TrainedRun, model: nn.Module) -> tuple[list[str], Callable[[Batch], torch.Tensor]]:
    """Return the names of the numbers that are computed of each sample, and what computes them, float32 [B, ...].

    Of a classifier they are the logits, by class; of an autoencoder, metrics.
    """
    if run.kind == "classify":
        names = run.inputs.names
        return run.class_names, lambda batch: model(*(batch[name] for name in names)).float()
    metrics = _name_metrics(run)
    return metrics, lambda batch: torch.stack([_measure(run, model, batch)[name] for name in metrics], dim=1)


def _name_metrics(run: TrainedRun) -> list[str]:
    from models.losses import WINDOW

    metrics = ["loss", "mse", "psnr"]
    metrics += ["ssim"] if min(run.inputs.shape[1:]) >= WINDOW else []
    metrics += ["ms_ssim"] if run.config["multi_scale"] else []
    return metrics + (["kl"] if run.config["kl_weight"] > 0 else [])


def _measure(run: TrainedRun, model: nn.Module, batch: Batch) -> Batch:
    """Return the metrics of each image of a batch, as training's evaluation does."""
    from models.losses import WINDOW, psnr, reconstruction_loss

    config, images = run.config, batch["inputs"]
    reconstructions, kl = reconstruct(run, model, images)
    values = reconstruction_loss(
        reconstructions,
        images,
        alpha=config["mse_weight"],
        beta=config["ssim_weight"],
        multi_scale=config["multi_scale"],
        with_ssim=min(images.shape[2:]) >= WINDOW,
    )
    if kl is not None:
        values["kl"] = kl
        values["loss"] = values["loss"] + config["kl_weight"] * kl
    values["psnr"] = psnr(reconstructions, images).clamp(max=LARGEST_PSNR)
    return values


def reconstruct(
    run: TrainedRun, model: nn.Module, images_BCHW: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return reconstructions, float32 [B, C, H, W], and of a variational autoencoder the divergence [B]."""
    if run.config["kl_weight"] > 0:
        reconstructions, kl = model(images_BCHW, with_kl=True)
        return reconstructions.float(), kl.float()
    return model(images_BCHW).float(), None


@torch.no_grad()
def collect(answer: Callable[[Batch], torch.Tensor], slots: Iterable[Slot], runtime: Runtime) -> torch.Tensor:
    """Return the answers to all samples in their order, float32 [N, D] on the CPU, on every process."""
    mine = torch.cat([answer(slot.batch)[: slot.count].float().cpu() for slot in slots])
    counts = runtime.share(len(mine))
    # Processes exchange tensors of one shape.
    padded = torch.cat([mine, mine.new_zeros(max(counts) - len(mine), *mine.shape[1:])])
    return torch.cat([part[:count] for part, count in zip(runtime.gather(padded), counts)])


def check_answers(answers: torch.Tensor) -> None:
    """Refuse answers [N, D] of a model that is broken.

    Raises:
        UsageError: some are no finite numbers.
    """
    wrong = (~answers.isfinite()).any(dim=1).nonzero()[:, 0]
    if len(wrong):
        raise UsageError(
            f"the model answers NaN or infinity to {len(wrong):,} of {len(answers):,} samples, first number "
            f"{int(wrong[0])}; look at its weights, or choose another checkpoint"
        )
