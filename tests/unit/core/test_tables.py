"""The two tables: what is checked when one is made, and that their key survives every change."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_vla.core.episode import Outcome
from verl_vla.core.errors import ContractError
from verl_vla.core.tables import (
    Episodes,
    PolicySteps,
    Trajectories,
    check_table,
    concat_tables,
    map_columns,
)


def make_episodes(count: int, first_id: int = 0) -> Episodes:
    ids = torch.arange(first_id, first_id + count)
    return Episodes(
        task_id=ids % 3,
        init_state_id=ids % 5,
        group_id=ids // 2,
        episode_id=ids,
        outcome=ids % 3,
        num_steps=ids + 1,
    )


def make_policy_steps(episode: torch.Tensor, num_tokens: int = 4) -> PolicySteps:
    """Policy steps that carry a mark of their own in ``log_probs``: 100 * episode + place."""
    count = len(episode)
    place = torch.tensor([int((episode[:i] == e).sum()) for i, e in enumerate(episode)])
    mark = (100 * episode + place).float() if count else torch.zeros(0)
    return PolicySteps(
        episode=episode,
        image=torch.zeros(count, 1, 2, 2, 3, dtype=torch.uint8),
        proprio=torch.zeros(count, 8),
        action_tokens=torch.zeros(count, num_tokens, dtype=torch.int64),
        log_probs=mark[:, None].expand(count, num_tokens).clone(),
        executed=torch.ones(count, dtype=torch.int64),
    )


def make_trajectories(lengths: list[int], first_id: int = 0) -> Trajectories:
    """Episodes with these numbers of policy steps; prompts hold the same mark as ``log_probs``."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    episode = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    policy_steps = make_policy_steps(episode)
    policy_steps = replace(policy_steps, log_probs=policy_steps.log_probs + 100 * first_id)
    episodes = make_episodes(len(lengths), first_id)
    crashed = episodes.episode_id[episodes.crashed].tolist()
    return Trajectories(
        episodes=episodes,
        policy_steps=policy_steps,
        prompt_ids=tuple(row[:1].long() for row in policy_steps.log_probs),
        goals=tuple(np.full((n, 1, 3), first_id + b) for b, n in enumerate(lengths)),
        crashes={key: f"lost {key}" for key in crashed},
    )


def marks_by_episode(trajectories: Trajectories) -> dict[int, list[int]]:
    """What each episode id owns, read through the key; log_probs and prompts must agree."""
    owned: dict[int, list[int]] = {key: [] for key in trajectories.episodes.episode_id.tolist()}
    marks = trajectories.policy_steps.log_probs[:, 0].tolist()
    for row, mark, prompt in zip(
        trajectories.policy_steps.episode.tolist(), marks, trajectories.prompt_ids, strict=True
    ):
        assert prompt.tolist() == [mark]
        owned[int(trajectories.episodes.episode_id[row])].append(int(mark))
    return owned


def test_a_table_tells_its_length_and_its_outcomes():
    episodes = make_episodes(6)
    assert len(episodes) == 6
    assert episodes.success.tolist() == [True, False, False] * 2
    assert episodes.crashed.tolist() == [False, False, True] * 2


def test_a_table_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        make_episodes(1).task_id = torch.zeros(1)  # pyright: ignore[reportAttributeAccessIssue]


def test_every_column_is_declared_with_shape_dtype_and_meaning():
    for table in (Episodes, PolicySteps):
        for f in fields(table):
            assert set(f.metadata) == {"dims", "dtype", "doc"}, f"{table.__name__}.{f.name}"
            assert f.metadata["doc"]


def test_check_table_returns_the_size_of_each_dimension():
    sizes = check_table(make_policy_steps(torch.tensor([0, 0, 1])))
    assert sizes == {"N": 3, "V": 1, "H": 2, "W": 2, "3": 3, "P": 8, "T": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_id": torch.zeros(2)}, r"Episodes.task_id must be torch.int64, got torch.float32"),
        (
            {"task_id": torch.zeros(2, 1, dtype=torch.int64)},
            r"Episodes.task_id must be \[B\], got \[2, 1\]",
        ),
        (
            {"outcome": torch.zeros(3, dtype=torch.int64)},
            r"Episodes.outcome: B = 3, but earlier columns say 2",
        ),
    ],
)
def test_a_wrong_column_of_episodes_is_named(change, message):
    with pytest.raises(ContractError, match=message):
        replace(make_episodes(2), **change)


def test_a_fixed_dimension_is_checked():
    grey = torch.zeros(2, 1, 2, 2, 1, dtype=torch.uint8)
    with pytest.raises(ContractError, match=r"PolicySteps.image must be \[N, V, H, W, 3\], got"):
        replace(make_policy_steps(torch.tensor([0, 1])), image=grey)


def test_bins_and_logp_must_hold_as_many_tokens():
    with pytest.raises(
        ContractError, match="PolicySteps.log_probs: T = 3, but earlier columns say 4"
    ):
        replace(make_policy_steps(torch.tensor([0])), log_probs=torch.zeros(1, 3))


def test_trajectories_need_a_prompt_per_policy_step():
    whole = make_trajectories([2, 1])
    with pytest.raises(ContractError, match="2 prompts for 3 policy steps"):
        replace(whole, prompt_ids=whole.prompt_ids[:2])


