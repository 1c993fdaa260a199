"""Of every training episode a line; of a few groups also what plays them again, and a video."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from verl_vla.core.episode import Outcome
from verl_vla.core.tables import Episodes, PolicySteps, Trajectories
from verl_vla.policies.action_codec import ActionCodec
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.runs import episode_recorder
from verl_vla.runs.episode_log import actions_of, read_episodes
from verl_vla.runs.episode_recorder import VIDEO_SIZE, EpisodeRecorder, video_path

CODEC = ActionCodec(
    num_bins=4,
    chunk_length=2,
    action_dim=1,
    statistics=ActionStatistics(q01=np.zeros(1), q99=np.ones(1), mask=np.array([False])),
)
SUCCESS, TIMEOUT, CRASH = Outcome.SUCCESS, Outcome.TIMEOUT, Outcome.CRASH


def played(groups: dict[int, list[Outcome]]) -> Trajectories:
    """Groups of episodes with two policy steps each; a crash has none."""
    rows = [(group, outcome) for group, outcomes in groups.items() for outcome in outcomes]
    number = len(rows)
    outcomes = [outcome for _, outcome in rows]
    decided = [b for b in range(number) if outcomes[b] != CRASH for _ in range(2)]
    shades = torch.arange(len(decided)).reshape(-1, 1, 1, 1, 1)
    return Trajectories(
        episodes=Episodes(
            task_id=torch.zeros(number, dtype=torch.int64),
            init_state_id=torch.zeros(number, dtype=torch.int64),
            group_id=torch.tensor([group for group, _ in rows]),
            episode_id=torch.arange(number) + 100,
            outcome=torch.tensor([int(outcome) for outcome in outcomes]),
            num_steps=torch.tensor([0 if o == CRASH else 3 for o in outcomes]),
        ),
        policy_steps=PolicySteps(
            episode=torch.tensor(decided, dtype=torch.int64),
            image=(40 * shades).to(torch.uint8).expand(-1, 1, 8, 8, 3).contiguous(),
            proprio=torch.zeros(len(decided), 8),
            action_tokens=torch.ones(len(decided), 2, dtype=torch.int64),
            log_probs=torch.zeros(len(decided), 2),
            executed=torch.tensor([2, 1] * (len(decided) // 2), dtype=torch.int64),
        ),
        prompt_ids=(torch.zeros(1, dtype=torch.int64),) * len(decided),
        goals=tuple(np.zeros((0 if o == CRASH else 3, 1, 3), dtype=np.float32) for o in outcomes),
        crashes={100 + b: "lost" for b in range(number) if outcomes[b] == CRASH},
    )


ROUND = played({5: [TIMEOUT, TIMEOUT], 6: [SUCCESS, TIMEOUT, CRASH], 7: [SUCCESS, SUCCESS]})
SCORES = {100: 0.1, 101: 0.2, 102: 1.0, 103: 0.3, 105: 1.0, 106: 1.0}


def recorder(folder, groups_per_step=1) -> EpisodeRecorder:
    return EpisodeRecorder(folder, {"suite": "mini"}, CODEC, groups_per_step)


def test_every_episode_has_a_line_with_its_score(tmp_path):
    recorder(tmp_path).add(3, ROUND, SCORES)
    lines = read_episodes(tmp_path)
    assert [line["episode"] for line in lines] == list(range(100, 107))
    assert [line["score"] for line in lines] == [0.1, 0.2, 1.0, 0.3, None, 1.0, 1.0]
    assert [line["group"] for line in lines] == [5, 5, 6, 6, 6, 7, 7]
    assert {line["step"] for line in lines} == {3}


def test_the_group_that_tells_most_is_kept(tmp_path):
    book = recorder(tmp_path)
    book.add(3, ROUND, SCORES)
    book.finish()
    kept = [line for line in read_episodes(tmp_path) if line["actions"] is not None]
    assert {line["group"] for line in kept} == {6}
    assert actions_of(kept[0]).shape == (2, 2, 1)
    with Image.open(video_path(tmp_path, 102)) as video:
        assert (video.size, video.n_frames) == ((VIDEO_SIZE, VIDEO_SIZE), 2)
        video.seek(0)
        assert video.info["loop"] == 0
    assert not video_path(tmp_path, 104).exists(), (
        "a crash before the first policy step shows nothing"
    )


@pytest.mark.parametrize(("groups", "recorded"), [(0, 0), (1, 2), (2, 4), (9, 6)])
def test_no_more_groups_are_kept_than_asked_for_in_all_rounds_of_a_step(tmp_path, groups, recorded):
    book = recorder(tmp_path, groups)
    book.add(1, ROUND, SCORES)
    book.add(1, ROUND, SCORES)
    book.finish()
    assert len(list(tmp_path.glob("episodes/*.webp"))) == recorded


def test_each_step_keeps_its_own(tmp_path):
    book = recorder(tmp_path)
    book.add(1, ROUND, SCORES)
    book.add(2, ROUND, SCORES)
    kept = [line["step"] for line in read_episodes(tmp_path) if line["actions"] is not None]
    assert kept == [1, 1, 1, 2, 2, 2]
    book.rewind(1)
    assert {line["step"] for line in read_episodes(tmp_path)} == {1}


def test_a_video_that_cannot_be_written_is_an_error_of_the_step(tmp_path, monkeypatch):
    def refuse(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(episode_recorder, "write_video", refuse)
    book = recorder(tmp_path)
    book.add(1, ROUND, SCORES)
    with pytest.raises(OSError, match="No space left"):
        book.finish()
    book.finish()  # told once
