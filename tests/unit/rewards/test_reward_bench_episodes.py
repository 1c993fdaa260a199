"""Episodes of the benchmark: chosen evenly, kept whole, read back, split by start, cut."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_world import NUM_GROUPS, SIZE, make_trajectories

from verl_vla.core.episode import EpisodeSpec, Outcome, Start
from verl_vla.core.errors import ConfigError
from verl_vla.core.trajectory_io import write_trajectories
from verl_vla.rewards import goal_progress
from verl_vla.rewards.benchmark import (
    choose_groups,
    claim,
    is_complete,
    played_with,
    read_rounds,
    require_groups,
)
from verl_vla.rewards.benchmark.episodes import GROUPS_PER_ROUND, PlayConfig, round_file
from verl_vla.rewards.benchmark.samples import halve, join, make_sample, prefix_lengths, take


def starts(tasks: int, each: int) -> list[Start]:
    return [Start(task_id=t, init_state_id=i) for t in range(tasks) for i in range(each)]


def test_groups_are_spread_over_the_tasks_and_no_start_is_played_twice():
    groups = choose_groups(starts(3, 10), groups=8, group_size=2, seed=0)
    tasks = [group[0].task_id for group in groups]
    assert tasks == [0, 1, 2, 0, 1, 2, 0, 1]
    assert len({(g[0].task_id, g[0].init_state_id) for g in groups}) == 8
    assert [spec.episode_id for group in groups for spec in group] == list(range(16))
    assert all(len({(s.task_id, s.init_state_id) for s in group}) == 1 for group in groups)
    assert groups == choose_groups(starts(3, 10), groups=8, group_size=2, seed=0)
    assert groups != choose_groups(starts(3, 10), groups=8, group_size=2, seed=1)


def test_more_groups_begin_with_the_same_ones():
    few, many = (choose_groups(starts(2, 10), groups=n, group_size=2, seed=4) for n in (5, 12))
    assert many[:5] == few


@pytest.mark.parametrize(
    ("groups", "message"),
    [(21, "groups is 21, but the tasks have 20 training starts"), (3, "set at least 4")],
)
def test_an_impossible_number_of_groups_is_refused(groups: int, message: str):
    with pytest.raises(ConfigError, match=message):
        choose_groups(starts(2, 10), groups=groups, group_size=2, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 1}, "groups is 1; set at least 2"),
        ({"group_size": 1}, "group_size is 1"),
        ({"num_slots": 0}, "num_slots is 0"),
        ({"temperature": 0.0}, "temperature is 0.0; episodes of one start must differ"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_an_impossible_play_is_refused(options: dict[str, float], message: str):
    with pytest.raises(ConfigError, match=message):
        PlayConfig(**options)


def test_what_is_read_is_what_was_played_to_the_bit(tmp_path: Path):
    trajectories = make_trajectories(crash_last=True)
    number = len(trajectories.episodes)
    videos = tuple(np.full((b % 3, 4, 4, 3), b, np.uint8) for b in range(number))
    trajectories = replace(trajectories, videos=videos)
    write_trajectories(round_file(tmp_path, 0), trajectories)
    read = read_rounds(tmp_path, GROUPS_PER_ROUND)
    for table in ("episodes", "policy_steps"):
        mine, theirs = (getattr(t, table) for t in (trajectories, read))
        for name in mine.__dataclass_fields__:
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
            assert getattr(mine, name).dtype == getattr(theirs, name).dtype
    pairs = [(trajectories.prompt_ids, read.prompt_ids), (trajectories.goals, read.goals)]
    for mine, theirs in pairs:
        assert len(mine) == len(theirs)
        assert all(
            np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(mine, theirs, strict=True)
        )
    assert read.final_images[-1] is trajectories.final_images[-1] is None
    for mine, theirs in zip(trajectories.final_images[:-1], read.final_images[:-1], strict=True):
        assert np.array_equal(mine, theirs)
    for mine, theirs in zip(videos, read.videos, strict=True):
        assert (mine.shape, mine.tobytes()) == (theirs.shape, theirs.tobytes())
    assert read.crashes == trajectories.crashes != {}
    assert [f.name for f in tmp_path.iterdir()] == ["round_0000.npz"]


def test_a_missing_round_is_known(tmp_path: Path):
    write_trajectories(round_file(tmp_path, 0), make_trajectories())
    assert is_complete(tmp_path, GROUPS_PER_ROUND)
    assert not is_complete(tmp_path, GROUPS_PER_ROUND + 1)
    with pytest.raises(ConfigError, match="goes on where it stopped"):
        read_rounds(tmp_path, GROUPS_PER_ROUND + 1)


def played_groups() -> list[list[EpisodeSpec]]:
    """The groups that `make_trajectories` has played."""
    table = make_trajectories().episodes
    columns = (table.task_id, table.init_state_id, table.group_id, table.episode_id)
    specs = [
        EpisodeSpec(task_id=t, init_state_id=i, group_id=g, episode_id=e)
        for t, i, g, e in zip(*(column.tolist() for column in columns), strict=True)
    ]
    return [specs[first : first + SIZE] for first in range(0, len(specs), SIZE)]


def test_rounds_are_those_that_the_settings_say(tmp_path: Path):
    require_groups(tmp_path, make_trajectories(crash_last=True), played_groups())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g[:-1], "first on episode 90 of group 15, task 1 and init state 7"),
        (lambda g: [g[0], *g], "first on episode 0 of group 0"),
        (lambda g: [[replace(s, init_state_id=9) for s in g[0]], *g[1:]], "init state 0"),
        (lambda g: [[replace(s, task_id=3) for s in g[0]], *g[1:]], "task 0"),
        (lambda g: [g[0][:-1], *g[1:]], "first on episode 5 of group 0"),
    ],
    ids=["fewer groups", "a group twice", "another start", "another task", "a smaller group"],
)
def test_rounds_of_other_episodes_than_the_settings_say_are_refused(
    tmp_path: Path, change: Any, message: str
):
    with pytest.raises(ConfigError, match=rf"played\.json and the rounds .*{message}"):
        require_groups(tmp_path, make_trajectories(), change(played_groups()))


def test_a_folder_holds_one_kind_of_episodes(tmp_path: Path):
    folder = tmp_path / "episodes"
    record = asdict(PlayConfig(tasks=(0, 1))) | {"weights": "abc"}
    claim(folder, record)
    claim(folder, record)
    assert played_with(folder)["tasks"] == [0, 1]
    with pytest.raises(ConfigError, match="weights: 'abc' -> 'other'; seed|weights: 'abc'"):
        claim(folder, record | {"weights": "other"})
    with pytest.raises(ConfigError, match="seed: 0 -> 1"):
        claim(folder, record | {"seed": 1})
    with pytest.raises(ConfigError, match=r"holds no played\.json"):
        played_with(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        claim(tmp_path / "file" / "episodes", record)


def test_halves_share_no_start_and_each_task_is_in_both():
    first, second = halve(
        make_sample(make_trajectories(), suite="mini", split="train", mirrored=True)
    )
    assert (first.batch.split, second.batch.split) == ("train", "held_out")
    where = [
        set(zip(s.batch.task_key, s.batch.init_state_id.tolist(), strict=True))
        for s in (first, second)
    ]
    assert not where[0] & where[1]
    assert {task for task, _ in where[0]} == {task for task, _ in where[1]}
    assert len(where[0]) + len(where[1]) == NUM_GROUPS
    assert len(first) + len(second) == NUM_GROUPS * SIZE


def test_a_task_with_one_start_cannot_be_halved():
    sample = make_sample(make_trajectories(), suite="mini", split="train", mirrored=True)
    one = np.flatnonzero(sample.batch.group_id == 0)
    with pytest.raises(ConfigError, match="task mini/0 has episodes of 1 start"):
        halve(sample.take(one))


def test_a_crash_is_no_failure():
    whole = make_trajectories(crash_last=True)
    sample = make_sample(whole, suite="mini", split="train", mirrored=True)
    assert len(sample) == len(whole.episodes) - 1
    assert int(whole.episodes.outcome[-1]) == Outcome.CRASH
    assert len(sample.executed) == len(sample)


def test_a_cut_episode_shows_its_beginning_and_hides_its_end():
    sample = make_sample(make_trajectories(), suite="mini", split="train", mirrored=True)
    lengths = np.array([1 + row % len(e) for row, e in enumerate(sample.executed)])
    cut = sample.cut(lengths)
    assert not cut.batch.success.any()
    for row, length in enumerate(lengths):
        assert len(cut.batch.proprio[row]) == length
        assert np.array_equal(cut.batch.frames[row], sample.batch.frames[row][: length + 1])
        assert cut.batch.num_steps[row] == sample.executed[row][:length].sum()
        assert np.array_equal(cut.batch.goals[row], sample.batch.goals[row][: length + 1])
        assert cut.truth[row] == goal_progress(sample.batch.goals[row])[length]
    whole = sample.cut(np.array([len(e) for e in sample.executed]))
    assert np.array_equal(whole.batch.num_steps, sample.batch.num_steps)
    assert np.array_equal(whole.truth, sample.truth)


def test_shuffling_moves_frames_of_failures_alone_and_not_the_first():
    sample = make_sample(make_trajectories(), suite="mini", split="train", mirrored=True)
    shuffled = sample.shuffle_failures(0)
    moved = 0
    for old, new, solved in zip(
        sample.batch.frames, shuffled.batch.frames, sample.batch.success, strict=True
    ):
        assert np.array_equal(old[0], new[0])
        assert sorted(f.tobytes() for f in old) == sorted(f.tobytes() for f in new)
        if solved:
            assert np.array_equal(old, new)
        moved += not np.array_equal(old, new)
    assert moved > 0.5 * (~sample.batch.success).sum()
    again = sample.shuffle_failures(0).batch.frames
    assert all(np.array_equal(a, b) for a, b in zip(again, shuffled.batch.frames, strict=True))


def test_taking_and_joining_keep_the_rows_together():
    batch = make_sample(make_trajectories(), suite="mini", split="train", mirrored=True).batch
    a, b = take(batch, np.array([3, 1])), take(batch, np.array([5]))
    both = join(a, b)
    assert both.episode_id.tolist() == batch.episode_id[[3, 1, 5]].tolist()
    assert both.task_key == tuple(batch.task_key[i] for i in (3, 1, 5))
    for name in ("frames", "proprio", "goals"):
        parts = getattr(both, name)
        assert all(
            np.array_equal(parts[i], getattr(batch, name)[r]) for i, r in enumerate((3, 1, 5))
        )
    assert join(replace(a, frames=None), replace(b, frames=None)).frames is None
    assert both.features is None


def test_lengths_run_from_the_first_policy_step_to_all():
    for num in range(1, 30):
        lengths = prefix_lengths(num, 8)
        assert lengths == sorted(set(lengths))
        assert lengths[-1] == num and lengths[0] == (1 if num > 1 else num)
