"""``train recipe=NAME key=value ...``: improve a policy with GRPO under veRL."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from verl_vla.build import open_run
from verl_vla.recipe import load_recipe
from verl_vla.trainer.launch import train

logger = logging.getLogger(__name__)


def run(arguments: Sequence[str]) -> int:
    """Train; the same command again resumes."""
    recipe = load_recipe(arguments)
    with open_run(recipe) as opened:
        logger.info("run folder %s", opened.folder)
        train(opened)
    return 0
