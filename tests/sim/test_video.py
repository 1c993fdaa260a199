"""The side-by-side video shows the episodes as they are."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest

from verl_vla.core.episode import EpisodeSpec, Outcome, Start
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.core.tables import Trajectories
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.pool.env_pool import EnvPool
from verl_vla.envs.registry import make_env
from verl_vla.evaluation.evaluate import EVALUATION_STREAM
from verl_vla.policies.base import Policy
from verl_vla.policies.registry import load_policy
from verl_vla.rl.rollout import NoiseSource, rollout
from verl_vla.runs.video import (
    FRAME_SIZE,
    STEPS_PER_FRAME,
    VideoClip,
    record_videos,
    sampler_of,
    write_side_by_side,
)

pytestmark = pytest.mark.sim

STEP_LIMIT = 13
"""Ends inside a chunk, and not on a frame."""


NOISE = NoiseSource(seed=5, stream=EVALUATION_STREAM)


def evaluated(policy: Policy, config: EnvConfig, start: Start, episode_id: int) -> Trajectories:
    """The same episode as an evaluation plays it."""
    with EnvPool(
        partial(make_env, config),
        num_workers=1,
        num_slots=1,
        image_shape=policy.shape.image_shape,
        timeout_s=120.0,
        worker_env={},
    ) as pool:
        spec = EpisodeSpec(
            task_id=start.task_id,
            init_state_id=start.init_state_id,
            group_id=0,
            episode_id=episode_id,
        )
        return rollout([spec], policy, pool, temperature=0.8, noise=NOISE)


def greedy(policy: Policy, config: EnvConfig, start: Start) -> VideoClip:
    [clip] = record_videos([policy], config, start, sampler_of(0.0, NOISE, 0))
    return clip


def test_every_policy_gets_its_episode_from_the_same_start(tmp_path: Path) -> None:
    policy = load_policy(PROJECT_FOLDER / "bases" / "mini")
    config = EnvConfig(
        suite="mini",
        step_limit=STEP_LIMIT,
        render_size=128,
        image_size=policy.shape.image_size,
        max_simulators=1,
    )
    start, episode_id = Start(task_id=0, init_state_id=4), 3
    sample = sampler_of(0.8, NOISE, episode_id)
    first, second = record_videos([policy, policy], config, start, sample)
    assert (first.num_steps, first.outcome) == (STEP_LIMIT, Outcome.TIMEOUT)
    assert len(first.frames) == 1 + STEP_LIMIT // STEPS_PER_FRAME + 1
    assert first.frames[0].shape == (FRAME_SIZE, FRAME_SIZE, 3)
    for mine, theirs in zip(first.frames, second.frames, strict=True):
        assert np.array_equal(mine, theirs)
    assert not np.array_equal(first.frames[0], first.frames[-1])
    played = evaluated(policy, config, start, episode_id)
    assert played.episodes.num_steps.tolist() == [first.num_steps]
    assert not np.array_equal(first.frames[-1], greedy(policy, config, start).frames[-1])
    file = tmp_path / "both.mp4"
    write_side_by_side(file, [("before", first), ("after", second)])
    assert imageio.imread(file, index=0).shape[1] == 2 * FRAME_SIZE
