"""Image augmentation of the published fine-tuning, reproducible per sample.

Source: openvla-oft ``prismatic/vla/datasets/datasets.py``, `RLDSDataset`, which uses dlimp
(``dlimp/augmentations.py``) with TensorFlow's operations on float32 in 0..1. Here the operations
are torch's, and the random numbers come from numpy, so that they are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CROP_AREA = 0.9
"""Share of the area that a crop keeps; an evaluation uses a centre crop of the same area."""
BRIGHTNESS = 0.2
"""Largest change of brightness; pixel values are 0 to 1."""
CONTRAST = (0.8, 1.2)
"""Range of the factor on the distance from each channel's mean."""
SATURATION = (0.8, 1.2)
"""Range of the factor on the saturation."""
HUE = 0.05
"""Largest change of the hue, as a share of a full turn."""
STREAM = 2
"""Random stream of the augmentations, distinct from other streams of the same seed."""
TO_BYTE = 255.5
"""Factor of TensorFlow's ``convert_image_dtype(saturate=True)``, which then truncates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Random parameters of one augmentation."""

    offset: float
    """Offset of the crop from the top and from the left, as a share of the side: dlimp samples both
    with one seed, so a crop always lies on the diagonal."""
    brightness: float
    contrast: float
    saturation: float
    hue: float

    @classmethod
    def draw(cls, seed: Sequence[int]) -> Change:
        """Sample uniformly within the published bounds; a pure function of ``seed``."""
        share = np.random.default_rng([STREAM, *seed]).random(5)
        return cls(
            offset=share[0] * (1 - CROP_AREA**0.5),
            brightness=(2 * share[1] - 1) * BRIGHTNESS,
            contrast=CONTRAST[0] + share[2] * (CONTRAST[1] - CONTRAST[0]),
            saturation=SATURATION[0] + share[3] * (SATURATION[1] - SATURATION[0]),
            hue=(2 * share[4] - 1) * HUE,
        )


def augment(image: Tensor, change: Change) -> Tensor:
    """Crop, then change brightness, contrast, saturation and hue, in this order.

    Args:
        image: [H, W, 3] uint8.
        change: parameters of the augmentation.

    Returns:
        [H, W, 3] uint8.
    """
    pixels = _crop(image.float() / 255, change.offset)
    pixels = (pixels + change.brightness).clamp(0, 1)
    mean = pixels.mean(dim=(0, 1))
    pixels = ((pixels - mean) * change.contrast + mean).clamp(0, 1)
    hue, saturation, value = to_hsv(pixels)
    saturation = (saturation * change.saturation).clamp(0, 1)
    pixels = from_hsv((hue + change.hue) % 1, saturation, value).clamp(0, 1)
    return (pixels * TO_BYTE).clamp(max=255).to(torch.uint8)


def to_hsv(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Convert [..., 3] RGB in 0..1 into hue (share of a full turn), saturation and value, [...]."""
    red, green, blue = pixels.unbind(-1)
    value = pixels.amax(-1)
    spread = value - pixels.amin(-1)
    one = torch.ones_like(spread)
    # grey has no hue, so any divisor will do
    divisor = torch.where(spread > 0, spread, one)
    sixth = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    saturation = spread / torch.where(value > 0, value, one)
    # between red and magenta the hue comes out negative
    return (sixth / 6) % 1, saturation, value


def from_hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Convert hue, saturation and value back to RGB, [..., 3]."""
    sixth = hue[..., None] * 6
    # each channel's distance around the circle from the hue where it is strongest
    around = torch.stack(
        [
            (sixth[..., 0] - 3).abs() - 1,
            2 - (sixth[..., 0] - 2).abs(),
            2 - (sixth[..., 0] - 4).abs(),
        ],
        dim=-1,
    ).clamp(0, 1)
    return ((around - 1) * saturation[..., None] + 1) * value[..., None]


def _crop(pixels: Tensor, offset: float) -> Tensor:
    """Crop `CROP_AREA` of [H, W, 3] and resize it to the old size, bilinearly.

    As in ``tf.image.crop_and_resize``, corners of the crop become corners of the result.
    """
    for dim in (0, 1):
        size = pixels.shape[dim]
        # the first and the last lie on the crop's corner pixels, not between them
        position = (offset + CROP_AREA**0.5 * torch.linspace(0, 1, size)) * (size - 1)
        # the last position lies on a pixel that has none after it
        below = position.floor().long().clamp(max=size - 2)
        part = (position - below).reshape([-1 if d == dim else 1 for d in range(3)])
        low, high = pixels.index_select(dim, below), pixels.index_select(dim, below + 1)
        pixels = low + (high - low) * part
    return pixels
