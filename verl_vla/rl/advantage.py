"""Group-relative advantage: an episode is compared with the other episodes of its group only."""

from __future__ import annotations

import torch
from torch import Tensor

STD_EPSILON = 1e-6
"""Added to a group's standard deviation, in reward units; the value of veRL 0.9.1
(``core_algos.compute_grpo_outcome_advantage``) and of SimpleVLA-RL."""


def group_advantage(reward: Tensor, group_id: Tensor) -> Tensor:
    """Standardise ``reward`` within each group (GRPO, arXiv:2402.03300, equation 4.1.2).

    The standard deviation is the unbiased one, as in veRL.

    Args:
        reward: [B] float32, one reward per episode.
        group_id: [B] int64; rows with the same id started from the same init state.

    Returns:
        [B] float32, mean 0 in every group; 0 where all rewards of a group are equal or it has one
        row.

    >>> group_advantage(torch.tensor([1., 0., 5., 5.]), torch.tensor([7, 7, 9, 9]))
    tensor([ 0.7071, -0.7071,  0.0000,  0.0000])
    """
    advantage = torch.zeros_like(reward)
    # the mean of equal numbers can be off by a rounding error, which the division would magnify
    for group in group_id[is_informative(reward, group_id)].unique():
        members = group_id == group
        rewards = reward[members]
        advantage[members] = (rewards - rewards.mean()) / (rewards.std() + STD_EPSILON)
    return advantage


def is_informative(value: Tensor, group_id: Tensor) -> Tensor:
    """Return [B] bool, true for every episode whose group holds two different values.

    A group is kept or dropped as a unit, since its advantages depend on all of its members.

    >>> is_informative(torch.tensor([0., .5, 1., 3., 3.]), torch.tensor([1, 1, 1, 2, 2]))
    tensor([ True,  True,  True, False, False])
    """
    row_group = _row_group(group_id)
    # max() raises on an empty tensor
    shape = (int(row_group.max()) + 1,) if len(row_group) else (0,)
    low = torch.full(shape, torch.inf).scatter_reduce_(0, row_group, value.float(), "amin")
    high = torch.full(shape, -torch.inf).scatter_reduce_(0, row_group, value.float(), "amax")
    # compares the rewards themselves: the deviation of equal numbers need not be exactly 0
    return (low < high)[row_group]


def _row_group(group_id: Tensor) -> Tensor:
    """Number the groups 0, 1, ... so that they can index an array."""
    return torch.searchsorted(group_id.unique(), group_id)
