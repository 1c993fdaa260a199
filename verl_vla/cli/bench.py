"""``bench images``: how fast a part is, with all that decides whether two numbers compare.

Prints a table, then one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np

from verl_vla.errors import ConfigError
from verl_vla.observations import Pixels, prepare_images
from verl_vla.provenance import provenance

IMAGE_PACKAGES = ("numpy", "pillow", "scipy", "simplejpeg")
"""What `prepare_images` computes with."""
WARM_UP_ROUNDS = 2
"""Rounds that fill caches and are not counted."""


def run(arguments: Sequence[str]) -> int:
    """Measure, then print the table and the JSON object."""
    options = _parser().parse_args(arguments)
    record = _images(options)
    width = max(map(len, record))
    for name, value in record.items():
        print(f"{name:<{width}}  {_plain(value)}")
    print(json.dumps(record))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m verl_vla bench", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    images = parts.add_parser("images", help="prepare pictures for the policy, one thread")
    add = images.add_argument
    add("--render-size", type=int, default=256, help="height and width of a picture, pixels")
    add("--image-size", type=int, default=224, help="height and width that the policy sees")
    add("--batch", type=int, default=16, help="pictures a round")
    add("--rounds", type=int, default=50, help="how many rounds are measured")
    return parser


def _images(options: argparse.Namespace) -> dict[str, Any]:
    """Time `prepare_images` as fine-tuning's pictures need it: JPEG, Lanczos, centre crop.

    Processor seconds tell what one core can do on a machine that others use too; seconds of the
    clock are given beside them.
    """
    for name in ("render_size", "image_size", "batch", "rounds"):
        if getattr(options, name) < 1:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; set at least 1"
            )
    pictures = _pictures(options.batch, options.render_size)
    load = os.getloadavg()[0]
    clock_s: list[float] = []
    processor_s: list[float] = []
    for _ in range(WARM_UP_ROUNDS + options.rounds):
        clock, processor = time.perf_counter(), time.process_time()
        prepare_images(pictures, size=options.image_size)
        clock_s.append(time.perf_counter() - clock)
        processor_s.append(time.process_time() - processor)
    per_core = [options.batch / seconds for seconds in processor_s[WARM_UP_ROUNDS:]]
    return {
        "bench": "images",
        "images_per_core_second": round(statistics.median(per_core), 1),
        "images_per_core_second_range": [round(min(per_core), 1), round(max(per_core), 1)],
        "images_per_second": round(options.batch / statistics.median(clock_s[WARM_UP_ROUNDS:]), 1),
        "render_size": options.render_size,
        "image_size": options.image_size,
        "batch": options.batch,
        "rounds": options.rounds,
        "threads": 1,
        "load_average": round(load, 1),
        "versions": {name: metadata.version(name) for name in IMAGE_PACKAGES} | provenance(),
    }


def _pictures(count: int, size: int) -> Pixels:
    """Smooth shapes, edges and a little noise, so that JPEG has as much to do as with a scene."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size]
    waves = 128 + 100 * np.sin(x / 17) * np.cos(y / 23)
    pictures = waves[None, :, :, None] + rng.normal(0, 4, (count, size, size, 3))
    pictures[:, size // 4 : size // 2, size // 3 : size // 2] = (200, 30, 60)
    return np.clip(pictures, 0, 255).astype(np.uint8)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    if isinstance(value, list):
        return " to ".join(map(str, value))
    return str(value)
