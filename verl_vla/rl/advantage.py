"""Group-relative advantage: an episode is judged against its siblings, nothing else."""

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
        [B] float32, mean 0 in every group; 0 where a group agrees or has one row.

    >>> group_advantage(torch.tensor([1., 0., 5., 5.]), torch.tensor([7, 7, 9, 9]))
    tensor([ 0.7071, -0.7071,  0.0000,  0.0000])
    """
    row_group = _row_group(group_id)
    count = torch.bincount(row_group).to(reward.dtype)
    mean = torch.zeros_like(count).scatter_add_(0, row_group, reward) / count
    centred = reward - mean[row_group]
    square = torch.zeros_like(count).scatter_add_(0, row_group, centred**2)
    std = (square / (count - 1).clamp(min=1)).sqrt()
    # the mean of equal numbers may be off by a rounding error, which the division would magnify
    advantage = centred / (std[row_group] + STD_EPSILON)
    return advantage.masked_fill(~is_informative(reward, group_id), 0.0)


def is_informative(value: Tensor, group_id: Tensor) -> Tensor:
    """[B] bool, true for every episode whose group holds two different values.

    A whole group is kept or dropped, since its advantages depend on all of its members.

    >>> is_informative(torch.tensor([0., .5, 1., 3., 3.]), torch.tensor([1, 1, 1, 2, 2]))
    tensor([ True,  True,  True, False, False])
    """
    row_group = _row_group(group_id)
    shape = (int(row_group.max()) + 1,) if len(row_group) else (0,)
    low = torch.full(shape, torch.inf).scatter_reduce_(0, row_group, value.float(), "amin")
    high = torch.full(shape, -torch.inf).scatter_reduce_(0, row_group, value.float(), "amax")
    return (low < high)[row_group]


def _row_group(group_id: Tensor) -> Tensor:
    """Number the groups 0, 1, ... so that they can index an array."""
    return torch.searchsorted(group_id.unique(), group_id)
