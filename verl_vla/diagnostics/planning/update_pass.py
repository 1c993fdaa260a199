"""Operators of one micro-batch of an update and of the optimizer, counted without data.

The policy's real forward and backward pass runs with the loss on fake tensors; so do the clipping
of gradients and AdamW. `verl_vla.diagnostics.planning.operators` counts their operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from verl_vla.config.grpo import ClipRange
from verl_vla.diagnostics.planning.operators import NORMS, Call, Label, OperatorCounts
from verl_vla.diagnostics.planning.trace import (
    PROMPT_TOKENS,
    TEMPERATURE,
    Adapters,
    SameConfig,
    build_model,
    count_weights,
    empty_inputs,
)
from verl_vla.policies.action_distribution import entropy, log_prob
from verl_vla.policies.preprocessing import OPENVLA_IMAGE_STATISTICS, normalize_image
from verl_vla.rl.loss import executed_mask, policy_loss, trajectory_weight

LANGUAGE, VISION, REST = "language model", "vision towers", "projector and head"
"""Parts of a policy."""
IMAGES, LOSS = "images normalized", "loss and entropy"
"""Classes of operators around the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Weights that FSDP2 gathers together."""

    trained: int
    frozen: int
    backward: bool
    """True if they are gathered for the backward pass too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdatePass:
    """Counts of forward and backward over one micro-batch."""

    calls: Mapping[Call, int]
    """Number of each operator."""
    units: Sequence[Unit]
    shapes: Sequence[torch.Size]
    """Shapes of the trained weights."""
    under_adapters: int
    """Weights that can be held in 4 bits; see `verl_vla.diagnostics.planning.trace.Trace`."""


@lru_cache
def count_pass(
    same: SameConfig,
    dtype: torch.dtype,
    rows: int,
    adapters: Adapters | None,
    checkpointing: bool,
    autocast: bool,
) -> UpdatePass:
    """Run one micro-batch of an update, from its images to its gradients.

    Its prompts differ in length, so that attention has a mask. The arguments are those of
    `verl_vla.diagnostics.planning.trace.trace_model`.
    """
    config = same.config
    model = build_model(config, dtype, adapters)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ran: dict[nn.Module, bool] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
        model.to_empty(device="cpu").train()
        for weight in model.parameters():
            if weight.requires_grad and autocast:
                weight.data = weight.data.float()
        inputs = empty_inputs(config, dtype, rows)
        inputs["attention_mask"] = torch.ones(rows, PROMPT_TOKENS, dtype=torch.int64)
        images = torch.empty(rows, *config.shape.image_shape, dtype=torch.uint8)
        counts = stack.enter_context(OperatorCounts(REST))
        _label_modules(model, counts, ran)
        stack.enter_context(torch.autocast("cpu", dtype, enabled=autocast))
        _run_update(model, inputs, images, counts)
    return UpdatePass(
        calls=dict(counts.calls),
        units=[*_units(model, ran)],
        shapes=[weight.shape for weight in model.parameters() if weight.requires_grad],
        under_adapters=count_weights(model)["under_adapters"],
    )


def _run_update(
    model: nn.Module, inputs: dict[str, Tensor], images: Tensor, counts: OperatorCounts
) -> None:
    """Do what a rank does with a micro-batch; `verl_vla.trainer.engine.engine.VLAEngine`."""
    config: Any = model.config
    shape, tokens = config.shape, inputs["action_tokens"]
    statistics = OPENVLA_IMAGE_STATISTICS[-len(config.towers) :]
    with counts.label(Label(REST, IMAGES)):
        inputs["pixel_values"] = normalize_image(images, statistics).flatten(1, 2)
    logits = model(**inputs).logits
    with counts.label(Label(REST, LOSS)):
        log_probs = log_prob(logits, tokens, TEMPERATURE)
        with torch.no_grad():
            entropy(logits.detach(), TEMPERATURE)
        steps = torch.ones(len(tokens), dtype=torch.int64)
        sizes = {"chunk_length": shape.chunk_length, "action_dim": shape.action_dim}
        loss = policy_loss(
            log_probs,
            torch.empty_like(log_probs),
            torch.empty(len(tokens)),
            executed_mask(steps, **sizes),
            trajectory_weight(steps, action_dim=shape.action_dim, num_trajectories=len(tokens)),
            ClipRange(),
        ).loss
    loss.backward()


def _label_modules(model: Any, counts: OperatorCounts, ran: dict[nn.Module, bool]) -> None:
    """Make every module say to which part and class its operators belong, and note what ran."""
    units = set(model._no_split_modules)
    (decoder,) = [name for name, module in model.named_modules() if module is model.decoder]
    for name, module in model.named_modules():
        part = _part(name, decoder)
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
            _hook(module, counts, Label(part, NORMS))
        elif type(module).__name__ in units or module is model.decoder or name.count(".") == 0:
            _hook(module, counts, Label(part))
        if type(module).__name__ in units:
            module.register_forward_hook(lambda unit, _, made: ran.update({unit: _has_grad(made)}))


def _hook(module: nn.Module, counts: OperatorCounts, label: Label) -> None:
    module.register_forward_pre_hook(lambda *_: counts.begin(label))
    # also when a computation ends early, as where activations are computed again
    module.register_forward_hook(lambda *_: counts.end(), always_call=True)


def _part(name: str, decoder: str) -> str:
    """Return the part of a module by its name and that of the decoder."""
    if name == decoder or name.startswith(f"{decoder}."):
        return LANGUAGE
    return VISION if name.startswith("vision") else REST


def _has_grad(made: Any) -> bool:
    return any(part.requires_grad for part in (made if isinstance(made, tuple) else (made,)))


def _units(model: Any, ran: Mapping[nn.Module, bool]) -> Iterable[Unit]:
    """Yield what FSDP2 gathers: layers that run, and what lies outside of all layers."""
    names = set(model._no_split_modules)
    layers = [part for part in model.modules() if type(part).__name__ in names]
    for layer, backward in ran.items():
        yield Unit(**_weights(layer.parameters()), backward=backward)
    inside = {weight for layer in layers for weight in layer.parameters()}
    outside = [weight for weight in model.parameters() if weight not in inside]
    yield Unit(**_weights(outside), backward=True)


def _weights(weights: Iterable[nn.Parameter]) -> dict[str, int]:
    sizes = [(weight.numel(), weight.requires_grad) for weight in weights]
    return {
        "trained": sum(size for size, is_trained in sizes if is_trained),
        "frozen": sum(size for size, is_trained in sizes if not is_trained),
    }


@lru_cache
def count_optimizer(shapes: tuple[torch.Size, ...]) -> tuple[Counter[Call], Counter[Call]]:
    """Count the operators of clipping and of AdamW over weights of these shapes."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = [nn.Parameter(torch.empty(shape)) for shape in shapes]
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        # as torch chooses for tensors on a GPU, DTensors included: a kernel for many tensors
        optimizer = torch.optim.AdamW(weights, lr=1.0, foreach=True)
        with OperatorCounts(REST):
            # makes the state
            optimizer.step()
        with OperatorCounts(REST) as clipped:
            nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
        with OperatorCounts(REST) as stepped:
            optimizer.step()
    return clipped.calls, stepped.calls
