"""``recipes``: list the project's recipes for training and for fine-tuning."""

from __future__ import annotations

import argparse

from verl_vla.config.compose import RECIPES_FOLDER, recipe_names
from verl_vla.config.sft import SFT_RECIPES_FOLDER
from verl_vla.core.text import TextTable
from verl_vla.runs.terminal import show_table


def run(options: argparse.Namespace) -> int:
    """Print one name per line, with the first comment of its file."""
    rows = [
        [name, (folder / f"{name}.yaml").read_text().splitlines()[0].lstrip("# ")]
        for folder in (RECIPES_FOLDER, SFT_RECIPES_FOLDER)
        for name in recipe_names(folder)
    ]
    show_table(TextTable([], rows, left=(0, 1)))
    return 0
