"""The side-by-side video shows the episodes as they are."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest

from verl_vla.core.episode import Outcome, Start
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.envs.base import EnvConfig
from verl_vla.policies.registry import load_policy
from verl_vla.runs.video import FRAME_SIZE, STEPS_PER_FRAME, record_videos, write_side_by_side

pytestmark = pytest.mark.sim

STEP_LIMIT = 13
"""Ends inside a chunk, and not on a frame."""


def test_every_policy_gets_its_episode_from_the_same_start(tmp_path: Path) -> None:
    policy = load_policy(PROJECT_FOLDER / "bases" / "mini")
    config = EnvConfig(
        suite="mini",
        step_limit=STEP_LIMIT,
        render_size=128,
        image_size=policy.shape.image_size,
        max_simulators=1,
    )
    first, second = record_videos([policy, policy], config, Start(task_id=0, init_state_id=4))
    assert (first.num_steps, first.outcome) == (STEP_LIMIT, Outcome.TIMEOUT)
    assert len(first.frames) == 1 + STEP_LIMIT // STEPS_PER_FRAME + 1
    assert first.frames[0].shape == (FRAME_SIZE, FRAME_SIZE, 3)
    for mine, theirs in zip(first.frames, second.frames, strict=True):
        assert np.array_equal(mine, theirs)
    assert not np.array_equal(first.frames[0], first.frames[-1])
    file = tmp_path / "both.mp4"
    write_side_by_side(file, [("before", first), ("after", second)])
    assert imageio.imread(file, index=0).shape[1] == 2 * FRAME_SIZE
