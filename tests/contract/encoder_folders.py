"""Folders of encoders with random weights in tiny sizes, with the processors of published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    VJEPA2Config,
    VJEPA2Model,
    VJEPA2VideoProcessor,
)

PATCH = 14
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": PATCH,
}
VJEPA: dict[str, Any] = {
    "patch_size": 16,
    "frames_per_clip": 8,
    "tubelet_size": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "mlp_ratio": 2.0,
    "pred_hidden_size": 24,
    "pred_num_attention_heads": 2,
    "pred_num_hidden_layers": 1,
    "pred_num_mask_tokens": 1,
    "pred_mlp_ratio": 2.0,
    "num_pooler_layers": 1,
}
BICUBIC = 3
"""Pillow's number."""


def dinov2_processor(crop: int = 224) -> BitImageProcessor:
    """That of facebook/dinov2-base (256 and 224), and of another size in proportion."""
    return BitImageProcessor(
        size={"shortest_edge": crop * 256 // 224},
        crop_size={"height": crop, "width": crop},
        resample=BICUBIC,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def siglip_processor(size: int = 224) -> SiglipImageProcessor:
    """That of google/siglip-so400m-patch14-224 and -384."""
    return SiglipImageProcessor(
        size={"height": size, "width": size},
        resample=BICUBIC,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def save_dinov2(folder: Path, *, size: int = 28, crop: int = 28, registers: int = 0) -> str:
    vit = VIT | {"image_size": size, "mlp_ratio": 2}
    model: Any = (
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**vit, num_register_tokens=registers))
        if registers
        else Dinov2Model(Dinov2Config(**vit))
    )
    model.save_pretrained(folder)
    dinov2_processor(crop).save_pretrained(folder)
    return str(folder)


def save_siglip(folder: Path, *, size: int = 28) -> str:
    config = SiglipVisionConfig(**VIT, image_size=size, intermediate_size=64)
    SiglipVisionModel(config).save_pretrained(folder)
    siglip_processor(size).save_pretrained(folder)
    return str(folder)


def save_vjepa2(folder: Path, *, crop: int = 32) -> str:
    VJEPA2Model(VJEPA2Config(**VJEPA, crop_size=crop)).save_pretrained(folder)
    VJEPA2VideoProcessor(crop_size=crop).save_pretrained(folder)
    return str(folder)


def smooth_images(num: int, height: int, width: int) -> torch.Tensor:
    """[num, H, W, 3] uint8: random shapes, not noise, in which an error of a resize would drown."""
    generator = torch.Generator().manual_seed(7)
    coarse = 255 * torch.rand(num, 3, 8, 8, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return fine.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
