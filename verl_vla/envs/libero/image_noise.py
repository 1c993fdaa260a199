"""LIBERO-Plus's sensor noise: five kinds of image corruption, each in ten strengths.

The kinds and their strengths are those of LIBERO-Plus ``envs/env_wrapper.py``, most of which come
from Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (arXiv 1903.12261); the arithmetic is ours, so single pixels differ. The random
numbers are seeded with the image, so that the same moment looks the same in every process.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.ndimage import convolve, gaussian_filter, zoom

from verl_vla.core.errors import ConfigError

Image = npt.NDArray[np.float64]
"""[H, W, 3], 0..1."""

STRENGTHS = 10
MOTION_PX = (
    (5, 2),
    (8, 3),
    (10, 4),
    (12, 5),
    (15, 6),
    (18, 8),
    (20, 10),
    (25, 12),
    (30, 15),
    (35, 20),
)
"""Length of the motion streak and its standard deviation, by strength."""
MOTION_ANGLE_DEG = 45.0
"""Largest angle between a streak and the image's rows."""
ZOOM = (
    (1.11, 0.01),
    (1.16, 0.01),
    (1.21, 0.02),
    (1.26, 0.02),
    (1.31, 0.03),
    (1.36, 0.01),
    (1.41, 0.01),
    (1.46, 0.02),
    (1.51, 0.02),
    (1.56, 0.03),
)
"""End (exclusive) and step of the enlargement factors that are averaged, from 1 on, by strength."""
FOG = (
    (0.5, 3.0),
    (1.0, 2.8),
    (1.5, 2.5),
    (2.0, 2.2),
    (2.5, 2.0),
    (3.0, 1.8),
    (3.5, 1.6),
    (4.0, 1.5),
    (4.5, 1.4),
    (5.0, 1.3),
)
"""Density, and factor by which the clouds' details shrink at each halving of scale, by strength."""
GLASS = (
    (0.5, 1, 3),
    (0.7, 1, 3),
    (0.9, 2, 3),
    (1.0, 2, 2),
    (1.1, 3, 2),
    (1.3, 3, 2),
    (1.5, 4, 2),
    (1.8, 4, 2),
    (2.2, 5, 1),
    (2.5, 5, 1),
)
"""Blur, px; largest shift of a pixel, px; number of repetitions; by strength."""


def disturb(image: npt.NDArray[np.uint8], noise: int) -> npt.NDArray[np.uint8]:
    """Apply one kind of noise to an image [H, W, 3].

    Args:
        image: RGB; H and W are equal.
        noise: 1..10 motion blur, 11..20 Gaussian blur, 21..30 zoom blur, 31..40 fog, 41..50 glass;
            within each kind, the largest number is the strongest.

    Raises:
        ConfigError: there is no such noise.
    """
    if not 1 <= noise <= STRENGTHS * len(KINDS):
        raise ConfigError(f"noise is {noise}; choose 1..{STRENGTHS * len(KINDS)}")
    kind, strength = divmod(noise - 1, STRENGTHS)
    rng = np.random.default_rng(zlib.crc32(image.tobytes()))
    disturbed = KINDS[kind](image / 255.0, strength, rng)
    return (np.clip(disturbed, 0.0, 1.0) * 255.0).astype(np.uint8)


def _motion(image: Image, strength: int, rng: np.random.Generator) -> Image:
    """Blur along a one-sided streak in a random direction, with the weights of half a Gaussian."""
    length, sigma = MOTION_PX[strength]
    angle = math.radians(rng.uniform(-MOTION_ANGLE_DEG, MOTION_ANGLE_DEG))
    along = np.arange(2 * length + 1)
    kernel = np.zeros((4 * length + 1, 4 * length + 1))
    # the streak begins in the middle of the kernel
    rows = np.round(2 * length + along * math.sin(angle)).astype(int)
    columns = np.round(2 * length + along * math.cos(angle)).astype(int)
    # several points of a streak can fall into one cell, where `+=` would count only the last
    np.add.at(kernel, (rows, columns), np.exp(-(along**2) / (2 * sigma**2)))
    kernel /= kernel.sum()
    # cut to what is used, with the middle kept in the middle: less to convolve
    rows_used, columns_used = kernel.any(axis=1), kernel.any(axis=0)
    centred = kernel[np.ix_(rows_used | rows_used[::-1], columns_used | columns_used[::-1])]
    return np.stack(
        [convolve(image[..., c], centred, mode="nearest") for c in range(image.shape[2])], axis=-1
    )


