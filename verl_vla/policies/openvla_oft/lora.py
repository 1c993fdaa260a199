"""Low-rank adapters on every linear layer, and their way back into the weights.

openvla-oft ``vla-scripts/finetune.py``: PEFT on ``all-linear`` layers, the head and the vision
towers among them, no dropout, the first factor drawn from a normal distribution.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from verl_vla.errors import ConfigError

ADAPTER = "default"
"""PEFT's name for a model's only adapter."""
HEAD = "lm_head"

_BASE = ".base_layer."
_FACTOR = re.compile(rf"\.lora_([AB])\.{ADAPTER}\.weight$")


def add_adapters(model: nn.Module, *, rank: int, alpha: int, seed: int) -> None:
    """Freeze ``model`` and put a trainable adapter beside every linear layer, in place.

    The model computes what it computed before, since every second factor starts at zero.

    Args:
        model: has its weights already.
        rank: of the adapters.
        alpha: an adapter's product is scaled by ``alpha / rank``.
        seed: of the first factors; the process's own random state is left as it was.
    """
    if rank < 1:
        raise ConfigError(f"policy.lora_rank is {rank}; set at least 1, or null to train it all")
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    frozen = {
        name for name in linear if not model.get_submodule(name).weight.requires_grad
    }  # the weights that never run
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=[name for name in linear if name not in frozen],
        init_lora_weights="gaussian",
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def head_rows(head: nn.Linear | LoraLayer, rows: slice) -> Tensor:
    """Rows of a head's weight in float32, its adapter's share included: [rows, D]."""
    if not isinstance(head, LoraLayer):
        return head.weight[rows].float()
    base = head.get_base_layer().weight[rows].float()
    first, second = head.lora_A[ADAPTER].weight, head.lora_B[ADAPTER].weight
    return base + head.scaling[ADAPTER] * (second[rows].float() @ first.float())


def merge_adapters(state: Mapping[str, Tensor], *, rank: int, alpha: int) -> dict[str, Tensor]:
    """Turn the weights of a model with adapters into those of a plain one that answers the same.

    Args:
        state: by name, as `add_adapters` has them.
        rank: of the adapters.
        alpha: see `add_adapters`.
    """
    merged: dict[str, Tensor] = {}
    for name, value in state.items():
        if _FACTOR.search(name):
            continue
        plain = name.replace(_BASE, ".")
        layer = name.removesuffix(f"{_BASE}weight")
        if layer != name:
            first, second = (state[f"{layer}.lora_{f}.{ADAPTER}.weight"] for f in "AB")
            product = second.float() @ first.float()
            value = (value.float() + alpha / rank * product).to(value.dtype)
        merged[plain] = value
    return merged
