"""Pictures of reconstructions: the same samples at every evaluation, and the worst of all. Legend: N images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from train.engine.contract import Measure, Slot, Task
from train.engine.errors import TrainingError
from train.engine.plots import draw_images
from train.engine.runtime import Runtime
from train.engine.state import RunState

SHOWN = 8  # samples at equal distances over validation
WORST = 16
CAPTIONS = {"psnr": "{:.1f} dB", "ssim": "ssim {:.2f}", "loss": "loss {:.3g}"}  # as far as they are measured


class Gallery:
    """Watches an evaluation, and draws when it is over. All processes call its methods together.

    Args:
        folder: of the pictures.
        runtime: of this start.
        state: of the run; tells the step.
        task: loads samples and gives the model's answer to them, images in [0, 1].
        measure: the script's.
        sample: makes images out of nothing, for a picture of them; None where the model cannot.
    """

    def __init__(
        self,
        folder: Path,
        runtime: Runtime,
        state: RunState,
        task: Task,
        measure: Measure,
        sample: Callable[[nn.Module], torch.Tensor] | None = None,
    ) -> None:
        self._folder = folder
        self._runtime = runtime
        self._state = state
        self._task = task
        self._measure = measure
        self._sample = sample
        self._losses = torch.zeros(0)
        self._images = torch.zeros(0)

    def watch(self, slot: Slot, values: Mapping[str, torch.Tensor]) -> None:
        """Remember the samples with the largest losses."""
        # A loss that is no number is the worst of all.
        losses, images = (
            values["loss"][: slot.count].float().nan_to_num(nan=torch.inf),
            slot.batch["inputs"][: slot.count],
        )
        highest = losses.topk(min(WORST, len(losses))).indices
        found, pictures = losses[highest].cpu(), images[highest].float().cpu()
        losses = torch.cat([self._losses, found])
        images = torch.cat([self._images, pictures]) if len(self._images) else pictures
        kept = losses.topk(min(WORST, len(losses))).indices
        self._losses, self._images = losses[kept], images[kept]

    def draw(self, model: nn.Module) -> None:
        """Draw the pictures of this step.

        Raises:
            TrainingError: on all processes, if they cannot be written.
        """
        step = self._state.progress.step
        validation = len(self._task.splits["validation"])
        places = torch.arange(min(SHOWN, validation)) * (validation - 1) // max(1, min(SHOWN, validation) - 1)
        same = self._task.load("validation", places, None)
        self._draw(model, same["inputs"], self._folder / "reconstructions" / f"step_{step:08d}.png")
        self._draw(model, self._worst_of_all(), self._folder / "worst.png")
        if self._sample is not None:
            with torch.no_grad():
                samples = self._sample(model).float().cpu()
            rows = [("", part) for part in samples.split(SHOWN)]
            self._write(self._folder / "samples" / f"step_{step:08d}.png", rows, [])

    def _worst_of_all(self) -> torch.Tensor:
        """Return the images with the largest losses over all processes, the worst first, and forget them."""
        missing = WORST - len(self._losses)  # every process sends as many
        losses = torch.cat([self._losses, torch.full((missing,), -torch.inf)])
        images = torch.cat([self._images, torch.zeros(missing, *self._images.shape[1:])])
        everyone, pictures = torch.cat(self._runtime.gather(losses)), torch.cat(self._runtime.gather(images))
        self._losses, self._images = torch.zeros(0), torch.zeros(0)
        order = everyone.argsort(descending=True)[:WORST]
        return pictures[order[everyone[order] > -torch.inf]].to(self._runtime.device)

    def _draw(self, model: nn.Module, images: torch.Tensor, path: Path) -> None:
        was_training = model.training
        model.eval()
        with torch.no_grad():
            answers = self._task.predict(model, {"inputs": images})
            values = self._measure(model, {"inputs": images})
        model.train(was_training)
        captions = [
            "  ".join(text.format(float(values[name][place])) for name, text in CAPTIONS.items() if name in values)
            for place in range(len(images))
        ]
        images, answers = images.float().cpu(), answers.float().cpu()
        errors = (images - answers).abs().mean(dim=1, keepdim=True).expand_as(images)
        rows = [("original", images), ("reconstruction", answers), ("error x 4", (errors * 4).clamp(max=1))]
        self._write(path, rows, captions)

    def _write(self, path: Path, rows: Sequence[tuple[str, torch.Tensor]], captions: Sequence[str]) -> None:
        def work() -> None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                draw_images(path, rows, captions)
            except OSError as error:
                raise TrainingError(f"{path}: cannot be written ({error.strerror or error})") from error

        self._runtime.on_main(work)
