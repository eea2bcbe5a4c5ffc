"""Train an autoencoder of images: accelerate launch train/reconstruct.py [--FLAG VALUE ...]."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data_modules.errors import DataError
from data_modules.options import DataOptions
from train.engine.cli import run_script
from train.engine.errors import UsageError
from train.engine.settings import TrainSettings, check_best_metric

if TYPE_CHECKING:  # torch takes seconds to import: --help and refused flags answer without it
    from collections.abc import Callable

    import torch
    from torch import nn

    from data_modules.loader import TrainingLoader
    from data_modules.splits import Batch, DataModule, InputSpec, Split
    from data_modules.stream import StreamLoader
    from train.engine.contract import Measure, Score, Task
    from train.engine.runtime import Runtime

EVALUATION_BATCH = 64  # samples of one process; changes no result beyond the order of sums
SMALLEST_FOR_SSIM = 11  # pixels a side
LARGEST_PSNR, SMALLEST_LOSS = 100.0, 1e-12  # an image that comes back equal would make all means infinite or NaN
SSIM_WEIGHT = 0.1  # where images are large enough for it


@dataclass(frozen=True, kw_only=True)
class ReconstructSettings(DataOptions, TrainSettings):
    """Settings of reconstruction."""

    bottleneck: int = 32
    """Numbers that an image is reduced to."""
    width: int = 32
    """Channels of the first convolution; later ones have twice and four times as many."""
    mse_weight: float = 1.0
    """Weight of the mean squared error of pixels in [0, 1] in the loss."""
    ssim_weight: float | None = None
    """Weight of 1 - SSIM in the loss. Default: 0.1, and 0 for images below 11 pixels a side, which have no SSIM."""
    multi_scale: bool = False
    """Use the multi-scale form of SSIM in the loss; for images of 161 pixels a side or more."""
    input_noise_std: float = 0.0
    """Standard deviation of noise on the inputs of training, in [0, 1]; the target stays clean."""
    kl_weight: float = 0.0
    """Above 0 the autoencoder is variational: weight of the divergence from a normal distribution, in nats."""
    augment: tuple[str, ...] = ()
    """Random changes of training images, such as: crop:4 flip rotate:10 scale:0.1."""
    optimizer: Literal["adamw", "adam", "sgd", "muon"] = "adam"
    """sgd is with Nesterov momentum 0.9. muon is for hidden matrices, with adamw for all other parameters."""
    lr_scheduler: Literal["constant", "step", "linear", "cosine", "one_cycle", "plateau"] = "plateau"
    """Shape of the learning rate over the optimizer steps."""
    best_metric: str = "val/loss"
    """Evaluation metric that decides which checkpoint is best and when training stops early."""
    early_stopping_patience: int = 20
    """Evaluations without improvement before training ends; 0 switches early stopping off."""

    def conditions(self) -> Iterator[tuple[bool, str, str]]:
        """Yield, for each rule, whether it holds, the setting, and what it must be."""
        yield from TrainSettings.conditions(self)
        yield from DataOptions.conditions(self)
        for name in ("bottleneck", "width"):
            yield getattr(self, name) >= 1, name, "1 or more"
        for name in ("mse_weight", "ssim_weight", "input_noise_std", "kl_weight"):
            yield 0 <= (getattr(self, name) or 0) < float("inf"), name, "0 or more and finite"
        weighed = self.mse_weight > 0 or self.ssim_weight is None or self.ssim_weight > 0
        yield weighed, "mse_weight", "above 0 where ssim_weight is 0"
        yield self.ssim_weight != 0 or not self.multi_scale, "multi_scale", "left out where ssim_weight is 0"
        mixed = [word for word in self.augment if word.startswith("mixup")]
        yield not mixed, "augment", "without mixup, which mixes two images into one that is none"


def settle_on_loss(settings: ReconstructSettings, inputs: InputSpec) -> ReconstructSettings:
    """Return the settings with a weight of SSIM that these images allow.

    Raises:
        UsageError: SSIM is asked for, and the images are too small for it.
    """
    height, width = inputs.shape[1:]
    smallest = 161 if settings.multi_scale else SMALLEST_FOR_SSIM
    small = min(height, width) < smallest
    if small and (settings.ssim_weight or settings.multi_scale):
        name = "multi_scale" if settings.multi_scale else "ssim_weight"
        raise UsageError(
            f"--{name}: needs images of {smallest} pixels a side or more, these are {height} x {width}; leave it out, "
            "or enlarge them with --image_size"
        )
    if settings.ssim_weight is None:
        settings = dataclasses.replace(settings, ssim_weight=0.0 if small else SSIM_WEIGHT)
    if not settings.ssim_weight and not settings.mse_weight:
        raise UsageError("--mse_weight 0.0: images below 11 pixels a side have no SSIM, so nothing is left of the loss")
    check_best_metric(settings, metric_names(settings, min(height, width) >= SMALLEST_FOR_SSIM))
    return settings


def metric_names(settings: ReconstructSettings, has_ssim: bool = True) -> list[str]:
    """Return what evaluation gives; of images too small for SSIM, less."""
    names = ["loss", "mse", "psnr"]
    names += ["ssim"] if has_ssim else []
    names += ["ms_ssim"] if settings.multi_scale else []
    names += ["mse_share", "ssim_share"] if has_ssim and settings.ssim_weight != 0 and settings.mse_weight else []
    return names + (["kl"] if settings.kl_weight else [])


def build_model(settings: ReconstructSettings, inputs: InputSpec) -> nn.Module:
    """Build an autoencoder of such images.

    Raises:
        UsageError: it cannot take images of this size.
    """
    from models.autoencoder import ConvAutoencoder

    try:
        return ConvAutoencoder(inputs.shape, settings.bottleneck, settings.width, vae=settings.kl_weight > 0)
    except ValueError as error:
        raise UsageError(f"--image_size: {error}") from error


def predict(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the reconstructions of a batch, float32 [B, C, H, W]."""
    # FSDP2's mixed precision hands out bf16 or fp16.
    images: torch.Tensor = model(batch["inputs"]).float()
    return images


