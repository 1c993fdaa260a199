"""The stand-in environment keeps the contract of `Env` and is worth learning."""

import pickle

import numpy as np
import pytest

from verl_vla.core.episode import Outcome
from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.envs.base import Env
from verl_vla.envs.fake import ACTION_DIM, TARGETS, FakeEnv, FakeEnvConfig


def make_env(**options) -> Env:
    return FakeEnv(FakeEnvConfig(**options))


def move(right: float, up: float, *, times: int = 1) -> np.ndarray:
    chunk = np.zeros((times, ACTION_DIM), dtype=np.float32)
    chunk[:, :2] = right, up
    return chunk


def toward_target(task_id: int, times: int) -> np.ndarray:
    right, up = np.sign(TARGETS[task_id].place)
    return move(right, up, times=times)


def same(a, b) -> bool:
    return (
        np.array_equal(a.image, b.image)
        and np.array_equal(a.proprio, b.proprio)
        and a.instruction == b.instruction
    )


@pytest.mark.parametrize("task_id", range(len(TARGETS)))
def test_heading_for_the_target_solves_every_start_in_four_steps(task_id):
    env = make_env()
    for init_state_id in range(100):
        env.reset(task_id, init_state_id)
        result = env.step_chunk(toward_target(task_id, times=8))
        assert result.outcome is Outcome.SUCCESS
        assert 1 <= result.executed <= 4
        assert result.observation is None


def test_heading_away_from_the_target_times_out_at_the_limit():
    env = make_env(step_limit=10)
    env.reset(0, 0)
    first = env.step_chunk(move(-1, -1, times=8))
    assert (first.executed, first.outcome) == (8, None)
    last = env.step_chunk(move(-1, -1, times=8))
    assert (last.executed, last.outcome, last.observation) == (2, Outcome.TIMEOUT, None)


def test_success_at_the_last_allowed_step_is_a_success():
    env = make_env()
    env.reset(0, 0)
    needed = env.step_chunk(toward_target(0, times=8)).executed
    env = make_env(step_limit=needed)
    env.reset(0, 0)
    assert env.step_chunk(toward_target(0, times=8)).outcome is Outcome.SUCCESS


