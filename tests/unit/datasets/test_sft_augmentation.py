"""The published random changes of an image: their formulas, bounds and seeds."""

from __future__ import annotations

import colorsys
from dataclasses import replace

import numpy as np
import pytest
import torch

from verl_vla.core.image_preprocessing import prepare_image
from verl_vla.datasets.augmentation import Change, augment, from_hsv, to_hsv

NOTHING = Change(offset=(1 - 0.9**0.5) / 2, brightness=0.0, contrast=1.0, saturation=1.0, hue=0.0)
"""A crop of the centre and nothing else."""


def make_image(size: int = 56) -> torch.Tensor:
    """Smooth colours, so that a shifted crop changes every pixel a little."""
    x = torch.linspace(0, 3, size)
    waves = [torch.sin(x[:, None] * f + x[None] * g) for f, g in ((1, 2), (2, 1), (3, 0.5))]
    return ((torch.stack(waves, -1) * 0.4 + 0.5) * 255).to(torch.uint8)


def test_hue_saturation_and_value_are_those_of_the_standard_library() -> None:
    colours = torch.rand(200, 3, generator=torch.Generator().manual_seed(0))
    colours[:3] = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0.3, 0.3, 0.3]])
    found = torch.stack(to_hsv(colours), -1)
    wanted = torch.tensor([colorsys.rgb_to_hsv(*c.tolist()) for c in colours])
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(from_hsv(*found.unbind(-1)), colours, atol=1e-5)


def test_the_middle_crop_is_the_crop_of_evaluations() -> None:
    image = make_image()
    wanted = prepare_image(image.numpy(), size=56, jpeg=False, crop_area=0.9)
    difference = augment(image, NOTHING).int() - torch.from_numpy(wanted).int()
    assert difference.abs().max() <= 1


def test_every_change_does_what_it_says() -> None:
    image = make_image()
    plain = augment(image, NOTHING).float() / 255
    brighter = augment(image, replace(NOTHING, brightness=0.1)).float() / 255
    assert torch.allclose(brighter, (plain + 0.1).clamp(max=1), atol=0.01)
    flatter = augment(image, replace(NOTHING, contrast=0.8)).float() / 255
    mean = plain.mean(dim=(0, 1))
    assert torch.allclose(flatter, (plain - mean) * 0.8 + mean, atol=0.01)
    greyer = torch.stack(to_hsv(augment(image, replace(NOTHING, saturation=0.8)).float() / 255))
    before = torch.stack(to_hsv(plain))
    clear = before[2] > 0.2
    assert torch.allclose(greyer[1][clear], before[1][clear] * 0.8, atol=0.03)
    turned = torch.stack(to_hsv(augment(image, replace(NOTHING, hue=0.05)).float() / 255))
    vivid = clear & (before[1] > 0.3)
    turn = (turned[0] - before[0] - 0.05 + 0.5) % 1 - 0.5
    assert turn[vivid].abs().max() < 0.03
    assert torch.equal(augment(image, replace(NOTHING, offset=0.0))[0, 0], image[0, 0])


def test_a_grey_image_keeps_its_hue_and_has_no_nan() -> None:
    grey = torch.full((8, 8, 3), 128, dtype=torch.uint8)
    changed = augment(grey, replace(NOTHING, saturation=1.2, hue=0.05))
    assert torch.equal(changed, grey)
    black = torch.zeros((8, 8, 3), dtype=torch.uint8)
    assert torch.equal(augment(black, replace(NOTHING, hue=-0.05)), black)


def test_draws_fill_the_published_bounds_and_belong_to_their_seed() -> None:
    draws = [Change.draw([7, n]) for n in range(2000)]
    bounds = {
        "offset": (0.0, 1 - 0.9**0.5),
        "brightness": (-0.2, 0.2),
        "contrast": (0.8, 1.2),
        "saturation": (0.8, 1.2),
        "hue": (-0.05, 0.05),
    }
    for name, (low, high) in bounds.items():
        values = np.array([getattr(draw, name) for draw in draws])
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
    assert Change.draw([7, 3]) == draws[3]
    assert Change.draw([8, 3]) != draws[3]
    image = make_image()
    assert torch.equal(augment(image, draws[5]), augment(image, draws[5]))
    assert not torch.equal(augment(image, draws[5]), augment(image, draws[6]))