def build_loss(settings: ReconstructSettings) -> Callable[..., dict[str, torch.Tensor]]:
    """Return what computes the loss of reconstructions, and its parts, of each sample [B]."""
    from models.losses import reconstruction_loss

    assert settings.ssim_weight is not None
    return partial(
        reconstruction_loss,
        alpha=settings.mse_weight,
        beta=settings.ssim_weight,
        multi_scale=settings.multi_scale,
    )


def build_measure(settings: ReconstructSettings, inputs: InputSpec) -> Measure:
    """Return what computes the loss and its parts of each sample of a batch, all of shape [B]."""
    import torch

    from models.losses import psnr

    compute_loss = build_loss(settings)
    alpha, beta = settings.mse_weight, settings.ssim_weight
    has_ssim = min(inputs.shape[1:]) >= SMALLEST_FOR_SSIM

    def measure(model: nn.Module, batch: Batch) -> Batch:
        images = seen = batch["inputs"]
        if model.training and settings.input_noise_std > 0:
            seen = (images + settings.input_noise_std * torch.randn_like(images)).clamp(0, 1)
        kl = None
        if settings.kl_weight > 0:
            reconstructions, kl = model(seen, with_kl=True)
            reconstructions = reconstructions.float()
        else:
            reconstructions = predict(model, {"inputs": seen})
        values = compute_loss(reconstructions, images, with_ssim=has_ssim and not model.training)
        if alpha and beta:
            values["mse_share"] = alpha * values["mse"] / values["loss"].clamp(min=SMALLEST_LOSS)
            values["ssim_share"] = 1 - values["mse_share"]
        if kl is not None:
            values["kl"] = kl.float()
            values["loss"] = values["loss"] + settings.kl_weight * kl.float()
        if not model.training:
            values["psnr"] = psnr(reconstructions, images).clamp(max=LARGEST_PSNR)
        return values

    return measure


def build_task(
    settings: ReconstructSettings, data: DataModule, loader: TrainingLoader | StreamLoader, device: torch.device
) -> Task:
    """Return what preflight must know of reconstruction."""
    from train.engine.contract import Task

    compute_loss = build_loss(settings)

    def load(split: str, indices: torch.Tensor, epoch: int | None) -> Batch:
        if epoch is not None:
            return loader.load(indices, epoch)
        return data.prepare(data.splits()[split].gather(indices), device)

    def loss_of_mean(batch: Batch) -> float:
        images = batch["inputs"]
        return float(compute_loss(images.mean(dim=0, keepdim=True).expand_as(images), images)["loss"].mean())

    return Task(
        splits={"train": data.train, "validation": data.validation},
        load=load,
        predict=predict,
        inputs=("inputs",),
        targets=(),  # the input is the target
        untrained_loss=loss_of_mean,
        constant_loss=loss_of_mean,
        augmented=bool(loader.augmentation),
        overfit_share=0.5,
        overfit_steps=100,
    )


