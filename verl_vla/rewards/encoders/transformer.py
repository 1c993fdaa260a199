"""DINOv2 and SigLIP encoders, with the models and the image processors of transformers.

Images are prepared by the processor that lies beside the weights: for published DINOv2, the shorter
side is resized to 256 and the middle of 224 x 224 cut out (``facebook/dinov2-base``); for SigLIP,
the whole image is resized to the model's square (``google/siglip-so400m-patch14-384``).
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    Dinov2Model,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from verl_vla.core.errors import ConfigError
from verl_vla.rewards.encoders.base import Features, ImageEncoder, Images
from verl_vla.rewards.encoders.network import (
    AUTO,
    FrozenNetwork,
    describe_processor,
    pretrained_network,
    read_processor,
    require_folder,
)

PROCESSOR_FILE = "preprocessor_config.json"
TYPE_KEY = "image_processor_type"
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
PROBE_PX = 256
"""Side of the image by which the size of the model's input is found, as a camera renders it."""


class ProcessedImageEncoder(ImageEncoder):
    """An encoder of single images that its model's own image processor prepares."""

    def __init__(
        self,
        kind: str,
        network: FrozenNetwork,
        processor: Any,
        *,
        layer: str | int,
        dtype: str,
        batch_size: int,
    ) -> None:
        """Make the encoder.

        Args:
            kind: name of the encoder.
            network: network of the encoder.
            processor: image processor of transformers.
            layer: layer whose features are read, a part of the feature space's name.
            dtype: dtype of the computation, a part of the name too.
            batch_size: images per forward pass.
        """
        self._network = network
        self._processor = processor
        description = {
            "preprocessing": describe_processor(processor),
            "dtype": dtype,
            "layer": layer,
        }
        super().__init__(kind, description, network, batch_size=batch_size)

    def pixels(self, images: Images) -> Tensor:
        """Resize, crop and normalise [n, H, W, 3]; return [n, 3, height, width]."""
        channels_first = torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, 1)
        made: Any = self._processor(
            channels_first.to(self._network.device),
            input_data_format="channels_first",
            return_tensors="pt",
        )
        return made["pixel_values"].to(self._network.dtype)


class Dinov2Encoder(ProcessedImageEncoder):
    """An encoder that averages the normed patch tokens of DINOv2's last layer.

    Class and register tokens are left out.
    """

    def __init__(
        self,
        path: str,
        *,
        dtype: str = "bfloat16",
        device: str = AUTO,
        batch_size: int = 32,
    ) -> None:
        """Check the folder; the weights are read when they are first needed.

        Args:
            path: a local folder, or a name on the hub such as ``facebook/dinov2-large``.
            dtype: dtype of the computation.
            device: name of a torch device, or ``auto``.
            batch_size: images per forward pass.

        Raises:
            ConfigError: no such weights, another kind of model, or no image processor whose images
                the model can take.
        """
        folder = require_folder(path, "DINOv2")
        config: Any = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        if config.model_type not in DINO_MODELS:
            raise ConfigError(f"{path} holds a {config.model_type}; encoder dinov2 needs DINOv2")
        processor = _image_processor(folder, "DINOv2")
        self._patch_size = int(config.patch_size)
        height, width = _size_of_input(processor)
        # position embeddings are interpolated, so any number of whole patches will do
        if height % self._patch_size or width % self._patch_size:
            raise ConfigError(
                f"{PROCESSOR_FILE} in {path} makes images of {height} x {width} px; both sides "
                f"must be a multiple of {self._patch_size}, the patch size: change its crop_size"
            )
        model = DINO_MODELS[config.model_type]
        super().__init__(
            "dinov2",
            pretrained_network(folder, model, config, "DINOv2", dtype=dtype, device=device),
            processor,
            layer="last, patch mean",
            dtype=dtype,
            batch_size=batch_size,
        )

    @torch.inference_mode()
    def embed(self, images: Images) -> Features:
        """Map [n, H, W, 3] to [n, D]."""
        pixels = self.pixels(images)
        height, width = (side // self._patch_size for side in pixels.shape[-2:])
        output = self._network.module(pixel_values=pixels)
        # class and register tokens come before the patches
        patches = output.last_hidden_state[:, -height * width :]
        return patches.float().mean(dim=1).cpu().numpy()


class SiglipEncoder(ProcessedImageEncoder):
    """An encoder that averages the patch tokens of SigLIP's second-last block.

    SigLIP-T and OpenVLA read the same layer.
    """

    def __init__(
        self,
        path: str,
        *,
        dtype: str = "bfloat16",
        device: str = AUTO,
        batch_size: int = 32,
    ) -> None:
        """Check the folder; the weights are read when they are first needed.

        Args:
            path: a local folder, or a name on the hub such as ``google/siglip-so400m-patch14-224``.
            dtype: dtype of the computation.
            device: name of a torch device, or ``auto``.
            batch_size: images per forward pass.

        Raises:
            ConfigError: no such weights, another kind of model, or no image processor whose images
                the model can take.
        """
        folder = require_folder(path, "SigLIP")
        found: Any = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        if found.model_type not in SIGLIP_TYPES:
            raise ConfigError(f"{path} holds a {found.model_type}; encoder siglip needs SigLIP")
        # of a folder with both halves of SigLIP, the half of images
        config: Any = SiglipVisionConfig.from_pretrained(folder, local_files_only=True)
        size: int = config.image_size
        processor = _image_processor(folder, "SigLIP")
        height, width = _size_of_input(processor)
        if (height, width) != (size, size):
            raise ConfigError(
                f"{PROCESSOR_FILE} in {path} makes images of {height} x {width} px; the model "
                f"takes {size} x {size}: fetch the file of this model"
            )
        model = SiglipVisionModel
        super().__init__(
            "siglip",
            pretrained_network(folder, model, config, "SigLIP", dtype=dtype, device=device),
            processor,
            layer=SIGLIP_LAYER,
            dtype=dtype,
            batch_size=batch_size,
        )

    @torch.inference_mode()
    def embed(self, images: Images) -> Features:
        """Map [n, H, W, 3] to [n, D]."""
        output = self._network.module(pixel_values=self.pixels(images), output_hidden_states=True)
        return output.hidden_states[SIGLIP_LAYER].float().mean(dim=1).cpu().numpy()


def _image_processor(folder: Path, purpose: str) -> Any:
    return read_processor(folder, [PROCESSOR_FILE], purpose, partial(_read_named, folder))


def _read_named(folder: Path) -> Any:
    # without a name transformers takes the model's usual class, whose statistics are not DINOv2's
    if TYPE_KEY not in json.loads((folder / PROCESSOR_FILE).read_text(encoding="utf-8")):
        raise ValueError(f"it names no {TYPE_KEY}")
    return AutoImageProcessor.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )


def _size_of_input(processor: Any) -> tuple[int, int]:
    """Return height and width of the images that a processor makes, pixels."""
    made = processor(torch.zeros(1, 3, PROBE_PX, PROBE_PX, dtype=torch.uint8), return_tensors="pt")
    height, width = made["pixel_values"].shape[-2:]
    return int(height), int(width)
