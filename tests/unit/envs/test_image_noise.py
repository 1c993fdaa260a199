"""Sensor noise: five kinds, each stronger with its number, and the same for the same image."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.ndimage import gaussian_filter

from verl_vla.core.errors import ConfigError
from verl_vla.envs.libero.image_noise import KINDS, STRENGTHS, disturb

SIZE = 96


def scene() -> npt.NDArray[np.uint8]:
    """A checkered plane under a bright sky, with a coloured square."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    image = np.repeat((((rows // 8 + columns // 8) % 2) * 120 + 60)[..., None], 3, axis=2)
    image[: SIZE // 3] = 210
    image[50:70, 30:50] = (200, 30, 40)
    return image.astype(np.uint8)


def distance(first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8]) -> float:
    return float(np.abs(first.astype(int) - second).mean())


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_noise_grows_with_its_strength(kind: int) -> None:
    image = scene()
    weak, middle, strong = (disturb(image, STRENGTHS * kind + s) for s in (1, 5, STRENGTHS))
    assert weak.shape == image.shape
    assert weak.dtype == np.uint8
    assert 0 < distance(weak, image) < distance(middle, image) < distance(strong, image)


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_the_same_image_is_disturbed_in_the_same_way(kind: int) -> None:
    image, noise = scene(), STRENGTHS * kind + 4
    kept = image.copy()
    first = disturb(image, noise)
    np.random.seed(1)
    np.testing.assert_array_equal(disturb(image, noise), first)
    np.testing.assert_array_equal(image, kept)


@pytest.mark.parametrize("kind", [0, 1, 2, 4])
def test_an_even_surface_stays_as_it_is(kind: int) -> None:
    even = np.full((SIZE, SIZE, 3), (90, 140, 200), np.uint8)
    for noise in (STRENGTHS * kind + 1, STRENGTHS * kind + STRENGTHS):
        assert np.abs(disturb(even, noise).astype(int) - even).max() <= 1


def test_gaussian_blur_is_the_one_of_the_name() -> None:
    image = scene()
    expected = gaussian_filter(image / 255.0, (3, 3, 0), mode="nearest") * 255
    np.testing.assert_array_equal(disturb(image, 13), expected.astype(np.uint8))


def test_a_streak_leaves_what_it_cannot_reach() -> None:
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[48, 48] = 255
    rows, columns = np.nonzero(disturb(image, 1).any(axis=2))
    assert len(rows) > 1
    assert np.abs(rows - 48).max() <= 10
    assert np.abs(columns - 48).max() <= 10


def test_glass_takes_pixels_from_near_by_and_keeps_the_border() -> None:
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[:, SIZE // 2 :] = 200
    seen = disturb(image, 43)
    assert (seen[:, :30] < 2).all()
    assert (seen[:, -30:] > 197).all()
    assert len(np.unique(seen[:, SIZE // 2 - 4 : SIZE // 2 + 4])) > 20


def test_fog_lightens_the_dark_and_never_exceeds_white() -> None:
    image = scene()
    for noise in range(31, 41):
        seen = disturb(image, noise)
        assert seen.max() <= image.max()
    dark = np.full((SIZE, SIZE, 3), 20, np.uint8)
    dark[0, 0] = 255
    assert disturb(dark, 35).mean() > dark.mean()


@pytest.mark.parametrize("noise", [0, -1, 51])
def test_an_unknown_noise_is_refused(noise: int) -> None:
    with pytest.raises(ConfigError, match=f"noise is {noise}; choose 1..50"):
        disturb(scene(), noise)
