"""Options that several commands take, and the bounds of all of them, one rule for one name."""

from __future__ import annotations

import argparse
import math
from typing import Any, NamedTuple, cast

from verl_vla.config.choices import (
    MOST_EPISODES,
    MOST_PROCESSES,
    MOST_PX,
    MOST_SEED,
    MOST_SLOTS,
    MOST_STEPS,
)
from verl_vla.core.errors import ConfigError

Parser = argparse.ArgumentParser

MOST = 2**31 - 1
"""Bound of whole numbers without one of their own: none counts more than memory could hold."""
LONGEST_PATH = 4096
"""``PATH_MAX`` of Linux, and more than any other word needs."""
OVERRIDES = "overrides"


class Bounds(NamedTuple):
    """Smallest and largest value of an option."""

    least: int
    most: int


POSITIVE = Bounds(1, MOST)
PROCESSES = Bounds(1, MOST_PROCESSES)
PIXELS = Bounds(1, MOST_PX)
SLOTS = Bounds(1, MOST_SLOTS)
EPISODES = Bounds(1, MOST_EPISODES)
BOUNDS = {
    "seed": Bounds(0, MOST_SEED),
    "port": Bounds(0, 65_535),
    "every": POSITIVE,
    "tasks_per_axis": POSITIVE,
    "episode": Bounds(0, MOST),
    "lora_rank": Bounds(0, MOST),
    "curve_groups": Bounds(0, MOST_EPISODES),
    "num_workers": PROCESSES,
    "processes": PROCESSES,
    "num_ranks": PROCESSES,
    "num_nodes": POSITIVE,
    "num_slots": SLOTS,
    "slots": SLOTS,
    "render_size": PIXELS,
    "image_size": PIXELS,
    "steps": Bounds(1, MOST_STEPS),
    "policy_steps": Bounds(1, MOST_STEPS),
    "episodes": EPISODES,
    "episodes_per_task": EPISODES,
    "groups": EPISODES,
    "group_size": EPISODES,
    "groups_per_update": EPISODES,
    "block": EPISODES,
    "rows": EPISODES,
    "batch": EPISODES,
    "update_batch": EPISODES,
    "images": EPISODES,
    "matmul": Bounds(1, 1 << 16),
    "num_views": Bounds(1, 16),
    "chunk_length": Bounds(1, 1 << 10),
}
"""Bounds by the name of an option; what is not here may also be negative."""


def check_words(options: argparse.Namespace) -> None:
    """Refuse numbers out of their bounds, and texts that no file's name can be.

    Raises:
        ConfigError: names the option, its value and what to set instead.
    """
    for name, value in vars(options).items():
        # a recipe has bounds of its own; see `verl_vla.config.compose`
        if name == OVERRIDES:
            continue
        values = cast("list[Any]", value) if isinstance(value, list) else [value]
        for one in values:
            fault = _fault(name, one)
            if fault is not None:
                raise ConfigError(f"--{name.replace('_', '-')} {fault}")


def _fault(name: str, value: object) -> str | None:
    """Return value and remedy of what an option cannot be."""
    if isinstance(value, str) and len(value) > LONGEST_PATH:
        return f"has {len(value):,} characters; write at most {LONGEST_PATH:,}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}, which no check can compare; set a number"
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    least, most = BOUNDS[name] if name in BOUNDS else Bounds(-MOST, MOST)
    if value < least:
        return f"is {value}; set {f'at least {least}' if least else '0 or more'}"
    return f"is {value}; set at most {most:,}" if value > most else None


def add_overrides(parser: Parser) -> None:
    """Add ``recipe=NAME key=value ...``."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="recipe=NAME, then options of the recipe, such as optimizer.lr=1e-5; "
        "`verl-vla recipes` lists recipes, `verl-vla explain recipe=NAME` options",
    )


def add_policy_options(parser: Parser) -> None:
    """Add what is to be known about a policy's folder."""
    add = parser.add_argument
    add("--render-size", type=int, help="side of the camera image, px; the policy's if not given")
    add("--unnorm-key", help="entry of dataset_statistics.json; the suite's if not given")


def add_num_workers(parser: Parser) -> None:
    """Add the number of simulator processes."""
    parser.add_argument("--num-workers", type=int, default=2, help="number of simulator processes")


def add_num_slots(parser: Parser, default: int | None) -> None:
    """Add the number of simulators, shared by the processes."""
    text = "simulator slots: episodes that run at the same time"
    parser.add_argument("--num-slots", type=int, default=default, help=text)
