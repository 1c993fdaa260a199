"""What every `Env` owes the pool: the same tests for the stand-in and for the simulator."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from verl_vla.core.episode import Observation, Outcome, Reading
from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.core.image_preprocessing import prepare_image
from verl_vla.envs.base import ChunkResult, Env, EnvConfig
from verl_vla.envs.fake import FakeEnv, FakeEnvConfig
from verl_vla.envs.libero.suite import make_libero_env

CHUNK = 8
STEP_LIMIT = 44
"""Not a multiple of the chunk, so that time runs out inside one."""


@dataclass(frozen=True)
class Case:
    factory: partial[Env]
    scale: float
    """Actions this small solve nothing by chance."""
    action_dim: int = 7
    proprio_dim: int = 8
    full_size: int = 256
    """Of a camera's image."""
    prepare: Callable[[np.ndarray], np.ndarray] = np.asarray
    """Makes of it what the policy sees."""


FAKE = FakeEnvConfig(image_size=256, step_limit=STEP_LIMIT, stride=0.02, render_final=True)
MINI = EnvConfig(
    suite="mini", step_limit=STEP_LIMIT, render_size=64, image_size=56, render_final=True
)
TWO_ARMS = replace(FAKE, action_dim=14, proprio_dim=14)
CASES = {
    "fake": Case(partial(FakeEnv, FAKE), 0.2),
    "two arms": Case(partial(FakeEnv, TWO_ARMS), 0.2, action_dim=14, proprio_dim=14),
    "mini": Case(
        partial(make_libero_env, MINI), 0.5, full_size=64, prepare=partial(prepare_image, size=56)
    ),
}


@pytest.fixture(
    scope="module", params=["fake", "two arms", pytest.param("mini", marks=pytest.mark.sim)]
)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def env(case: Case) -> Iterator[Env]:
    env = case.factory()
    yield env
    env.close()


def chunk(case: Case, seed: int, length: int = CHUNK) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.uniform(-case.scale, case.scale, (length, case.action_dim)).astype(np.float32)


def same(a: Any, b: Any) -> bool:
    """Equal to the bit."""
    return pickle.dumps(a) == pickle.dumps(b)


def play(env: Env, case: Case, seeds: range) -> list[ChunkResult]:
    return [env.step_chunk(chunk(case, seed)) for seed in seeds]


def test_a_start_looks_the_same_every_time(env: Env, case: Case) -> None:
    first = env.reset(0, 3)
    play(env, case, range(2))
    env.reset(1, 4)
    assert same(env.reset(0, 3), first)
    assert not np.array_equal(env.reset(0, 4).image, first.image)


def test_an_observation_is_complete(env: Env, case: Case) -> None:
    seen = env.reset(0, 0)
    assert isinstance(seen, Observation)
    assert seen.image.dtype == np.uint8
    assert seen.image.ndim == 4
    assert seen.image.shape[-1] == 3
    assert seen.proprio.shape == (case.proprio_dim,)
    assert seen.proprio.dtype == np.float32
    assert seen.instruction != env.reset(1, 0).instruction


def test_the_same_actions_give_the_same_episode(env: Env, case: Case) -> None:
    env.reset(0, 1)
    first = play(env, case, range(4))
    env.reset(0, 1)
    assert same(play(env, case, range(4)), first)


def test_a_chunk_that_ends_nothing_is_executed_whole(env: Env, case: Case) -> None:
    env.reset(0, 0)
    result = env.step_chunk(chunk(case, 0))
    assert (result.executed, result.outcome) == (CHUNK, None)
    assert result.observation is not None


def test_time_runs_out_inside_a_chunk(env: Env, case: Case) -> None:
    env.reset(0, 0)
    *before, last = play(env, case, range(6))
    assert all(result.outcome is None for result in before)
    assert (last.executed, last.outcome) == (STEP_LIMIT % CHUNK, Outcome.TIMEOUT)
    assert last.observation is None


def test_the_end_of_an_episode_is_drawn_for_whoever_wants_to_see_it(env: Env, case: Case) -> None:
    first = env.reset(0, 0).image
    straight_on = np.full((CHUNK, case.action_dim), case.scale, dtype=np.float32)
    *before, last = (env.step_chunk(straight_on) for _ in range(6))
    assert all(result.final_image is None for result in before)
    assert last.final_image is not None
    assert (last.final_image.dtype, last.final_image.shape) == (np.uint8, first.shape)
    latest = before[-1].observation
    assert latest is not None
    assert not np.array_equal(last.final_image, latest.image)
    change = np.abs(last.final_image.astype(int) - latest.image).mean()
    assert change <= np.abs(last.final_image.astype(int) - first).mean()


