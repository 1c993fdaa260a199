"""The quickstart of each suite that a base comes with."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from verl_vla.cli.arguments import QUICKSTARTS, parse
from verl_vla.cli.quickstart import recipe_overrides
from verl_vla.config.compose import load_recipe
from verl_vla.config.grpo import Recipe
from verl_vla.runs.plots import success_table

ROOT = Path(__file__).resolve().parents[3]
MAX_BASE_BYTES, MAX_BASE_WEIGHTS = 10_000_000, 5_000_000
"""A base lies in the repository, so it must stay small."""


def recipe_of(*arguments: str) -> Recipe:
    return load_recipe(recipe_overrides(parse("quickstart", list(arguments))))


@pytest.mark.parametrize("suite", QUICKSTARTS)
def test_each_suite_has_a_recipe_and_a_small_base(suite: str) -> None:
    recipe = recipe_of("--suite", suite)
    assert recipe.environment.suite == suite
    folder = ROOT / recipe.policy.path
    assert sum(file.stat().st_size for file in folder.iterdir()) <= MAX_BASE_BYTES
    with safe_open(folder / "model.safetensors", "np") as stored:
        weights = sum(stored.get_tensor(name).size for name in stored.keys())  # noqa: SIM118
    assert weights <= MAX_BASE_WEIGHTS


def test_the_embedded_suite_is_the_default_and_runs_do_not_share_a_folder() -> None:
    assert recipe_of().environment.suite == "mini"
    folders = {
        recipe_of("--suite", suite, "--seed", seed).out for suite in QUICKSTARTS for seed in "01"
    }
    assert len(folders) == 2 * len(QUICKSTARTS)


def test_steps_seed_and_folder_are_taken(tmp_path: Path) -> None:
    recipe = recipe_of(
        *("--suite", "libero_spatial", "--total-training-steps", "3"), "--out", str(tmp_path)
    )
    assert recipe.trainer.total_training_steps == 3
    assert recipe.out == str(tmp_path)


def test_held_out_starts_of_libero_are_a_hundred_and_more() -> None:
    recipe = recipe_of("--suite", "libero_spatial")
    tasks, episodes = recipe.environment.tasks, recipe.evaluation.episodes_per_task
    assert tasks is not None
    assert episodes is not None
    assert len(tasks) >= 3
    assert len(tasks) * episodes >= 100


def test_a_suite_without_a_base_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipe_of("--suite", "libero_goal")
    assert "libero_spatial" in capsys.readouterr().err


@pytest.mark.parametrize("sampling", ["greedy", "temperature 0.6"])
def test_the_table_says_how_actions_were_chosen(sampling: str) -> None:
    rate = {"rate": 0.5, "successes": 1, "episodes": 2, "ci95": [0.1, 0.9]}
    record = {"sampling": sampling, "tasks": {"lift": rate}, "total": rate}
    assert success_table(record, record).startswith(f"held-out, {sampling}")
