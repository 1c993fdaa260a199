"""How many weights, bytes and operations a model has, found by running it on tensors without data.

The real model goes through its real forward and backward pass, so nothing here knows what a layer
looks like. A fake tensor has a shape, a type and a lifetime, and the bytes of those that live at
the same time are what the pass would need. Seven billion weights take some seconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoModel

from verl_vla.config.grpo import LoraTargets
from verl_vla.policies.action_distribution import log_prob
from verl_vla.policies.openvla_oft import OpenVLAOFTConfig
from verl_vla.policies.scratch_vla import ScratchVLAConfig

ModelConfig = OpenVLAOFTConfig | ScratchVLAConfig

PROMPT_TOKENS = 32
"""Of a typical instruction; LIBERO's have 20 to 38 with the published tokenizer."""
TRACED_POLICY_STEPS = 4
"""In a pass. What it needs grows evenly with them, to 3% from 4 to 16 of the published policy."""
RGB = 3
TEMPERATURE = 1.0
"""Any; the same operations at each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """Low-rank adapters, as the recipe's ``policy`` names them."""

    rank: int
    alpha: int
    targets: LoraTargets


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One model, and one pass through it."""

    trained: int
    """Weights that the optimizer moves."""
    frozen: int
    """All others."""
    under_adapters: int
    """Weights of the language model's layers that have adapters: those that 4 bits can hold."""
    layer: int
    """Weights of the largest layer that is sharded by itself."""
    root: int
    """Weights of no such layer, which are gathered for the whole pass."""
    batch: int
    """Policy steps in the pass."""
    training_bytes: int
    """Most that lives at once in forward and backward beside weights and their gradients."""
    forward_bytes: int
    """Most that lives at once where nothing is to be learned."""
    forward_flops: int
    """FLOPs of a forward pass of one policy step; a multiplication and an addition are two."""
    training_flops: int
    """Of forward and backward, with what is recomputed."""

    @property
    def weights(self) -> int:
        """All weights, adapters included."""
        return self.trained + self.frozen


def trace_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    adapters: Adapters | None = None,
    checkpointing: bool = False,
    batch: int = TRACED_POLICY_STEPS,
) -> Trace:
    """Run one forward and backward pass through the model of ``config``.

    Args:
        config: of the policy.
        dtype: of the arithmetic.
        adapters: put on the model and trained alone.
        checkpointing: whether activations are recomputed.
        batch: policy steps in the pass.
    """
    return _trace(_Same(config), dtype, batch, adapters, checkpointing)


class _Same:
    """A configuration that equals another one with the same content, so that traces are kept."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._text = config.to_json_string()

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._text == other._text


@lru_cache
def _trace(
    same: _Same, dtype: torch.dtype, batch: int, adapters: Adapters | None, checkpointing: bool
) -> Trace:
    config = same.config
    model = build_model(config, dtype, adapters)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        inputs = _inputs(config, dtype, batch)
        weights = [*model.parameters(), *model.buffers(), *inputs.values()]
        for weight in model.parameters():
            if weight.requires_grad:
                weight.grad = torch.zeros_like(weight)
                weights.append(weight.grad)
        with torch.no_grad(), _Living(weights) as forward:
            model(**inputs)
        with _Living(weights) as training:
            logits = model(**inputs).logits
            log_prob(logits, inputs["action_tokens"], TEMPERATURE).sum().backward()
    counts = count_weights(model)
    return Trace(
        **counts,
        batch=batch,
        training_bytes=training.most,
        forward_bytes=forward.most,
        forward_flops=forward.flops // batch,
        training_flops=training.flops // batch,
    )


def build_model(config: ModelConfig, dtype: torch.dtype, adapters: Adapters | None) -> Any:
    """Build the model without any data, as `trace_model` runs it."""
    with torch.device("meta"):
        model: Any = AutoModel.from_config(config)
        if adapters is not None:
            model.add_adapters(rank=adapters.rank, alpha=adapters.alpha, targets=adapters.targets)
    return model.to(dtype)


def _inputs(config: ModelConfig, dtype: torch.dtype, batch: int) -> dict[str, Tensor]:
    shape = config.shape
    channels = shape.num_views * len(config.towers) * RGB
    proprio = {"proprio": torch.empty(batch, shape.proprio_dim, dtype=dtype)}
    return (proprio if shape.proprio_dim else {}) | {
        "pixel_values": torch.empty(
            batch, channels, shape.image_size, shape.image_size, dtype=dtype
        ),
        "input_ids": torch.empty(batch, PROMPT_TOKENS, dtype=torch.int64),
        "action_tokens": torch.empty(batch, shape.num_tokens, dtype=torch.int64),
    }


def count_weights(model: Any) -> dict[str, int]:
    """Count weights by what becomes of them; the fields of `Trace`."""
    names: set[str] = set(model._no_split_modules)
    layers = [_size(part) for part in model.modules() if type(part).__name__ in names]
    adapted = [part for part in model.decoder.modules() if isinstance(part, LoraLayer)]
    return {
        "trained": sum(w.numel() for w in model.parameters() if w.requires_grad),
        "frozen": sum(w.numel() for w in model.parameters() if not w.requires_grad),
        "under_adapters": sum(cast(Any, part).get_base_layer().weight.numel() for part in adapted),
        "layer": max(layers),
        "root": _size(model) - sum(layers),
    }


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


class _Living(TorchDispatchMode):
    """Adds up what is made while it is entered, and takes off what nobody holds any more."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in before)
        self._bytes = 0
        self.most = 0
        """Bytes, at the worst moment."""
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count: Callable[..., int] | None = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, Tensor):
                self._note(part.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._bytes += size
        self.most = max(self.most, self._bytes)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._bytes -= size
