"""How often two real ranks gather their weights, and that they answer the same."""

from __future__ import annotations

import json
from pathlib import Path

import gathered_save_rank
import gathering_rank
import pytest
from rank_processes import run_ranks

from verl_vla.config.compose import load_recipe

NUM_LAYERS, POLICY_STEPS = 3, 4


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[float]]]:
    """Gathers and answers of one rank, under each way to play."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(gathering_rank.main, (folder, 0), (folder, 1))
    first, second = (json.loads((folder / f"counted_{r}.json").read_text()) for r in range(2))
    assert first == second
    return first


def test_weights_are_gathered_once_for_a_rollout(counted) -> None:
    assert counted["each"][0] == NUM_LAYERS * POLICY_STEPS
    assert counted["kept"][0] == NUM_LAYERS
    assert counted["kept_again"][0] == 0


def test_the_answers_are_the_same_to_the_bit(counted) -> None:
    assert counted["each"][1] == counted["kept"][1] == counted["kept_again"][1]


def test_what_was_learned_is_gathered_anew(counted) -> None:
    assert counted["learned"][0] == NUM_LAYERS * POLICY_STEPS, "as it was before"
    assert counted["learned"][1] != counted["kept"][1]
    assert counted["kept_after_learning"] == [NUM_LAYERS, counted["learned"][1]]
    assert counted["kept_after_export"] == [NUM_LAYERS, counted["learned"][1]]


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["all weights", "adapters"])
def test_a_checkpoint_after_an_evaluation_can_be_loaded(lora_rank: int, tmp_path: Path) -> None:
    run_ranks(gathered_save_rank.main, (tmp_path, 0, lora_rank), (tmp_path, 1, lora_rank))


def test_a_recipe_may_refuse() -> None:
    assert load_recipe(["recipe=libero"]).cluster.gather_once
    assert not load_recipe(["recipe=libero", "cluster.gather_once=false"]).cluster.gather_once