def test_random_actions_solve_some_but_few_episodes():
    env, rng, solved = make_env(image_size=8), np.random.default_rng(0), 0
    for episode in range(200):
        env.reset(episode % 4, episode // 4)
        outcome = None
        while outcome is None:
            chunk = rng.uniform(-1, 1, (8, ACTION_DIM)).astype(np.float32)
            outcome = env.step_chunk(chunk).outcome
        solved += outcome is Outcome.SUCCESS
    assert 10 <= solved <= 60  # GRPO needs groups that hold both


def test_a_start_is_the_same_whatever_was_played_before():
    fresh, used = make_env(), make_env()
    used.reset(3, 9)
    used.step_chunk(move(1, 0))
    assert same(fresh.reset(1, 5), used.reset(1, 5))


def test_init_states_and_tasks_look_different():
    env = make_env(image_size=128)
    starts = [env.reset(task_id, start) for task_id in range(4) for start in range(10)]
    assert len({s.image.tobytes() for s in starts}) == 40
    assert len({s.instruction for s in starts}) == 4


def test_observation_has_the_shapes_of_the_contract():
    seen = make_env(image_size=24, num_views=2).reset(0, 0)
    assert seen.image.shape == (2, 24, 24, 3)
    assert seen.image.dtype == np.uint8
    assert seen.proprio.shape == (8,)
    assert seen.proprio.dtype == np.float32


def test_an_ending_is_what_would_be_seen_if_the_episode_went_on():
    short, long = (
        FakeEnv(FakeEnvConfig(step_limit=limit, stride=0.01, render_final=True))
        for limit in (8, 24)
    )
    actions = np.random.default_rng(0).uniform(-1, 1, (8, 7)).astype(np.float32)
    ended, goes_on = (env.reset(0, 0) and env.step_chunk(actions) for env in (short, long))
    assert ended.outcome == Outcome.TIMEOUT and goes_on.outcome is None
    assert np.array_equal(ended.final_image, goes_on.observation.image)
    silent = FakeEnv(FakeEnvConfig(step_limit=8, stride=0.01))
    silent.reset(0, 0)
    assert silent.step_chunk(actions).final_image is None


def test_up_in_the_field_is_up_in_the_image_and_right_is_right():
    env = make_env(image_size=64)

    def middle_of_dot(image):
        rows, columns = np.nonzero((image[0] == 255).all(axis=-1))
        return rows.mean(), columns.mean()

    row, column = middle_of_dot(env.reset(0, 0).image)
    higher = middle_of_dot(env.step_chunk(move(0, 1)).observation.image)
    assert higher[0] < row
    assert higher[1] == column
    farther = middle_of_dot(env.step_chunk(move(1, 0)).observation.image)
    assert farther[1] > higher[1]


def test_going_on_from_a_snapshot_equals_never_having_stopped():
    straight, stopped, elsewhere = make_env(), make_env(), make_env()
    for env in (straight, stopped):
        env.reset(2, 7)
        env.step_chunk(move(0.3, 0.2, times=3))
    snapshot = pickle.loads(pickle.dumps(stopped.snapshot()))
    stopped.reset(0, 0)
    stopped.step_chunk(move(1, 1, times=2))
    for env in (stopped, elsewhere):
        env.restore(snapshot)
    for _ in range(2):
        answers = [env.step_chunk(move(0.1, -0.05, times=8)) for env in (straight, stopped)]
        assert same(answers[0].observation, answers[1].observation)
    elsewhere.step_chunk(move(0.1, -0.05, times=8))
    answer = elsewhere.step_chunk(move(0.1, -0.05, times=8))
    assert same(answer.observation, answers[0].observation)


def test_a_snapshot_does_not_change_when_the_episode_goes_on():
    env = make_env()
    env.reset(0, 0)
    snapshot = env.snapshot()
    before = pickle.dumps(snapshot)
    env.step_chunk(move(1, 0))
    env.restore(snapshot)
    env.step_chunk(move(1, 0))
    assert pickle.dumps(snapshot) == before
    assert env.snapshot().num_steps == 1


def test_the_step_limit_counts_on_after_a_restore():
    env = make_env(step_limit=10)
    env.reset(0, 0)
    env.step_chunk(move(-1, 0, times=8))
    other = make_env(step_limit=10)
    other.restore(env.snapshot())
    result = other.step_chunk(move(-1, 0, times=8))
    assert (result.executed, result.outcome) == (2, Outcome.TIMEOUT)


def test_nothing_goes_on_after_the_end():
    env = make_env(step_limit=1)
    with pytest.raises(ContractError, match="ended"):
        env.step_chunk(move(0, 0))
    env.reset(0, 0)
    env.step_chunk(move(0, 0))
    with pytest.raises(ContractError, match="ended"):
        env.step_chunk(move(0, 0))
    with pytest.raises(ContractError, match="ended"):
        env.snapshot()


@pytest.mark.parametrize("shape", [(7,), (8, 6), (0, 7)])
def test_chunks_of_a_wrong_shape_are_refused(shape):
    env = make_env()
    env.reset(0, 0)
    with pytest.raises(ContractError, match="actions must be"):
        env.step_chunk(np.zeros(shape, dtype=np.float32))


@pytest.mark.parametrize(("task_id", "init_state_id"), [(4, 0), (-1, 0), (0, 100), (0, -1)])
def test_unknown_starts_are_refused_with_the_valid_range(task_id, init_state_id):
    with pytest.raises(ConfigError, match=r"has 0\.\."):
        make_env().reset(task_id, init_state_id)


@pytest.mark.parametrize(
    ("option", "value"),
    [("image_size", 4), ("num_views", 0), ("step_limit", 0), ("stride", -0.1), ("tolerance", 0.4)],
)
def test_impossible_sizes_are_refused(option, value):
    with pytest.raises(ConfigError, match=f"{option} is {value}"):
        FakeEnvConfig(**{option: value})
