"""Group-relative advantage, against a loop written from the formula and against veRL's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from verl_vla.rl.advantage import STD_EPSILON, group_advantage, is_informative


@st.composite
def rewarded_groups(draw, min_members: int = 2):
    """Rewards [B] and group ids [B], the members of the groups mixed."""
    sizes = draw(st.lists(st.integers(min_members, 6), min_size=1, max_size=5))
    ids = draw(
        st.lists(st.integers(0, 10**6), min_size=len(sizes), max_size=len(sizes), unique=True)
    )
    group = np.repeat(ids, sizes)
    rewards = draw(
        st.lists(st.sampled_from([0.0, 0.25, 0.6, 1.0]), min_size=len(group), max_size=len(group))
    )
    order = np.array(draw(st.permutations(range(len(group)))))
    return np.array(rewards)[order], group[order]


def advantage_by_hand(rewards, groups):
    """GRPO, arXiv:2402.03300, one episode at a time in float64."""
    out = []
    for reward, group in zip(rewards, groups, strict=True):
        siblings = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        mean = sum(siblings) / len(siblings)
        if len(siblings) == 1 or max(siblings) == min(siblings):
            out.append(0.0)
            continue
        variance = sum((r - mean) ** 2 for r in siblings) / (len(siblings) - 1)
        out.append((reward - mean) / (variance**0.5 + STD_EPSILON))
    return np.array(out)


def ours(rewards, groups):
    return group_advantage(
        torch.tensor(rewards, dtype=torch.float32), torch.tensor(groups, dtype=torch.int64)
    )


@given(rewarded_groups(min_members=1))
def test_it_is_the_formula(batch):
    rewards, groups = batch
    np.testing.assert_allclose(
        ours(rewards, groups).numpy(), advantage_by_hand(rewards, groups), atol=2e-6
    )


@given(rewarded_groups())
def test_it_is_what_verl_computes(batch):
    rewards, groups = batch
    width = 3
    token_rewards = torch.zeros(len(rewards), width)
    token_rewards[:, -1] = torch.tensor(rewards, dtype=torch.float32)
    theirs, _ = compute_grpo_outcome_advantage(
        token_rewards, torch.ones(len(rewards), width), groups, epsilon=STD_EPSILON
    )
    agrees = ~is_informative(torch.tensor(rewards), torch.tensor(groups))
    mine = ours(rewards, groups)[:, None].expand(-1, width)
    # where a group agrees veRL divides rounding errors by the epsilon; ours is 0 exactly
    torch.testing.assert_close(mine[~agrees], theirs[~agrees], atol=2e-6, rtol=1e-6)
    assert (mine[agrees] == 0).all()


def test_a_group_of_equal_odd_numbers_has_no_advantage_at_all():
    rewards = torch.full((7,), 0.6)
    assert group_advantage(rewards, torch.zeros(7, dtype=torch.int64)).tolist() == [0.0] * 7


def test_a_lonely_episode_has_no_advantage():
    assert ours([1.0, 0.0, 1.0], [1, 1, 2]).tolist()[2] == 0.0


def test_nothing_gives_nothing():
    assert ours([], []).shape == (0,)
    assert is_informative(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@given(rewarded_groups(), st.floats(-3, 3), st.floats(0.5, 4))
def test_neither_shift_nor_scale_of_a_reward_matters(batch, shift, scale):
    rewards, groups = batch
    moved = ours(rewards * scale + shift, groups)
    torch.testing.assert_close(moved, ours(rewards, groups), atol=1e-4, rtol=1e-4)


@given(rewarded_groups())
def test_the_advantages_of_a_group_sum_to_nothing(batch):
    rewards, groups = batch
    mine = ours(rewards, groups)
    for group in set(groups.tolist()):
        assert abs(float(mine[groups == group].sum())) < 1e-5


@given(rewarded_groups(min_members=1))
def test_a_group_is_informative_as_a_whole_or_not_at_all(batch):
    rewards, groups = batch
    found = is_informative(torch.tensor(rewards), torch.tensor(groups)).tolist()
    for group in set(groups.tolist()):
        members = [i for i, g in enumerate(groups) if g == group]
        disagrees = len({rewards[i] for i in members}) > 1
        assert [found[i] for i in members] == [disagrees] * len(members)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool])
def test_informative_takes_any_kind_of_value(dtype):
    value = torch.tensor([0, 1, 1, 1], dtype=dtype)
    assert is_informative(value, torch.tensor([5, 5, 3, 3])).tolist() == [True, True, False, False]
