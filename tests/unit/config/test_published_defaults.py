"""Defaults that are published numbers, and recipes that do not repeat a default."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from verl_vla.config.compose import RECIPES_FOLDER, leaves, load_recipe
from verl_vla.config.grpo import Recipe
from verl_vla.config.schema import parse

SIMPLEVLA = {
    "sampling.groups_per_step": 64,
    "sampling.group_size": 8,
    "sampling.temperature": 1.6,
    "sampling.dynamic": True,
    "loss.clip.low": 0.2,
    "loss.clip.high": 0.28,
    "loss.kl.coefficient": 0.0,
    "optimizer.lr": 5e-6,
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_grad": 1.0,
    "optimizer.num_mini_batches": 4,
    "environment.step_limit": "simplevla",
}
"""SimpleVLA-RL, examples/run_openvla_oft_rl_libero.sh and its verl/ folder."""
OVERRIDES_ANOTHER_FILE = {
    ("profile/lora_24gb.yaml", "optimizer.num_mini_batches"),  # libero's 4
    ("profile/qlora_24gb.yaml", "policy.gradient_checkpointing"),  # lora_24gb's true
    ("reward/srpo.yaml", "optimizer.num_mini_batches"),  # the paper's, beside the script's
    ("reward/srpo.yaml", "optimizer.lr"),  # the paper's, in whatever recipe it is used
    ("reward/siglip_t.yaml", "optimizer.weight_decay"),
    ("reward/binary.yaml", "reward"),
    ("libero_spatial_tiny.yaml", "environment.timeout_s"),  # two_cores' 120 s
    ("robotwin.yaml", "environment.step_limit"),
    ("robotwin.yaml", "trainer.save_every"),
}
"""Values that equal a default and change a recipe that builds on the file."""
FILES = sorted(
    path
    for path in RECIPES_FOLDER.rglob("*.yaml")
    if not path.is_relative_to(RECIPES_FOLDER / "sft")
)


def as_leaves(recipe: Recipe) -> dict[str, object]:
    return dict(leaves(recipe.as_dict()))


def test_the_profile_halves_the_published_micro_batch() -> None:
    """By memory alone: the gradient is the same sum over rows, however they are cut."""
    needed = {"out": "x", "policy": {"path": "x"}, "environment": {"suite": "x"}}
    assert parse(Recipe, needed).optimizer.micro_batch_size == 16
    assert load_recipe(["recipe=libero"]).optimizer.micro_batch_size == 8


def test_the_libero_recipe_has_the_published_numbers() -> None:
    recipe = load_recipe(["recipe=libero"])
    found = as_leaves(recipe)
    assert {name: found[name] for name in SIMPLEVLA} == SIMPLEVLA
    assert recipe.optimizer.betas == (0.9, 0.999)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RECIPES_FOLDER)))
def test_a_recipe_states_only_what_differs_from_the_defaults(path: Path) -> None:
    needed = {"out": "x", "policy": {"path": "x"}, "environment": {"suite": "x"}}
    defaults = as_leaves(parse(Recipe, needed))
    stated = {k: v for k, v in yaml.safe_load(path.read_text()).items() if k != "defaults"}
    name = str(path.relative_to(RECIPES_FOLDER))
    repeated = [
        option
        for option, value in leaves(stated)
        if option in defaults
        and (name, option) not in OVERRIDES_ANOTHER_FILE
        and defaults[option] == (tuple(value) if isinstance(value, list) else value)
    ]
    assert not repeated
