"""ZeRO stages 1 and 2 of DeepSpeed: optimizer states, and with stage 2 gradients, are spread over the processes.

DeepSpeed cuts the weights of each group, laid end to end, into one flat piece for each process, and so the moments.
Here they get their names and shapes back whenever a checkpoint is made. DeepSpeed is imported only if it was chosen.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, convert_outputs_to_fp32
from torch import nn

from train.engine.errors import UsageError
from train.engine.optimizer import COUNTERS, build_optimizer
from train.engine.settings import TrainSettings


def check_installed() -> None:
    """Refuse to start if the launcher chose DeepSpeed and it is not there.

    Raises:
        UsageError: says what to install.
    """
    if _chosen() and importlib.util.find_spec("deepspeed") is None:
        raise UsageError("the launcher chose DeepSpeed, which is not installed: pip install '.[deepspeed]'")


def check_deepspeed(accelerator: Accelerator) -> None:
    """Refuse what ZeRO cannot do here.

    Raises:
        UsageError: says what to use instead.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        if _chosen():
            raise UsageError(
                "the launcher chose DeepSpeed, but Accelerate would train without it here: it needs GPUs; choose "
                "another file of launch/"
            )
        return
    if accelerator.mixed_precision == "fp16":
        raise UsageError("mixed precision fp16 is not to be had with DeepSpeed: choose bf16 or no")
    zero = zero_settings(accelerator)
    stage = zero.get("stage", 0)
    if stage not in (1, 2):
        raise UsageError(f"DeepSpeed's zero_stage {stage}: choose 1 or 2, or FSDP with fsdp_version: 2")
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        raise UsageError("DeepSpeed's offload_optimizer_device: choose none, or FSDP with fsdp_version: 2")


def zero_settings(accelerator: Accelerator) -> dict[str, Any]:
    """Return what the launcher wants of ZeRO."""
    settings: dict[str, Any] = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    return settings


def _chosen() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


class Zero:
    """What takes the place of gradients and optimizer in the loop.

    `optimizer` is torch's, over the parameters by name. It never takes a step: it has the groups, whose settings hold,
    and between `gather` and `scatter` the whole states.
    """

    def __init__(self, settings: TrainSettings, accelerator: Accelerator, model: nn.Module) -> None:
        """Hand the model to DeepSpeed."""
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.optimizer = build_optimizer(settings, model)
        if accelerator.mixed_precision == "bf16":
            _autocast(model, accelerator.device.type)
        config = {
            "zero_optimization": {key: value for key, value in zero_settings(accelerator).items() if value != "auto"},
            "train_micro_batch_size_per_gpu": 1,  # without meaning: nothing is divided by it
            "managed_gradient_accumulation": False,  # a call of `step` ends a batch, however many passes it had
            "gradient_clipping": settings.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        }
        inner = build_optimizer(settings, model)
        self.engine, self._zero, _, _ = deepspeed.initialize(model=model, optimizer=inner, config=config)

    def step(self) -> torch.Tensor:
        """Clip, and update the weights unless anything is not finite; return the norm of the gradients before."""
        for group, inner in zip(self.optimizer.param_groups, self._zero.param_groups):
            inner.update({key: value for key, value in group.items() if key != "params"})
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), device=self.engine.device)

    def gather(self) -> None:
        """Fill `optimizer` with the whole states; all processes together."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        for group, flat in self._groups():
            for parameter in group["params"] if self._inner.state[flat] else ():
                self.optimizer.state[parameter] = {
                    key: value.clone() if key in COUNTERS else safe_get_full_optimizer_state(parameter, key)
                    for key, value in self._inner.state[flat].items()
                }

    def scatter(self) -> None:
        """Go on from the weights in the model and the states in `optimizer`, which is empty afterwards."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self._zero.refresh_fp32_params()
        states = self.optimizer.state
        for group, flat in self._groups():
            saved = [states[parameter] for parameter in group["params"] if parameter in states]
            self._inner.state[flat] = {
                key: value.clone() if key in COUNTERS else torch.zeros_like(flat)
                for key, value in (saved[0] if saved else {}).items()
            }
        self._link()
        for parameter, values in states.items():
            for key in values.keys() - set(COUNTERS):
                safe_set_full_optimizer_state(parameter, values[key], key)
        states.clear()

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed runs, over one flat parameter for each group."""
        return self._zero.optimizer

    def _groups(self) -> list[tuple[dict[str, Any], torch.Tensor]]:
        return [
            (group, inner["params"][0]) for group, inner in zip(self.optimizer.param_groups, self._inner.param_groups)
        ]

    def _link(self) -> None:
        # DeepSpeed looks for the states of all groups once, after the first group's first step (0.19.8): too early.
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()


def _autocast(model: nn.Module, device_type: str) -> None:
    """Compute in bf16 with weights, gradients and sums in fp32, as on plain processes; DeepSpeed's own rounds them."""
    forward = torch.autocast(device_type, torch.bfloat16)(model.forward)
    model.forward = convert_outputs_to_fp32(forward)
