"""Mini-batches of a training step: whole groups, equally many, of about equally many rows.

Episodes of a group are compared with each other, so all of them push the same optimizer step, and
the loss is the mean over the episodes of its own mini-batch, as in SimpleVLA-RL
(``verl/workers/actor/dp_rob.py``, ``update_policy``).

veRL gives every rank an equal run of consecutive rows, and each rank cuts its run into
``num_mini_batch`` equal slices (verl 0.9.1 ``workers/engine_workers.py``, ``train_mini_batch``).
Every mini-batch is therefore padded to the size of the largest.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

from verl_vla.trainer.grpo.rows import RowKey


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniBatch:
    """Groups that one optimizer step learns from."""

    keys: list[str]
    """Keys of the rows with a gradient, by group, episode and policy step."""
    num_trajectories: int
    """Number of episodes of the groups, also of those without a gradient."""


def cut(keys: Sequence[str], idle: Collection[str], num_mini_batches: int) -> list[MiniBatch]:
    """Cut a training step into mini-batches of whole groups.

    Every mini-batch has a gradient: there are fewer than ``num_mini_batches`` where fewer groups
    have one.

    Args:
        keys: of all rows, in any order, without padding.
        idle: those of them without a gradient; not all.
        num_mini_batches: the number wanted.
    """
    learned: dict[int, list[str]] = {}
    episodes: dict[int, set[int]] = {}
    for row in sorted(map(RowKey.parse, keys)):
        episodes.setdefault(row.group, set()).add(row.episode)
        rows = learned.setdefault(row.group, [])
        if (key := str(row)) not in idle:
            rows.append(key)
    # in the order in which the groups were sampled
    groups = list(learned)
    num_rows = [len(learned[group]) for group in groups]
    possible = min(num_mini_batches, sum(map(bool, num_rows)))
    return [
        MiniBatch(
            keys=[key for i in part for key in learned[groups[i]]],
            num_trajectories=sum(len(episodes[groups[i]]) for i in part),
        )
        for part in assign_groups(num_rows, possible)
    ]


def assign_groups(num_rows: Sequence[int], num_mini_batches: int) -> list[list[int]]:
    """Assign each group to one mini-batch, so that their rows differ as little as possible.

    The numbers of groups differ by at most one, and the numbers of rows by little more than those
    of the largest group. The largest groups go to different mini-batches.

    Args:
        num_rows: [G], rows of each group.
        num_mini_batches: at most G.

    Returns:
        Indices of the groups of every mini-batch, in order.

    >>> assign_groups([9, 8, 2, 1], 2)
    [[0, 3], [1, 2]]
    """
    # one more row each, so that places without a group are smaller than any group: veRL deals out
    # the items by size, one a partition, and so no partition gets two of the places
    empty = [0] * (-len(num_rows) % num_mini_batches)
    sizes = [rows + 1 for rows in num_rows] + empty
    parts = _balanced(sizes, num_mini_batches)
    # by the first group, which is random: veRL's order is by size, so that the first optimizer
    # step would always have the most rows
    return sorted(sorted(i for i in part if i < len(num_rows)) for part in parts)


def padded_size(mini_batches: Sequence[MiniBatch], num_ranks: int) -> int:
    """Return the rows of every mini-batch with padding: the largest, divisible by the ranks."""
    largest = max(len(part.keys) for part in mini_batches)
    return -(-largest // num_ranks) * num_ranks


def order_for_ranks(
    mini_batches: Sequence[MiniBatch],
    padding: Sequence[str],
    length: dict[str, int],
    num_ranks: int,
) -> list[str]:
    """Return all keys in the order that veRL's slices turn into these mini-batches.

    Args:
        mini_batches: as from `cut`.
        padding: keys of as many rows of padding as `padded_size` needs.
        length: tokens of every row, by its key, which are shared out evenly.
        num_ranks: divides the rows of a padded mini-batch.
    """
    size, unused = padded_size(mini_batches, num_ranks), list(padding)
    runs: list[list[str]] = [[] for _ in range(num_ranks)]
    for part in mini_batches:
        missing = size - len(part.keys)
        keys, unused = part.keys + unused[:missing], unused[missing:]
        workload = calculate_workload(torch.tensor([length[key] for key in keys])).tolist()
        for run, share in zip(runs, _balanced(workload, num_ranks), strict=True):
            run += [keys[i] for i in share]
    return [key for run in runs for key in run]


def _balanced(sizes: list[int], num_parts: int) -> list[list[int]]:
    """Return equally many indices for every part, so that sums of sizes differ little."""
    # Any: veRL's function has no return type
    parts: Any = get_seqlen_balanced_partitions(sizes, num_parts, equal_size=True)
    return parts
