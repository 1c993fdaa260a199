"""Every episode a line, on the disk before the next; nothing torn, nothing of something else."""

from __future__ import annotations

import numpy as np
import pytest
from one_chunk_world import STARTS, NotingPolicy, OneChunkSimulators

from verl_vla.core.episode import Outcome
from verl_vla.core.errors import ConfigError
from verl_vla.evaluation.resumable import ATTEMPTS, play_remaining
from verl_vla.policies.action_codec import ActionCodec
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.runs.episode_log import (
    EPISODE_LOG_FILE,
    EpisodeLog,
    actions_of,
    read_episodes,
    read_header,
)

HEADER = {"suite": "mini", "sizes": (1, 2)}
CODEC = ActionCodec(
    num_bins=4,
    chunk_length=2,
    action_dim=1,
    statistics=ActionStatistics(q01=np.zeros(1), q99=np.ones(1), mask=np.array([False])),
)


def ended(episode: int, **more) -> dict:
    """A line of an episode without recorded actions."""
    line = {"episode": episode, "task": 0, "init_state": episode, "outcome": 0, "steps": 3}
    line |= {"crash": None, "progress": [], "actions": None, "executed": None}
    return line | more


def test_lines_come_back_as_they_were_written(tmp_path):
    episode_log = EpisodeLog(tmp_path / "new", HEADER)
    episode_log.append([ended(1), ended(2)])
    EpisodeLog(tmp_path / "new", HEADER).append([ended(0)])
    assert read_header(tmp_path / "new") == {"suite": "mini", "sizes": [1, 2]}
    assert [line["episode"] for line in read_episodes(tmp_path / "new")] == [1, 2, 0]


@pytest.mark.parametrize("torn", ['{"episode": 3, "out', '{"header": {"sui'])
def test_half_a_line_is_forgotten(tmp_path, torn):
    if "header" in torn:
        (tmp_path / EPISODE_LOG_FILE).write_text(torn)
    else:
        EpisodeLog(tmp_path, HEADER).append([ended(1)])
        with (tmp_path / EPISODE_LOG_FILE).open("a") as file:
            file.write(torn)
        assert [line["episode"] for line in read_episodes(tmp_path)] == [1]
    before = read_episodes(tmp_path)
    EpisodeLog(tmp_path, HEADER).append([ended(2)])
    assert read_episodes(tmp_path) == [*before, ended(2)]


def test_a_journal_of_something_else_is_refused(tmp_path):
    EpisodeLog(tmp_path, HEADER)
    with pytest.raises(ConfigError, match=r"something else \(suite: 'mini' -> 'libero_10'\)"):
        EpisodeLog(tmp_path, HEADER | {"suite": "libero_10"})


def test_what_a_resumed_run_plays_again_is_dropped(tmp_path):
    episode_log = EpisodeLog(tmp_path, HEADER)
    episode_log.append([ended(step, step=step, group=1, score=0.5) for step in (1, 2, 2, 3)])
    episode_log.rewind(2)
    assert [line["episode"] for line in read_episodes(tmp_path)] == [1, 2, 2]
    episode_log.rewind(-1)
    assert read_episodes(tmp_path) == []
    assert read_header(tmp_path)["suite"] == "mini"


def test_a_folder_without_a_journal_has_no_episodes_and_no_header(tmp_path):
    assert read_episodes(tmp_path) == []
    with pytest.raises(ConfigError, match=r"holds no episodes\.jsonl"):
        read_header(tmp_path)


def test_actions_that_were_not_kept_are_refused():
    with pytest.raises(ConfigError, match="the actions of episode 4 were not kept"):
        actions_of({"episode": 4, "actions": None})


def play(tmp_path, shown):
    simulators = OneChunkSimulators()
    lines = play_remaining(
        STARTS,
        NotingPolicy(),
        simulators,
        CODEC,
        EpisodeLog(tmp_path, HEADER),
        read_episodes(tmp_path),
        temperature=0.0,
        seed=3,
        show=shown.append,
    )
    return lines, [spec.episode_id for spec in simulators.specs]


def test_a_lost_simulator_costs_no_episode_until_it_is_lost_every_time(tmp_path):
    shown = []
    lines, played = play(tmp_path, shown)
    lost = [i for i, start in enumerate(STARTS) if start.init_state_id % 3 == Outcome.CRASH]
    assert sorted(played) == sorted([*range(len(STARTS)), *lost * (ATTEMPTS - 1)])
    assert [line["episode"] for line in lines] == list(range(len(STARTS)))
    assert [line["outcome"] for line in lines] == [s.init_state_id % 3 for s in STARTS]
    assert len(shown) == len(played)
    assert lines[lost[0]]["crash"] == "lost"


def test_what_is_in_the_journal_is_not_played_again(tmp_path):
    whole, _ = play(tmp_path, [])
    file = tmp_path / EPISODE_LOG_FILE
    kept = file.read_text().splitlines(keepends=True)
    file.write_text("".join(kept[:3]))
    known = {line["episode"] for line in read_episodes(tmp_path)}
    again, played = play(tmp_path, [])
    assert again == whole
    assert known.isdisjoint(played)


def test_an_episode_is_written_with_what_plays_it_again(tmp_path):
    lines, _ = play(tmp_path, [])
    first = lines[0]
    assert actions_of(first).shape == (1, 2, 1)
    assert first["executed"] == [2]
    assert first["progress"] == [0.0, 0.0]
    assert (first["task"], first["init_state"]) == (STARTS[0].task_id, STARTS[0].init_state_id)
