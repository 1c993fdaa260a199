"""What is noted of one episode, and given up once its tables are made."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from one_chunk_world import SHAPE, SUCCESS

from verl_vla.core.episode import EpisodeSpec, Observation
from verl_vla.core.tables import ActionChunk
from verl_vla.envs.base import ChunkResult
from verl_vla.rl.episode_record import EpisodeRecord, ImageBuffer


def ended(*, has_video: bool, max_video_frames: int | None) -> EpisodeRecord:
    """An episode of one policy step, the second row of the policy's batch."""
    record = EpisodeRecord(EpisodeSpec(task_id=0, init_state_id=1, group_id=2, episode_id=3))
    seen = Observation(
        image=np.full((1, 2, 2, 3), 7, dtype=np.uint8),
        proprio=np.full(8, 5, dtype=np.float32),
        instruction="lift",
    )
    chunk = ActionChunk(
        action_tokens=torch.tensor([[0, 0], [1, 2]]),
        log_probs=torch.tensor([[0.0, 0.0], [-1.0, -2.0]]),
        prompt_ids=[torch.tensor([8]), torch.tensor([9])],
        actions=np.zeros((2, 2, 1), dtype=np.float32),
    )
    record.note_policy_step(seen, chunk, 1)
    answer = ChunkResult(
        executed=2,
        outcome=SUCCESS,
        observation=None,
        goals=np.zeros((2, 1, 3), dtype=np.float32),
        video=np.full((2, 4, 4, 3), 6, dtype=np.uint8) if has_video else None,
    )
    assert record.note_answer(answer, max_video_frames) is None
    return record


def test_tables_are_handed_over_once_and_what_they_were_made_from_is_given_up() -> None:
    """The images of a round take gigabytes."""
    record = ended(has_video=True, max_video_frames=None)
    tables = record.tabulate(SHAPE, has_video=True, images=ImageBuffer(1, SHAPE))
    noted = (record.observations, record.action_tokens, record.log_probs, record.video)
    assert noted == ([], [], [], [])
    assert tables.policy_steps.action_tokens.tolist() == [[1, 2]]
    assert tables.policy_steps.log_probs.tolist() == [[-1.0, -2.0]]
    assert [ids.tolist() for ids in tables.prompt_ids] == [[9]]
    assert tables.videos[0].shape == (2, 4, 4, 3)
    assert record.take_tables() is tables
    with pytest.raises(AssertionError, match="left unfinished"):
        record.take_tables()


def test_frames_that_nobody_rendered_are_none() -> None:
    record = ended(has_video=False, max_video_frames=None)
    assert record.tabulate(SHAPE, has_video=True, images=ImageBuffer(1, SHAPE)).videos[0].shape == (
        0,
        0,
        0,
        3,
    )


def test_frames_that_nobody_asked_for_are_not_kept() -> None:
    record = ended(has_video=True, max_video_frames=0)
    assert record.video == []
    assert record.tabulate(SHAPE, has_video=False, images=ImageBuffer(1, SHAPE)).videos == ()
