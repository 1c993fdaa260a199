"""The random changes of an image in published fine-tuning, reproducible sample by sample.

openvla-oft ``prismatic/vla/datasets/datasets.py``, `RLDSDataset`, carried out by dlimp
(``dlimp/augmentations.py``) with TensorFlow's operations on float32 in 0..1. Here they are torch's;
the numbers that they draw come from numpy, so that they are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CROP_AREA = 0.9
"""Share of the area that a crop keeps; an evaluation keeps the centre of this share."""
BRIGHTNESS = 0.2
"""Largest change of every value, of 1."""
CONTRAST = (0.8, 1.2)
"""Factors of the distance from each channel's mean."""
SATURATION = (0.8, 1.2)
"""Factors of the saturation."""
HUE = 0.05
"""Largest turn of the hue, of a whole turn."""
STREAM = 2
"""Keeps these numbers apart from what else is sampled from the same seed."""
TO_BYTE = 255.5
"""TensorFlow's ``convert_image_dtype(saturate=True)`` multiplies by it and cuts off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One draw of every random number."""

    offset: float
    """Of the crop from the top and from the left, of a side: dlimp draws both from one seed, so a
    crop always lies on the diagonal."""
    brightness: float
    contrast: float
    saturation: float
    hue: float

    @classmethod
    def draw(cls, seed: Sequence[int]) -> Change:
        """Draw uniformly within the published bounds; a pure function of ``seed``."""
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
        change: what to do.

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
    """Split [..., 3] RGB in 0..1 into hue (a share of the turn), saturation and value, [...]."""
    red, green, blue = pixels.unbind(-1)
    value = pixels.amax(-1)
    spread = value - pixels.amin(-1)
    one = torch.ones_like(spread)
    divisor = torch.where(spread > 0, spread, one)
    sixth = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    saturation = spread / torch.where(value > 0, value, one)
    return (sixth / 6) % 1, saturation, value


def from_hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Undo `to_hsv`: [..., 3]."""
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
    """Cut a square share of the area out of [H, W, 3] and enlarge it again, bilinearly.

    ``tf.image.crop_and_resize``: the corners of the crop become the corners of the result.
    """
    for dim in (0, 1):
        size = pixels.shape[dim]
        position = (offset + CROP_AREA**0.5 * torch.linspace(0, 1, size)) * (size - 1)
        below = position.floor().long().clamp(max=size - 2)
        part = (position - below).reshape([-1 if d == dim else 1 for d in range(3)])
        low, high = pixels.index_select(dim, below), pixels.index_select(dim, below + 1)
        pixels = low + (high - low) * part
    return pixels
