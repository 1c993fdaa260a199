"""How often two real ranks gather their weights, and that they answer the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from verl_vla.config.compose import load_recipe

SCRIPT = Path(__file__).with_name("gathering_rank.py")
NUM_LAYERS, POLICY_STEPS = 3, 4


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[float]]]:
    """Gathers and answers of one rank, under each way to play."""
    store = tmp_path_factory.mktemp("store") / "file"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(store)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[3])},
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    first, second = map(json.loads, said)
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
    script = SCRIPT.with_name("gathered_save_rank.py")
    path = os.pathsep.join(map(str, (SCRIPT.parents[3], SCRIPT.parents[2] / "contract")))
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), str(rank), str(lora_rank)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said


def test_a_recipe_may_refuse() -> None:
    assert load_recipe(["recipe=libero"]).cluster.gather_once
    assert not load_recipe(["recipe=libero", "cluster.gather_once=false"]).cluster.gather_once
