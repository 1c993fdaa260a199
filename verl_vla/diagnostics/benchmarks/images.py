"""Benchmark of image preprocessing for the policy: JPEG, Lanczos, centre crop, one thread."""

from __future__ import annotations

import argparse
from importlib import metadata

import numpy as np

from verl_vla.core.image_preprocessing import Pixels, prepare_images
from verl_vla.diagnostics.benchmarks.measuring import (
    Record,
    record,
    require_positive,
    spread,
    take_turns,
    timed,
)

IMAGE_PACKAGES = ("pillow", "scipy", "simplejpeg")
"""Packages that `prepare_images` uses, apart from numpy."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add = parser.add_argument
    add("--render-size", type=int, default=256, help="height and width of an image, pixels")
    add("--image-size", type=int, default=224, help="height and width that the policy sees")
    add("--batch", type=int, default=16, help="images per round")
    add("--rounds", type=int, default=50, help="number of rounds that are measured")


def measure(options: argparse.Namespace) -> Record:
    """Prepare batches of images; processor seconds give the speed of one core."""
    require_positive(options, "render_size", "image_size", "batch", "rounds")
    images = _images(options.batch, options.render_size)
    ways = {"images": lambda: timed(lambda: prepare_images(images, size=options.image_size))}
    taken = take_turns(ways, rounds=options.rounds, warm_up=2)["images"]
    per_core, least, largest = spread([options.batch / s.processor for s in taken], 1)
    results = {
        "images_per_core_second": per_core,
        "images_per_core_second_range": [least, largest],
        "images_per_second": spread([options.batch / s.clock for s in taken], 1)[0],
        "render_size": options.render_size,
        "image_size": options.image_size,
        "batch": options.batch,
        "rounds": options.rounds,
        "threads": 1,
        "versions": {name: metadata.version(name) for name in IMAGE_PACKAGES},
    }
    return record("images", options, results)


def _images(count: int, size: int) -> Pixels:
    """Make images of smooth shapes, edges and noise, as much work for JPEG as a real scene."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size]
    waves = 128 + 100 * np.sin(x / 17) * np.cos(y / 23)
    images = waves[None, :, :, None] + rng.normal(0, 4, (count, size, size, 3))
    images[:, size // 4 : size // 2, size // 3 : size // 2] = (200, 30, 60)
    return np.clip(images, 0, 255).astype(np.uint8)
