"""QLoRA: 4-bit quantization of the frozen weights under adapters, and its inverse.

The code is NormalFloat of Dettmers et al. 2023 (arXiv 2305.14314), double quantization included, as
bitsandbytes computes it. Needs the extra ``qlora``: import this module only where it is installed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from verl_vla.policies.lora import MakeWeight


def quantize_under_adapters(part: nn.Module, device: torch.device | str | int) -> None:
    """Replace every linear layer under an adapter of ``part`` by its 4-bit form, in place.

    Args:
        part: a model or a part of one; a layer without an adapter is not changed.
        device: device that the 4-bit weights are moved to, one layer at a time.
    """
    # a list, since the loop replaces modules
    for layer in list(part.modules()):
        if isinstance(layer, LoraLayer):
            base: Any = layer.get_base_layer()
            parent: Any = layer
            parent.base_layer = _quantized(base, device)


def plain_weights(model: nn.Module) -> dict[str, MakeWeight]:
    """Return how to make each weight without quantization, equal up to the 4-bit rounding error."""
    state = model.state_dict()
    makes: dict[str, MakeWeight] = {name: partial(_same, w) for name, w in state.items()}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            # also what belongs to the 4 bits, e.g. weight.absmax and weight.quant_map
            for key in [key for key in makes if key.startswith(f"{name}.weight")]:
                del makes[key]
            weight: Any = layer.weight
            makes[f"{name}.weight"] = partial(dequantize_4bit, weight.data, weight.quant_state)
    return makes


def _same(weight: Tensor) -> Tensor:
    return weight


def _quantized(linear: nn.Linear, device: torch.device | str | int) -> Linear4bit:
    """Return the layer with its weight in 4 bits; it computes in the weight's old dtype."""
    weight, bias = linear.weight.data, linear.bias
    # else Linear4bit would first allocate the weight in floats
    with torch.device("meta"):
        layer = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=bias is not None,  # pyright: ignore[reportUnnecessaryComparison]
            compute_dtype=weight.dtype,
            quant_type="nf4",
        )
    make: Any = Params4bit  # pyright does not see the arguments of its `__new__`
    layer.weight = make(weight, requires_grad=False, quant_type="nf4", module=layer)
    layer.bias = bias
    # on a CPU with AVX-512 BF16, bitsandbytes would repack the weight for a rollout, with coarser
    # statistics, so rollout and update would differ
    layer.support_avx512bf16_for_cpu = False
    # moving it is what makes bitsandbytes quantize
    return layer.to(device)
