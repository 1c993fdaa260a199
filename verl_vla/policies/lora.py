"""LoRA adapters on linear layers, and merging them into the weights.

Source: openvla-oft ``vla-scripts/finetune.py``: PEFT on ``all-linear`` layers, no dropout, the
first factor sampled from a normal distribution.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

ADAPTER = "default"
"""PEFT's name for a model's only adapter."""
ADAPTER_MARK = "lora_"
"""Part of the names of all weights that PEFT adds."""
MakeWeight = Callable[[], Tensor]
"""Function that makes one weight, so that not all of a model's need to exist at once."""


def add_adapters(part: nn.Module, *, rank: int, alpha: int) -> None:
    """Freeze ``part`` and add a trainable adapter to every trained linear layer, in place.

    The outputs do not change, since every second factor starts at zero.

    Args:
        part: a model or a part of one; layers that are frozen already get no adapter.
        rank: rank of the adapters.
        alpha: numerator of the adapters' scale, ``alpha / rank``.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=[
            name
            for name, layer in part.named_modules()
            if isinstance(layer, nn.Linear) and layer.weight.requires_grad
        ],
        init_lora_weights="gaussian",
    )
    inject_adapter_in_model(config, part)


@contextmanager
def without_adapters(model: nn.Module) -> Generator[None]:
    """Disable a model's adapters while the block runs."""
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    # by the scale, which `head_rows` reads too; PEFT's own switch also takes their gradients away
    scales = [layer.scaling[ADAPTER] for layer in layers]
    for layer in layers:
        layer.scaling[ADAPTER] = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER] = scale


def head_rows(head: nn.Linear, rows: slice) -> Tensor:
    """Return rows of a linear layer's weight, its adapter merged: [rows, D] float32."""
    layer: Any = head  # PEFT replaces a linear layer by one of its layers
    if not isinstance(layer, LoraLayer):
        return head.weight[rows].float()
    base: Any = layer.get_base_layer()
    factors: Any = (layer.lora_A, layer.lora_B)
    first, second = (factor[ADAPTER].weight for factor in factors)
    # rows first: the product of all of them is as large as the head itself
    change = layer.scaling[ADAPTER] * (second[rows].float() @ first.float())
    return base.weight[rows].float() + change


def merge_adapters(model: nn.Module, weights: Mapping[str, MakeWeight]) -> dict[str, MakeWeight]:
    """Return how to make the weights of a model without adapters that computes the same.

    Args:
        model: the model, which tells which layers have adapters.
        weights: how to make each of its weights, complete and not a shard, by name.
    """
    merged = dict(weights)
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        first, second = (merged.pop(f"{name}.lora_{f}.{ADAPTER}.weight") for f in "AB")
        # weight and bias: PEFT has put both below its layer
        for base in [key for key in merged if key.startswith(f"{name}.base_layer.")]:
            merged[base.replace(".base_layer.", ".")] = merged.pop(base)
        plain = merged[f"{name}.weight"]
        merged[f"{name}.weight"] = partial(
            merge_factors, plain, first, second, layer.scaling[ADAPTER]
        )
    return merged


def merge_factors(plain: MakeWeight, first: MakeWeight, second: MakeWeight, scale: float) -> Tensor:
    """Add ``scale * second @ first`` to a weight, which keeps its dtype."""
    weight, change = plain(), scale * (second().float() @ first().float())
    # added in float32: the change can be smaller than one step of bfloat16
    return (weight.float() + change).to(weight.dtype)


def nf4() -> Any:
    """Import and return `verl_vla.policies.quantization`, which needs the extra ``qlora``."""
    return importlib.import_module("verl_vla.policies.quantization")