def build_sampler(settings: ReconstructSettings, runtime: Runtime) -> Callable[[nn.Module], torch.Tensor] | None:
    """Return what decodes numbers drawn once from the normal distribution, [32, C, H, W]; of a VAE only."""
    import torch

    from train.engine.tensors import unwrap

    if settings.kl_weight == 0 or runtime.accelerator.is_fsdp2:  # FSDP2 gathers weights in forward only
        return None
    drawn = torch.randn(32, settings.bottleneck, generator=torch.Generator().manual_seed(0)).to(runtime.device)
    return lambda model: unwrap(model).decode(drawn)  # type: ignore[operator]


def main(settings: ReconstructSettings) -> int:
    """Train, or go on training, and return the exit code."""
    from data_modules.augmentation import build_augmentation, check_augmentation
    from data_modules.load import load_data
    from data_modules.loader import EvaluationLoader
    from data_modules.look import look_at_data
    from data_modules.training_loader import build_training_loader
    from train.engine import session as sessions
    from train.engine.adaptation import adapt_model
    from train.engine.checks.subject import Subject
    from train.engine.evaluation import build_score
    from train.engine.gallery import Gallery
    from train.engine.randomness import seed_all
    from train.engine.runtime import start_runtime
    from train.engine.training import carry_out

    check_best_metric(settings, metric_names(settings))
    sessions.check_output(settings)
    runtime = start_runtime(settings)
    augmentation = build_augmentation(settings.augment)
    data = runtime.main_first(lambda: load_data(settings, labelled=False))
    check_augmentation(augmentation, data.inputs)
    for note in data.notes:
        runtime.say(f"{settings.dataset}: {note}")
    settings = settle_on_loss(settings, data.inputs)
    run_name = settings.run_name or sessions.default_run_name(settings, ["reconstruct", Path(settings.dataset).stem])
    settings = dataclasses.replace(settings, run_name=run_name, best_mode=settings.mode)
    seed_all(settings.seed)
    model = build_model(settings, data.inputs)
    adapt_model(settings, runtime, model)

    session = sessions.open_session(settings, runtime, data.describe(), model)
    state = sessions.prepare_state(settings, runtime, session, model)
    place = {"rank": runtime.rank, "num_processes": runtime.num_processes}
    loader = build_training_loader(
        data,
        batch_size=session.batching.batch_size,
        num_slots=session.batching.slots,
        device=runtime.device,
        num_workers=settings.num_workers,
        seed=settings.seed,
        augmentation=augmentation,
        balanced=False,
        place=state.progress.stream,
        remember=lambda place: setattr(state.progress, "stream", place),
        **place,
    )
    measure = build_measure(settings, data.inputs)

    def score(split: Split, gallery: Gallery | None = None) -> Score:
        batches = EvaluationLoader(
            data, split, EVALUATION_BATCH, device=runtime.device, num_workers=settings.num_workers, **place
        )
        return build_score(settings, runtime, measure, batches, gallery)

    task = build_task(settings, data, loader, runtime.device)
    gallery = None
    if session.run is not None and not settings.only_preflight:
        gallery = Gallery(session.run.plots, runtime, state, task, measure, build_sampler(settings, runtime))
    tracker = sessions.start_tracking(settings, runtime, session)
    sessions.show_inputs(runtime, session, partial(look_at_data, data, loader), data.describe_preprocessing())
    runtime.say(f"{settings.dataset}: {loader.num_samples:,} training samples, {data.inputs}")
    runtime.say(f"conv_autoencoder: {sessions.describe_start(runtime, session, model)}")
    subject = Subject(
        settings=settings,
        runtime=runtime,
        session=session,
        state=state,
        loader=loader,
        measure=measure,
        evaluate=score(data.validation, gallery),
        data=data.describe(),
        task=task,
    )
    return carry_out(subject, tracker, None if data.test is None else score(data.test))


def run() -> None:
    """Run from the command line."""
    run_script(main, ReconstructSettings, __doc__ or "", bad_input=DataError)


if __name__ == "__main__":
    run()