def _gaussian(image: Image, strength: int, rng: np.random.Generator) -> Image:
    return _blur(image, strength + 1.0)


def _zoom(image: Image, strength: int, rng: np.random.Generator) -> Image:
    """Average the image and enlargements of its middle."""
    end, step = ZOOM[strength]
    factors = np.arange(1.0, end, step)
    total = image + sum(_enlarged(image, factor) for factor in factors)
    return total / (len(factors) + 1)


def _fog(image: Image, strength: int, rng: np.random.Generator) -> Image:
    density, fading = FOG[strength]
    brightest = image.max()
    clouds = _clouds(image.shape[0], fading, rng)[..., None]
    # scaled so that the brightest pixel under the thickest cloud keeps its value
    return (image + density * clouds) * brightest / (brightest + density)


def _glass(image: Image, strength: int, rng: np.random.Generator) -> Image:
    """Blur, replace every pixel by one near it, and blur again."""
    sigma, reach, times = GLASS[strength]
    image, size = _blur(image, sigma), image.shape[0]
    # without the border, where a neighbour may not exist
    rows, columns = np.mgrid[reach : size - reach, reach : size - reach]
    for _ in range(times):
        shift = rng.integers(-reach, reach, size=(2, *rows.shape))
        # every pixel is read before any is replaced
        shown = image.copy()
        shown[rows, columns] = image[rows + shift[0], columns + shift[1]]
        image = shown
    return _blur(image, sigma)


KINDS: tuple[Callable[[Image, int, np.random.Generator], Image], ...] = (
    _motion,
    _gaussian,
    _zoom,
    _fog,
    _glass,
)


def _blur(image: Image, sigma: float) -> Image:
    return gaussian_filter(image, (sigma, sigma, 0), mode="nearest")


def _enlarged(image: Image, factor: float) -> Image:
    size = image.shape[0]
    # rounded up, as in LIBERO-Plus's clipped_zoom
    kept = math.ceil(size / factor)
    first = (size - kept) // 2
    middle = image[first : first + kept, first : first + kept]
    large: Image = np.asarray(zoom(middle, (factor, factor, 1), order=1))
    extra = (large.shape[0] - size) // 2
    return large[extra : extra + size, extra : extra + size]


def _clouds(size: int, fading: float, rng: np.random.Generator) -> Image:
    """Make a plasma of values 0..1, [size, size], by midpoint displacement on a torus."""
    # halving the step needs a power of two; the rest is cut off at the end
    side = 1 << math.ceil(math.log2(size))
    field, reach, step = np.zeros((side, side)), 1.0, side
    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]
        # a middle is the mean of its square's four corners
        middles = (corners + np.roll(corners, -1, 0)) / 4
        middles += np.roll(middles, -1, 1)
        field[half::step, half::step] = middles + _displaced(middles.shape, reach, rng)
        centres = field[half::step, half::step]
        # the middle of an edge: the mean of its two ends and of the middles on either side
        right = (corners + np.roll(corners, -1, 1) + centres + np.roll(centres, 1, 0)) / 4
        below = (corners + np.roll(corners, -1, 0) + centres + np.roll(centres, 1, 1)) / 4
        field[::step, half::step] = right + _displaced(right.shape, reach, rng)
        field[half::step, ::step] = below + _displaced(below.shape, reach, rng)
        step, reach = half, reach / fading
    field -= field.min()
    field /= field.max()
    return field[:size, :size]


def _displaced(shape: tuple[int, ...], reach: float, rng: np.random.Generator) -> Image:
    return reach * rng.uniform(-1.0, 1.0, shape)
