"""``recipes``: list the recipes that come with the project, of training and of fine-tuning."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from verl_vla.config.compose import RECIPES_FOLDER, recipe_names
from verl_vla.config.sft import SFT_RECIPES_FOLDER


def run(arguments: Sequence[str]) -> int:
    """Print one name a line, with the first comment of its file."""
    for folder in (RECIPES_FOLDER, SFT_RECIPES_FOLDER):
        for name in recipe_names(folder):
            first = (folder / f"{name}.yaml").read_text().splitlines()[0]
            sys.stdout.write(f"{name:<24} {first.lstrip('# ')}\n")
    return 0
