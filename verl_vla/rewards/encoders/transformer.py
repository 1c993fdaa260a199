"""DINOv2 and SigLIP encoders, with the models of transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Dinov2Model, Dinov2WithRegistersModel, SiglipVisionModel
from transformers.models.auto.configuration_auto import AutoConfig

from verl_vla.core.errors import ConfigError
from verl_vla.policies.preprocessing import SIGLIP_STATISTICS, ImageStatistics
from verl_vla.rewards.encoders.base import (
    Features,
    ImageEncoder,
    Images,
    Network,
    name_space,
    require_folder,
)

IMAGENET_STATISTICS = ImageStatistics(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""Pixel statistics of torchvision, with which DINOv2 was trained."""
DINO_MODELS: dict[str, Any] = {
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
}
"""Model class by the ``model_type`` of ``config.json``."""
SIGLIP_LAYER = -2
"""Index of the hidden states that are read. OpenVLA reads SigLIP before its last block, without the
final norm (openvla-oft ``prismatic/extern/hf/modeling_prismatic.py``), and SigLIP-T took its
features there."""
SIGLIP_TYPES = ("siglip", "siglip_vision_model")


class Dinov2Encoder(ImageEncoder):
    """An encoder that averages the normed patch tokens of DINOv2's last layer.

    Class and register tokens are left out.
    """

    def __init__(
        self,
        path: str,
        *,
        image_size: int = 224,
        dtype: str = "bfloat16",
        device: str = "cpu",
        batch_size: int = 32,
    ) -> None:
        """Load the weights.

        Args:
            path: a local folder, or a name on the hub such as ``facebook/dinov2-large``.
            image_size: side that images are resized to, a multiple of the patch size. Position
                embeddings are interpolated to it.
            dtype: dtype of the computation.
            device: name of a torch device.
            batch_size: images per forward pass.

        Raises:
            ConfigError: no such weights, another kind of model, or an impossible size.
        """
        folder = require_folder(path, "DINOv2")
        config: Any = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        if config.model_type not in DINO_MODELS:
            raise ConfigError(f"{path} holds a {config.model_type}; encoder dinov2 needs DINOv2")
        if image_size < 1 or image_size % config.patch_size:
            raise ConfigError(
                f"image_size is {image_size}; it must be a multiple of {config.patch_size}"
            )
        model: Any = DINO_MODELS[config.model_type].from_pretrained(folder, local_files_only=True)
        description = {"image_size": image_size, "dtype": dtype, "layer": "last, patch mean"}
        self._network = Network(
            model,
            image_size=image_size,
            statistics=[IMAGENET_STATISTICS],
            dtype=dtype,
            device=device,
        )
        self._num_patches = (image_size // config.patch_size) ** 2
        space = name_space("dinov2", description, model)
        super().__init__(batch_size=batch_size, feature_space=space)

    @torch.inference_mode()
    def embed(self, images: Images) -> Features:
        """Map [n, H, W, 3] to [n, D]."""
        output = self._network.module(pixel_values=self._network.pixels(images))
        # class and register tokens come before the patches
        patches = output.last_hidden_state[:, -self._num_patches :]
        return patches.float().mean(dim=1).cpu().numpy()


class SiglipEncoder(ImageEncoder):
    """An encoder that averages the patch tokens of SigLIP's second-last block.

    SigLIP-T and OpenVLA read the same layer.
    """

    def __init__(
        self,
        path: str,
        *,
        dtype: str = "bfloat16",
        device: str = "cpu",
        batch_size: int = 32,
    ) -> None:
        """Load the weights.

        Args:
            path: a local folder, or a name on the hub such as ``google/siglip-so400m-patch14-224``.
            dtype: dtype of the computation.
            device: name of a torch device.
            batch_size: images per forward pass.

        Raises:
            ConfigError: no such weights, or another kind of model.
        """
        folder = require_folder(path, "SigLIP")
        found: Any = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        if found.model_type not in SIGLIP_TYPES:
            raise ConfigError(f"{path} holds a {found.model_type}; encoder siglip needs SigLIP")
        model: Any = SiglipVisionModel.from_pretrained(folder, local_files_only=True)
        size: int = model.config.image_size
        description = {"image_size": size, "dtype": dtype, "layer": SIGLIP_LAYER}
        self._network = Network(
            model, image_size=size, statistics=[SIGLIP_STATISTICS], dtype=dtype, device=device
        )
        space = name_space("siglip", description, model)
        super().__init__(batch_size=batch_size, feature_space=space)

    @torch.inference_mode()
    def embed(self, images: Images) -> Features:
        """Map [n, H, W, 3] to [n, D]."""
        output = self._network.module(
            pixel_values=self._network.pixels(images), output_hidden_states=True
        )
        return output.hidden_states[SIGLIP_LAYER].float().mean(dim=1).cpu().numpy()
