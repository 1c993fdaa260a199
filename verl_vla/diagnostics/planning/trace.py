"""Weights, bytes and operations of a model, counted by running it on tensors without data.

The real model runs its real forward and backward pass, so nothing here depends on the architecture.
A fake tensor has a shape, a dtype and a lifetime; the bytes of those that exist at the same time
are the memory that the pass needs. Seven billion weights take some seconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
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

from verl_vla.config.choices import LoraTargets
from verl_vla.policies.action_distribution import log_prob
from verl_vla.policies.base import ModelConfig

PROMPT_TOKENS = 38
"""Length of the longest prompt, to which a batch is padded; LIBERO's have 20 to 38 tokens with the
published tokenizer."""
TRACED_POLICY_STEPS = 4
"""Policy steps in the traced pass. Memory is proportional to them, within 3% from 4 to 16 for the
published policy."""
RGB = 3
TEMPERATURE = 1.0
"""Sampling temperature; the operations are the same at any value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """Settings of low-rank adapters, as in the recipe's ``policy``."""

    rank: int
    alpha: int
    targets: LoraTargets


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Counts of one model and of one pass through it."""

    trained: int
    """Number of weights that the optimizer updates."""
    frozen: int
    """Number of all other weights."""
    under_adapters: int
    """Weights of the language model's layers that have adapters, which can be held in 4 bits."""
    layer: int
    """Weights of the largest layer that is a separate FSDP unit."""
    root: int
    """Weights outside such layers, which are gathered for the complete pass."""
    tensor: int
    """Weights of the largest tensor."""
    batch: int
    """Policy steps in the pass."""
    training_bytes: int
    """Peak bytes in forward and backward, without weights and their gradients."""
    forward_bytes: int
    """Peak bytes in a forward pass without gradients."""
    forward_flops: int
    """FLOPs of a forward pass of one policy step; a multiplication and an addition are two. Those
    of attention, about 2%, are only in `verl_vla.diagnostics.planning.kernels`."""
    training_flops: int
    """FLOPs of forward and backward of one policy step, with recomputation."""

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
    autocast: bool = False,
    batch: int = TRACED_POLICY_STEPS,
) -> Trace:
    """Run one forward and backward pass through the model of ``config``.

    Args:
        config: configuration of the policy.
        dtype: dtype of the computation.
        adapters: adapters to add, see `TokenModel.add_adapters`; None to train all weights.
        checkpointing: recompute activations.
        autocast: hold trained weights in float32 and cast them in the training pass, as where FSDP
            does not. A pass without gradients keeps none of what is cast.
        batch: policy steps in the pass.
    """
    return _trace(SameConfig(config), dtype, batch, adapters, checkpointing, autocast)


class SameConfig:
    """A hashable configuration, equal to another one with the same content: a key of the cache."""

    def __init__(self, config: Any) -> None:
        # configurations are compared and hashed by content
        self.config = config
        self._text = config.to_json_string()

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameConfig) and self._text == other._text


@lru_cache
def _trace(
    same: SameConfig,
    dtype: torch.dtype,
    batch: int,
    adapters: Adapters | None,
    checkpointing: bool,
    autocast: bool,
) -> Trace:
    config = same.config
    model = build_model(config, dtype, adapters)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with FakeTensorMode(allow_non_fake_inputs=True):
        # from "meta" to fake tensors of a CPU, whose memory is counted
        model.to_empty(device="cpu").train()
        inputs = empty_inputs(config, dtype, batch)
        with torch.no_grad(), LivingBytes(_held(model, inputs)) as forward:
            model(**inputs)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float() if autocast else weight.data
                # gradients count with the weights, not as a part of the pass
                weight.grad = torch.zeros_like(weight)
        cast = torch.autocast("cpu", dtype, enabled=autocast)
        with cast, LivingBytes(_held(model, inputs)) as training:
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


def _held(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """What is there before a pass: weights, their gradients, buffers and inputs."""
    gradients = [w.grad for w in model.parameters() if w.grad is not None]
    return [*model.parameters(), *gradients, *model.buffers(), *inputs.values()]


def build_model(config: ModelConfig, dtype: torch.dtype, adapters: Adapters | None) -> Any:
    """Build the model of `trace_model`, without data."""
    with torch.device("meta"):
        model: Any = AutoModel.from_config(config)
        if adapters is not None:
            model.add_adapters(rank=adapters.rank, alpha=adapters.alpha, targets=adapters.targets)
    return model.to(dtype)


def empty_inputs(config: ModelConfig, dtype: torch.dtype, batch: int) -> dict[str, Tensor]:
    """Make the inputs of ``batch`` policy steps, for a model's ``forward``."""
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
    """Count weights by their use; the keys are fields of `Trace`."""
    names: set[str] = set(model._no_split_modules)
    # by the names by which FSDP2 is given its parts (`shard`)
    layers = [_size(part) for part in model.modules() if type(part).__name__ in names]
    adapted = [part for part in model.decoder.modules() if isinstance(part, LoraLayer)]
    return {
        "trained": sum(w.numel() for w in model.parameters() if w.requires_grad),
        "frozen": sum(w.numel() for w in model.parameters() if not w.requires_grad),
        "under_adapters": sum(cast(Any, part).get_base_layer().weight.numel() for part in adapted),
        "layer": max(layers),
        "root": _size(model) - sum(layers),
        "tensor": max(weight.numel() for weight in model.parameters()),
    }


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


class LivingBytes(TorchDispatchMode):
    """A dispatch mode that tracks the bytes of new tensors that are still alive, and FLOPs."""

    def __init__(
        self, before: Iterable[Tensor], counts: Mapping[Any, Callable[..., int]] = flop_registry
    ) -> None:
        """Begin to count.

        Args:
            before: tensors that are not the pass's memory.
            counts: function that counts the FLOPs of an operator.
        """
        super().__init__()
        self._counts = counts
        # what was there before the pass is not the pass's memory
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in before)
        self._bytes = 0
        self.most = 0
        """Peak number of bytes."""
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count: Callable[..., int] | None = self._counts.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, Tensor):
                self._note(part.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        # a storage, not a tensor: views share it, and it counts once
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._bytes += size
        self.most = max(self.most, self._bytes)
        # called when the last tensor on it is gone, as memory would be freed
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._bytes -= size
