"""The optimizers of a recipe, over the shards that one rank holds.

bitsandbytes and DeepSpeed know plain tensors, FSDP2 has `DTensor`s: such an optimizer is given
the local part of each weight, which shares its memory, and before a step that of its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch.nn import Parameter
from verl.workers.config import FSDPOptimizerConfig

from verl_vla.trainer.engine.weights import local

CLASSES: dict[str, tuple[str, str]] = {
    "adamw_8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "paged_adamw_8bit": ("bitsandbytes.optim", "PagedAdamW8bit"),
    "deepspeed_cpu_adam": ("deepspeed.ops.adam", "DeepSpeedCPUAdam"),
}
"""Module and class of each ``optimizer.name``. DeepSpeed's class is AdamW by default."""


def build_optimizer(
    weights: Sequence[Parameter], options: FSDPOptimizerConfig
) -> torch.optim.Optimizer:
    """Make the optimizer that ``options.optimizer`` names, over the trained ``weights``."""
    first, second = options.betas
    settings: dict[str, Any] = {
        "lr": options.lr,
        "betas": (first, second),
        "weight_decay": options.weight_decay,
    }
    # torch's own optimizer knows DTensors
    if options.optimizer == "adamw":
        return torch.optim.AdamW(weights, **settings)
    module, name = CLASSES[options.optimizer]
    shards = [Parameter(local(weight.data)) for weight in weights]
    optimizer: torch.optim.Optimizer = getattr(import_module(module), name)(shards, **settings)

    def lend_gradients(*_: Any) -> None:
        for weight, shard in zip(weights, shards, strict=True):
            shard.grad = None if weight.grad is None else local(weight.grad)

    def drop_gradients(*_: Any) -> None:
        for shard in shards:
            # a shard that kept its gradient would hold the memory that zero_grad() gives up
            shard.grad = None

    optimizer.register_step_pre_hook(lend_gradients)
    optimizer.register_step_post_hook(drop_gradients)
    return optimizer


def make_state(optimizer: torch.optim.Optimizer, weights: Sequence[Parameter]) -> None:
    """Give a new optimizer the state that its first step would make, and change no weight.

    It takes a step on gradients of 0 at a rate of 0.
    """
    settings, groups = vars(optimizer), optimizer.param_groups
    rates = [group["lr"] for group in groups]
    # bitsandbytes never gives up paged memory, and this state is dropped soon
    is_paged = "is_paged" in settings and settings["is_paged"]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    for group in groups:
        # AdamW's decay is a multiple of the rate, so it moves no weight either
        group["lr"] = 0.0
    if is_paged:
        settings["is_paged"] = False
    optimizer.step()
    if is_paged:
        settings["is_paged"] = True
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    for weight in weights:
        weight.grad = None
