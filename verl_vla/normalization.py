"""From an observation's bytes to the numbers that vision towers were trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from verl_vla.errors import ContractError
from verl_vla.observations import OPENVLA_IMAGE_STATISTICS, ImageStatistics


def normalize_image(
    image: Tensor, statistics: Sequence[ImageStatistics] = OPENVLA_IMAGE_STATISTICS
) -> Tensor:
    """Scale an image once for every vision tower.

    Args:
        image: [..., H, W, 3] uint8, on any device.
        statistics: one per tower, in the order of the towers.

    Returns:
        [..., 3 * towers, H, W] float32, on the device of ``image``.

    Raises:
        ContractError: if ``image`` is not uint8 with three channels last.
    """
    if image.dtype != torch.uint8 or image.dim() < 3 or image.shape[-1] != 3:
        raise ContractError(
            f"an image must be uint8 [..., H, W, 3], got {image.dtype} {list(image.shape)}"
        )
    share = image.movedim(-1, -3).float() / 255
    towers = [
        (share - share.new_tensor(s.mean).view(3, 1, 1)) / share.new_tensor(s.std).view(3, 1, 1)
        for s in statistics
    ]
    return torch.cat(towers, dim=-3)