@pytest.mark.parametrize("every", [1, 3])
def test_a_video_has_the_first_moment_every_kth_step_and_the_last(case: Case, every: int) -> None:
    make, config = case.factory.func, case.factory.args[0]
    env = make(replace(config, video_every=every))
    first = env.reset(0, 0)
    results = play(env, case, range(6))
    assert all(result.video is not None for result in results)
    video = np.concatenate([result.video for result in results])
    steps = {0, *range(0, STEP_LIMIT + 1, every), STEP_LIMIT}
    assert len(video) == len(steps)
    assert (video.dtype, video.shape[1:]) == (np.uint8, (case.full_size, case.full_size, 3))
    assert np.array_equal(case.prepare(video[0]), first.image[0])
    assert np.array_equal(case.prepare(video[-1]), results[-1].final_image[0])
    # looking changes nothing
    blind = case.factory()
    blind.reset(0, 0)
    played = play(blind, case, range(6))
    assert all(result.video is None for result in played)
    assert same([replace(result, video=None) for result in results], played)
    env.close()
    blind.close()


def test_goals_are_read_before_and_after_every_chunk(env: Env, case: Case) -> None:
    env.reset(0, 0)
    results = play(env, case, range(6))
    for result in results:
        assert (result.goals.dtype, result.goals.shape) == (np.float32, (2, 1, len(Reading)))
        assert np.isfinite(result.goals).all()
        assert (result.goals >= 0).all()
        assert not result.goals[..., Reading.HOLDS].any()
    for before, after in pairwise(results):
        assert np.array_equal(before.goals[1], after.goals[0])
    assert not np.array_equal(results[0].goals[0], results[-1].goals[1])


def test_nothing_is_played_after_the_end(env: Env, case: Case) -> None:
    env.reset(0, 0)
    play(env, case, range(6))
    with pytest.raises(ContractError, match="has ended"):
        env.step_chunk(chunk(case, 6))
    env.reset(0, 0)
    assert env.step_chunk(chunk(case, 0)).executed == CHUNK


def test_nothing_is_played_before_a_start(case: Case) -> None:
    env = case.factory()
    with pytest.raises(ContractError):
        env.step_chunk(chunk(case, 0))
    with pytest.raises(ContractError):
        env.snapshot()
    env.close()


@pytest.mark.parametrize(
    "shape",
    [lambda a: (a,), lambda a: (8, a - 1), lambda a: (0, a), lambda a: (1, 8, a)],
    ids=["no steps", "narrow", "empty", "several"],
)
def test_misshapen_actions_are_refused(
    env: Env, case: Case, shape: Callable[[int], tuple[int, ...]]
) -> None:
    env.reset(0, 0)
    with pytest.raises(ContractError, match=rf"actions must be \[K, {case.action_dim}\]"):
        env.step_chunk(np.zeros(shape(case.action_dim), np.float32))
    assert env.step_chunk(chunk(case, 0)).executed == CHUNK


@pytest.mark.parametrize(("task_id", "init_state_id"), [(-1, 0), (99, 0), (0, -1), (0, 100_000)])
def test_unknown_starts_are_refused(env: Env, task_id: int, init_state_id: int) -> None:
    with pytest.raises(ConfigError):
        env.reset(task_id, init_state_id)


def test_going_on_from_a_snapshot_equals_never_having_stopped(env: Env, case: Case) -> None:
    env.reset(1, 2)
    play(env, case, range(2))
    kept = pickle.dumps(env.snapshot())
    straight = play(env, case, range(2, 6))
    env.reset(0, 5)
    play(env, case, range(3))
    env.restore(pickle.loads(kept))
    assert same(play(env, case, range(2, 6)), straight)
    assert straight[-1].outcome is Outcome.TIMEOUT


def test_a_snapshot_goes_on_in_another_environment(env: Env, case: Case) -> None:
    env.reset(1, 2)
    play(env, case, range(1))
    kept = env.snapshot()
    straight = play(env, case, range(1, 4))
    other = case.factory()
    other.restore(kept)
    assert same(play(other, case, range(1, 4)), straight)
    other.close()


def test_a_snapshot_does_not_change_when_play_goes_on(env: Env, case: Case) -> None:
    env.reset(0, 2)
    play(env, case, range(1))
    kept = env.snapshot()
    written = pickle.dumps(kept)
    play(env, case, range(1, 3))
    assert pickle.dumps(kept) == written
    env.restore(kept)
    play(env, case, range(3, 5))
    assert pickle.dumps(kept) == written


def test_episodes_taken_in_turns_do_not_touch_each_other(env: Env, case: Case) -> None:
    starts = [(0, 1), (0, 2), (1, 1)]
    alone = []
    for start in starts:
        env.reset(*start)
        alone.append(play(env, case, range(4)))
    moments = []
    for start in starts:
        env.reset(*start)
        moments.append(env.snapshot())
    in_turns: list[list[ChunkResult]] = [[], [], []]
    for seed in range(4):
        for i in (2, 0, 1):
            env.restore(moments[i])
            in_turns[i].append(env.step_chunk(chunk(case, seed)))
            moments[i] = env.snapshot()
    assert same(in_turns, alone)


def test_chunks_are_only_groups_of_steps(env: Env, case: Case) -> None:
    actions = chunk(case, 0)
    env.reset(0, 7)
    whole = env.step_chunk(actions)
    env.reset(0, 7)
    parts = [env.step_chunk(actions[i : i + 1]) for i in range(CHUNK)]
    assert same(parts[-1].observation, whole.observation)
