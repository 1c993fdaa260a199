"""``recipes``: list the project's recipes for training and for fine-tuning."""

from __future__ import annotations

import argparse
import sys

from verl_vla.config.compose import RECIPES_FOLDER, recipe_names
from verl_vla.config.sft import SFT_RECIPES_FOLDER


def run(options: argparse.Namespace) -> int:
    """Print one name per line, with the first comment of its file."""
    for folder in (RECIPES_FOLDER, SFT_RECIPES_FOLDER):
        for name in recipe_names(folder):
            first = (folder / f"{name}.yaml").read_text().splitlines()[0]
            sys.stdout.write(f"{name:<24} {first.lstrip('# ')}\n")
    return 0
