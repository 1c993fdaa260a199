"""What the encoder of a reward takes: memory of its weights and of a batch, and operations.

As for the policy (`verl_vla.diagnostics.planning.trace`), the real model runs on tensors without
data. Its sizes are those of the folder that the recipe names or, where it is not on this machine,
of the published model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    VJEPA2Config,
    VJEPA2Model,
)

from verl_vla.config.grpo import Recipe
from verl_vla.diagnostics.planning.operators import FLOPS
from verl_vla.diagnostics.planning.trace import RGB, LivingBytes, SameConfig
from verl_vla.policies.base import ModelConfig
from verl_vla.policies.openvla_oft import OpenVLAOFTConfig
from verl_vla.policies.openvla_oft.checkpoint import read_config
from verl_vla.policies.openvla_oft.vision import FusedVisionBackbone
from verl_vla.rewards.encoders import DEVICE, ENCODERS, OWN_PROCESS
from verl_vla.rewards.encoders.network import find_dtype

VIDEO_FRAMES = 64
"""Frames that rewards keep of an episode's video: `rewards/srpo.py`."""
DINOV2_IMAGE = 224
"""Side of the images that DINOv2's published processor makes, pixels."""
PUBLISHED: Mapping[str, Any] = {
    # facebook/vjepa2-vitg-fpc64-384, which SRPO used (arXiv:2511.15605)
    "vjepa2": VJEPA2Config(
        patch_size=16,
        crop_size=384,
        frames_per_clip=64,
        tubelet_size=2,
        hidden_size=1408,
        num_attention_heads=22,
        num_hidden_layers=40,
        mlp_ratio=48 / 11,
    ),
    # facebook/dinov2-large
    "dinov2": Dinov2Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518
    ),
    # google/siglip-so400m-patch14-224
    "siglip": SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    ),
}
"""Sizes of published encoders, from the ``config.json`` on the hub."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderLoad:
    """What the encoder of a reward takes of a process that computes it."""

    weight_bytes: int
    """Bytes of the weights: on the device while it computes, on the host otherwise."""
    batch_bytes: int
    """Peak bytes of one batch, input and activations."""
    image_bytes: int
    """Bytes of the images of one batch as they are sent, uint8."""
    flops: int
    """Operations for the episodes of one round, at most."""
    on_ranks: bool
    """True if every rank computes it; False if a process of its own does."""
    on_device: bool
    """True if it computes on the device of ranks, False on cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """Counts of one forward pass."""

    weights: int
    bytes: int
    flops: int


def encoder_load(recipe: Recipe, config: ModelConfig, policy_steps: int) -> EncoderLoad | None:
    """Count what the encoder of a recipe's reward takes.

    Args:
        recipe: names the reward and its encoder.
        config: configuration of the policy, for ``policy_towers`` and the size of images.
        policy_steps: policy steps of a round, at most.

    Returns:
        None for a reward without encoder, for one without a network, and for an encoder of the
        user's own, whose size is unknown.

    Raises:
        ConfigError: an unknown dtype.
    """
    given, arguments = recipe.reward_args, encoder_arguments(recipe)
    if arguments is None:
        return None
    name = given["encoder"]
    sizes, dtype = _sizes(name, str(arguments["path"]), config), find_dtype(arguments["dtype"])
    episodes = recipe.sampling.groups_per_step * recipe.sampling.group_size
    # with the image after the last step
    images = policy_steps // episodes + 1
    if "video_every" in given and given["video_every"]:
        images = VIDEO_FRAMES
    batch = int(arguments["batch_size"])
    frames = min(images, int(arguments["max_frames"])) if name == "vjepa2" else 1
    if name == "vjepa2":
        # a clip of an odd number repeats its last frame
        frames += -frames % int(sizes.tubelet_size)
    counted = _count(name, SameConfig(sizes), dtype, batch, frames)
    # of clips one an episode, of images all
    rounds = episodes * (1 if name == "vjepa2" else images) / batch
    return EncoderLoad(
        weight_bytes=counted.weights * dtype.itemsize,
        batch_bytes=counted.bytes,
        image_bytes=batch * frames * RGB * config.shape.image_size**2,
        flops=round(counted.flops * rounds),
        on_ranks=not (OWN_PROCESS in arguments and arguments[OWN_PROCESS]),
        on_device=recipe.cluster.device != "cpu" and arguments[DEVICE] != "cpu",
    )


def encoder_arguments(recipe: Recipe) -> dict[str, Any] | None:
    """Return all arguments of the encoder of a recipe's reward; None where `encoder_load` has none.

    What the recipe does not set has the encoder's default.
    """
    given = recipe.reward_args
    name = given["encoder"] if "encoder" in given else None
    if name not in ENCODERS or name == "pixels":
        return None
    own = cast("dict[str, Any]", given["encoder_args"] if "encoder_args" in given else {})
    return _defaults(name) | own


def _defaults(name: str) -> dict[str, Any]:
    parameters = inspect.signature(ENCODERS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _sizes(name: str, path: str, policy: ModelConfig) -> Any:
    """Return the configuration of an encoder: of its folder, or as published."""
    folder = Path(path).expanduser()
    if name == "policy_towers":
        if (folder / "config.json").is_file():
            return read_config(folder)
        return policy if isinstance(policy, OpenVLAOFTConfig) else OpenVLAOFTConfig()
    published = PUBLISHED[name]
    return type(published).from_pretrained(folder) if folder.is_dir() else published


# `find_remedy` plans many recipes with the same encoder
@lru_cache
def _count(name: str, same: SameConfig, dtype: torch.dtype, batch: int, frames: int) -> _Pass:
    """Run a forward pass of one batch."""
    with torch.device("meta"):
        model, run, shape = _build(name, same.config, batch, frames)
    model.to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        # from "meta" to fake tensors of a CPU, whose memory is counted
        model.to_empty(device="cpu").eval()
        known = [*model.parameters(), *model.buffers()]
        # in inference mode a product of matrices would not be seen as one
        with torch.no_grad(), LivingBytes(known, FLOPS) as counted:
            run(torch.empty(shape, dtype=dtype))
    weights = sum(weight.numel() for weight in model.parameters())
    return _Pass(weights=weights, bytes=counted.most, flops=counted.flops)


def _build(
    name: str, config: Any, batch: int, frames: int
) -> tuple[nn.Module, Callable[[Tensor], Any], tuple[int, ...]]:
    """Return an encoder's network, the function that runs it, and the shape of a batch."""
    if name == "vjepa2":
        clips = VJEPA2Model(config)
        side = config.crop_size
        return clips, cast("Any", clips).get_vision_features, (batch, frames, RGB, side, side)
    if name == "policy_towers":
        towers, side = FusedVisionBackbone(config), config.image_size
        return towers, towers, (batch, RGB * towers.num_towers, side, side)
    if name == "siglip":
        siglip, side = SiglipVisionModel(config), config.image_size
        return siglip, partial(siglip, output_hidden_states=True), (batch, RGB, side, side)
    dinov2 = Dinov2Model(config)
    return dinov2, dinov2, (batch, RGB, DINOV2_IMAGE, DINOV2_IMAGE)
