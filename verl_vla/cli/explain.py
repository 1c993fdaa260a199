"""``explain recipe=NAME key=value ...``: print every option with value, origin and meaning."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator
from typing import Any

from verl_vla.config.compose import RECIPES_FOLDER, Composition, compose_recipe, leaves
from verl_vla.config.grpo import Recipe
from verl_vla.config.schema import meanings, parse

DEFAULT = "default"
WIDTH = 100
"""Width of a line in columns."""


def run(options: argparse.Namespace) -> int:
    """Print three or more lines per option; this works without the policy and simulators."""
    composition = compose_recipe(options.overrides, RECIPES_FOLDER)
    recipe = parse(Recipe, composition.values)
    for group, file in composition.choices.items():
        print(f"{group}={file}")
    for name, value, origin, meaning in explain(recipe, composition):
        print(f"\n{name} = {_plain(value)}    [{origin}]")
        print(textwrap.fill(meaning, WIDTH, initial_indent="    ", subsequent_indent="    "))
    return 0


def explain(recipe: Recipe, composition: Composition) -> Iterator[tuple[str, Any, str, str]]:
    """Yield each option's name, value, origin and meaning, in the order of `Recipe`.

    The sections ``reward_args`` and ``verl`` hold options that are defined elsewhere; each of their
    entries is listed, with the meaning of the section.
    """
    values = recipe.as_dict()
    for option, meaning in meanings(Recipe):
        value: Any = values
        for key in option.split("."):
            value = value[key]
        for name, entry in leaves(value, option):
            yield name, entry, _origin(name, composition), meaning


def _origin(name: str, composition: Composition) -> str:
    """Return the origin of an option's value, or of a section around it that was set as a unit."""
    parts = name.split(".")
    # the longest name first: a file may set a section, and the command line one option of it
    for length in range(len(parts), 0, -1):
        key = ".".join(parts[:length])
        if key in composition.origins:
            return composition.origins[key]
    return DEFAULT


def _plain(value: Any) -> str:
    """Format a value as it is written on the command line."""
    if value is None:
        return "null"
    # before str(): Python's True is not what YAML and the command line write
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(_plain, value))}]"
    return str(value)
