"""The policy's own vision towers, loaded from a checkpoint folder.

They are a frozen copy: features of towers that are trained along with the policy would not be
comparable with older references. For the same reason their weights are part of the name of the
feature space.

Images that are not of the size that the policy sees are prepared for it as in its fine-tuning.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import safe_open

from verl_vla.core.errors import ConfigError
from verl_vla.core.image_preprocessing import prepare_images
from verl_vla.policies.checkpoint import read_weight_layout, weight_files
from verl_vla.policies.openvla_oft.checkpoint import read_config, read_image_statistics
from verl_vla.policies.openvla_oft.configuration import OpenVLAOFTConfig
from verl_vla.policies.openvla_oft.vision import FusedVisionBackbone
from verl_vla.policies.preprocessing import normalize_image
from verl_vla.rewards.encoders.base import Features, ImageEncoder, Images
from verl_vla.rewards.encoders.network import AUTO, FrozenNetwork, require_folder

VISION_PREFIX = "vision_backbone."
"""Prefix of the names of the towers' weights in a checkpoint."""
Tower = Literal["all", "first", "last"]


class PolicyTowersEncoder(ImageEncoder):
    """An encoder that averages the patch tokens which the policy itself receives."""

    def __init__(
        self,
        path: str,
        *,
        tower: Tower = "all",
        scramble_seed: int | None = None,
        dtype: str = "bfloat16",
        device: str = AUTO,
        batch_size: int = 32,
    ) -> None:
        """Check the folder; the towers, and no more, are read when they are first needed.

        Args:
            path: folder of an OpenVLA-OFT checkpoint.
            tower: tower whose features are used: ``first`` is DINOv2 and ``last`` SigLIP in
                published checkpoints; ``all`` concatenates both.
            scramble_seed: if given, the values of each weight are put in random order: a tower of
                the same scale that has learned nothing, as a control.
            dtype: dtype of the computation.
            device: name of a torch device, or ``auto``.
            batch_size: images per forward pass.

        Raises:
            ConfigError: no such folder, or weights that do not fit its ``config.json``.
        """
        if tower not in ("all", "first", "last"):
            raise ConfigError(f"tower is {tower!r}; choose 'all', 'first' or 'last'")
        folder = require_folder(path, "an OpenVLA-OFT policy")
        config = read_config(folder)
        read = partial(_read_towers, folder, config, scramble_seed)
        self._network = FrozenNetwork(read, dtype=dtype, device=device)
        _require_towers(folder, config)
        self._image_size = config.image_size
        self._statistics = read_image_statistics(folder, len(config.towers))
        widths = [t.hidden_size for t in config.towers]
        # columns of the features, where the towers lie side by side
        ends = np.cumsum(widths)
        self._columns = {
            "all": slice(0, int(ends[-1])),
            "first": slice(0, widths[0]),
            "last": slice(int(ends[-1]) - widths[-1], int(ends[-1])),
        }[tower]
        description = {
            "tower": tower,
            "preprocessing": "prepare_image",
            "dtype": dtype,
            "layer": "last block but one, patch mean",
        }
        super().__init__("policy_towers", description, self._network, batch_size=batch_size)

    @torch.inference_mode()
    def embed(self, images: Images) -> Features:
        """Map [n, H, W, 3] to [n, D]."""
        size = self._image_size
        # of another size: a video's frames, as the camera renders them
        if images.shape[1:3] != (size, size):
            images = prepare_images(images, size=size)
        on_device = torch.from_numpy(np.ascontiguousarray(images)).to(self._network.device)
        pixels = normalize_image(on_device, self._statistics).to(self._network.dtype)
        patches = self._network.module(pixels)
        return patches[..., self._columns].float().mean(dim=1).cpu().numpy()


def _towers_without_data(config: OpenVLAOFTConfig) -> FusedVisionBackbone:
    with torch.device("meta"):
        return FusedVisionBackbone(config)


def _require_towers(folder: Path, config: OpenVLAOFTConfig) -> None:
    """Check that a checkpoint has exactly the weights of its towers; none is read.

    Raises:
        ConfigError: a file is missing or cut off, or a weight is missing or of another shape.
    """
    stored = {
        name.removeprefix(VISION_PREFIX): list(shape)
        for name, (shape, _) in read_weight_layout(folder).items()
        if name.startswith(VISION_PREFIX)
    }
    wanted = {
        name: list(weight.shape)
        for name, weight in _towers_without_data(config).state_dict().items()
    }
    for name in sorted(stored.keys() | wanted.keys()):
        here, there = (of[name] if name in of else "absent" for of in (stored, wanted))
        if here != there:
            raise ConfigError(
                f"the vision towers in {folder} do not fit its config: {VISION_PREFIX}{name} is "
                f"{here} in the files and {there} in the model; take both from one checkpoint"
            )


def _read_towers(
    folder: Path, config: OpenVLAOFTConfig, scramble_seed: int | None, dtype: torch.dtype
) -> FusedVisionBackbone:
    weights: dict[str, torch.Tensor] = {}
    # only the towers: the rest of a policy is far larger
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 -- not a mapping
                if name.startswith(VISION_PREFIX):
                    weight = stored.get_tensor(name)
                    weights[name.removeprefix(VISION_PREFIX)] = weight.to(dtype)
    if scramble_seed is not None:
        # each tensor by itself, so that every layer keeps its scale
        weights = _scramble(weights, scramble_seed)
    towers = _towers_without_data(config)
    # assigned: weights without data cannot be copied into
    towers.load_state_dict(weights, assign=True)
    return towers


def _scramble(weights: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        name: weight.flatten()[torch.randperm(weight.numel(), generator=random)].view(weight.shape)
        for name, weight in weights.items()
    }