def test_trajectories_need_goal_readings_of_every_episode():
    whole = make_trajectories([2, 1])
    with pytest.raises(ContractError, match="goal readings of 1 episodes for 2"):
        replace(whole, goals=whole.goals[:1])


def test_endings_stay_with_their_episodes_and_none_need_be_drawn():
    final_images = tuple(np.full((1, 2, 2, 3), b, np.uint8) for b in range(2)) + (None,)
    whole = replace(make_trajectories([2, 1, 1]), final_images=final_images)
    twice = Trajectories.concat([whole, replace(whole, final_images=final_images[::-1])])
    kept = twice.select(torch.tensor([False, True, True, True, False, True]))
    assert [e if e is None else int(e.max()) for e in kept.final_images] == [1, None, None, 0]
    assert make_trajectories([2]).select(torch.tensor([True])).final_images == ()
    with pytest.raises(ContractError, match="final images of 1 episodes for 3"):
        replace(whole, final_images=final_images[:1])


def test_videos_stay_with_their_episodes_and_may_differ_in_length():
    videos = tuple(np.full((b + 1, 2, 2, 3), b, np.uint8) for b in range(3))
    whole = replace(make_trajectories([2, 1, 1]), videos=videos)
    twice = Trajectories.concat([whole, replace(whole, videos=videos[::-1])])
    kept = twice.select(torch.tensor([False, True, True, True, False, True]))
    assert [len(video) for video in kept.videos] == [2, 3, 3, 1]
    assert make_trajectories([2]).select(torch.tensor([True])).videos == ()
    with pytest.raises(ContractError, match="videos of 2 episodes for 3"):
        replace(whole, videos=videos[:2])


def test_goal_readings_stay_with_their_episodes():
    both = Trajectories.concat([make_trajectories([2, 1]), make_trajectories([1, 3], first_id=2)])
    kept = both.select(torch.tensor([False, True, False, True]))
    assert [len(readings) for readings in kept.goals] == [1, 3]
    assert [float(readings.max()) for readings in kept.goals] == [1, 3]


@pytest.mark.parametrize("row", [2, -1])
def test_the_key_must_point_at_an_episode(row):
    whole = make_trajectories([2, 1])
    policy_steps = replace(whole.policy_steps, episode=torch.tensor([0, 0, row]))
    with pytest.raises(ContractError, match=f"points at row {row}, but there are 2 episodes"):
        replace(whole, policy_steps=policy_steps)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=8))
@settings(max_examples=60)
def test_select_keeps_each_kept_episode_with_its_own_policy_steps(episodes):
    lengths, keep = [n for n, _ in episodes], [k for _, k in episodes]
    whole = make_trajectories(lengths)
    part = whole.select(torch.tensor(keep, dtype=torch.bool))
    expected = {key: marks for key, marks in marks_by_episode(whole).items() if keep[key]}
    assert marks_by_episode(part) == expected
    assert part.crashes == {key: why for key, why in whole.crashes.items() if keep[key]}


@pytest.mark.parametrize(
    "keep", [torch.tensor([1, 0]), torch.tensor([True]), torch.tensor([[True, True]])]
)
def test_select_refuses_anything_but_a_mask(keep):
    with pytest.raises(ContractError, match=r"keep must be bool \[2\], got torch\.(int64|bool)"):
        make_trajectories([1, 1]).select(keep)


@given(st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=4))
@settings(max_examples=60)
def test_concat_joins_parts_without_mixing_their_policy_steps(parts):
    made, first_id = [], 0
    for lengths in parts:
        made.append(make_trajectories(lengths, first_id))
        first_id += len(lengths)
    whole = Trajectories.concat(made)
    expected = {key: marks for part in made for key, marks in marks_by_episode(part).items()}
    assert marks_by_episode(whole) == expected
    assert whole.crashes == {key: why for part in made for key, why in part.crashes.items()}


def test_concat_undoes_select():
    whole = make_trajectories([2, 0, 3, 1])
    keep = torch.tensor([True, True, False, False])
    again = Trajectories.concat([whole.select(keep), whole.select(~keep)])
    assert marks_by_episode(again) == marks_by_episode(whole)


def test_a_part_that_lost_every_episode_at_its_start_can_be_joined():
    lost = replace(
        make_trajectories([0]),
        policy_steps=replace(make_policy_steps(torch.zeros(0).long()), proprio=torch.zeros(0, 0)),
    )
    whole = Trajectories.concat([lost, make_trajectories([2], first_id=1)])
    assert whole.policy_steps.episode.tolist() == [1, 1]
    assert len(Trajectories.concat([lost, lost]).episodes) == 2


def test_map_columns_and_concat_tables_touch_every_column():
    episodes = make_episodes(4)
    halves = [map_columns(episodes, lambda t: t[:2]), map_columns(episodes, lambda t: t[2:])]
    joined = concat_tables(halves)
    for f in fields(Episodes):
        assert torch.equal(getattr(joined, f.name), getattr(episodes, f.name))


def test_outcomes_have_the_numbers_that_files_hold():
    assert {o.name: int(o) for o in Outcome} == {"SUCCESS": 0, "TIMEOUT": 1, "CRASH": 2}
