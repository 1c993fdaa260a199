"""What every reward in ``rewards/`` must keep to; the list is read from the folder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from judge_server import MODEL, judge_server, url_of

from verl_vla.core.episode import Reading
from verl_vla.rewards import (
    REWARDS_FOLDER,
    Need,
    TrajectoryBatch,
    TrajectoryReward,
    complete,
    judge,
    load_reward,
)
from verl_vla.runs.metrics import OPEN_FAMILIES, check_declared

NAMES = sorted(p.stem for p in REWARDS_FOLDER.glob("*.py") if not p.stem.startswith("_"))
PIXELS = {"encoder": "pixels", "encoder_args": {"grid": 4}}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "binary": {},
    "knn_align": PIXELS,
    "oracle": {},
    "reaching": {},
    "siglip_t": {**PIXELS, "head_steps": 2},
    "siglip_t_published": PIXELS,
    "srpo": PIXELS,
    "srpo_released": PIXELS,
    "vlm_judge": {"model": MODEL, "instructions": {"mini/0": "push", "mini/1": "lift"}},
    "verl_function": {"path": str(Path(__file__).parent / "verl_reward_function.py")},
}
"""What a new reward is tested with; it must be entered here."""


Make = Callable[[], TrajectoryReward]


@pytest.fixture(params=NAMES)
def make(request) -> Iterator[Make]:
    """Loads one of the rewards; the judge has a server as long as the test runs."""
    if request.param != "vlm_judge":
        yield lambda: load_reward(request.param, ARGUMENTS[request.param])
        return
    with judge_server() as server:
        arguments = ARGUMENTS[request.param] | {"url": url_of(server)}
        yield lambda: load_reward(request.param, arguments)


@pytest.fixture
def reward(make: Make) -> TrajectoryReward:
    return make()


SOLVED = (0, 3, 5)
"""Rows of the batch."""


def goals_of(rng: np.random.Generator, policy_steps: int, is_solved: bool) -> np.ndarray:
    """Distances at random; the goals hold where the episode has solved its task."""
    readings = rng.random((policy_steps + 1, 2, 3)).astype(np.float32)
    readings[..., Reading.HOLDS] = 0
    readings[-1, :, Reading.HOLDS] = is_solved
    return readings


def make_batch(seed: int = 0, split: str = "train") -> TrajectoryBatch:
    """Two groups of four on two tasks; images and readings are noise."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 4, 8)
    return TrajectoryBatch(
        episode_id=np.arange(8) + 8 * seed,
        group_id=np.repeat([seed, seed + 100], 4),
        task_key=("mini/0",) * 4 + ("mini/1",) * 4,
        init_state_id=np.repeat([3, 5], 4),
        success=np.isin(np.arange(8), SOLVED),
        num_steps=lengths * 8,
        frames=tuple(rng.integers(0, 255, (n, 1, 32, 32, 3), dtype=np.uint8) for n in lengths),
        videos=tuple(rng.integers(0, 255, (8 * n + 1, 48, 48, 3), np.uint8) for n in lengths),
        proprio=tuple(rng.normal(size=(n, 8)).astype(np.float32) for n in lengths),
        goals=tuple(goals_of(rng, n, b in SOLVED) for b, n in enumerate(lengths)),
        split=split,  # pyright: ignore[reportArgumentType]
    )


def reorder(batch: TrajectoryBatch, order: np.ndarray) -> TrajectoryBatch:
    changed: dict[str, Any] = {}
    for f in fields(batch):
        value = getattr(batch, f.name)
        if isinstance(value, tuple):
            changed[f.name] = tuple(value[i] for i in order)
        elif isinstance(value, np.ndarray):
            changed[f.name] = value[order]
    return replace(batch, **changed)


def show(reward: TrajectoryReward, batch: TrajectoryBatch) -> TrajectoryBatch:
    """Encode what the reward asked for and leave out the rest, as a run does."""
    return complete(reward, batch)


def test_it_asks_for_nothing_that_does_not_exist(reward):
    assert reward.requires <= set(get_args(Need))


def test_one_finite_float32_and_one_word_per_episode(reward):
    batch = show(reward, make_batch())
    result = reward(batch)
    assert (result.score.dtype, result.score.shape) == (np.float32, (8,))
    assert np.isfinite(result.score).all()
    assert (result.progress.dtype, result.progress.shape) == (np.float32, (8,))
    assert len(result.status) == 8 and all(isinstance(word, str) for word in result.status)


def test_every_success_is_worth_the_same_and_no_failure_is_worth_more(reward):
    batch = show(reward, make_batch())
    scores = reward(batch).score
    assert len(set(scores[batch.success].tolist())) == 1
    assert scores[~batch.success].max() <= scores[batch.success].min()


def test_the_order_of_the_episodes_does_not_matter(reward):
    batch = make_batch()
    order = np.random.default_rng(1).permutation(len(batch))
    straight = reward(show(reward, batch)).score
    mixed = reward(show(reward, reorder(batch, order))).score
    np.testing.assert_allclose(mixed, straight[order], atol=1e-5)


def test_scoring_changes_nothing_and_repeats_itself(reward):
    batch = show(reward, make_batch())
    before = str(reward.state_dict())
    first, second = reward(batch).score, reward(batch).score
    np.testing.assert_array_equal(first, second)
    assert str(reward.state_dict()) == before


def test_it_takes_groups_in_which_all_fail_or_all_succeed(reward):
    for success in (True, False):
        batch = show(reward, replace(make_batch(), success=np.full(8, success)))
        assert np.isfinite(reward(batch).score).all()


def test_its_metrics_are_declared_numbers(reward):
    batch = show(reward, make_batch())
    learned = reward.update(batch)
    for metrics in (judge(reward, batch).metrics, learned):
        check_declared({f"reward/{name}": value for name, value in metrics.items()})
        assert all(np.isscalar(value) for value in metrics.values())
    assert "reward/" in OPEN_FAMILIES


def test_its_state_survives_a_restart(reward, make, tmp_path):
    """Written and read as a checkpoint is: without executing anything."""
    reward.update(show(reward, make_batch(seed=1)))
    torch.save(reward.state_dict(), tmp_path / "state.pt")
    again = make()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    batch = show(reward, make_batch(seed=2))
    np.testing.assert_array_equal(again(batch).score, reward(batch).score)


def test_it_says_what_it_is(reward):
    assert inspect.getdoc(type(reward))
    assert (inspect.getsourcefile(type(reward)) or "").startswith(str(Path(REWARDS_FOLDER)))


def test_binary_is_the_outcome_and_nothing_else():
    batch = make_batch()
    result = load_reward("binary", {})(replace(batch, frames=None, proprio=None))
    assert result.score.tolist() == batch.success.astype(float).tolist()
    assert result.progress.tolist() == result.score.tolist()
    assert result.status == tuple("success" if s else "failure" for s in batch.success)
