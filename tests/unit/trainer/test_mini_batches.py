"""Mini-batches of whole groups, and that veRL's slices make them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transfer_queue import KVBatchMeta

from verl_vla.config.grpo import GRPOClusterConfig
from verl_vla.trainer.grpo.mini_batches import (
    MiniBatch,
    assign_groups,
    cut,
    order_for_ranks,
    padded_size,
)
from verl_vla.trainer.grpo.rows import RowKey
from verl_vla.trainer.grpo.trainer import VLATrainer

EPISODES = st.lists(st.integers(1, 12), min_size=1, max_size=5)
"""Policy steps of the episodes of a group."""
STEPS = st.lists(EPISODES, min_size=1, max_size=12)
"""Groups of a training step."""


def keys_of(step: list[list[int]], first: int = 0) -> list[str]:
    return [
        str(RowKey(first + group, member, index))
        for group, episodes in enumerate(step)
        for member, length in enumerate(episodes)
        for index in range(length)
    ]


def slices(keys: list[str], num_mini_batches: int, num_ranks: int) -> list[set[str]]:
    """The rows of every optimizer step, as veRL cuts them."""
    runs = KVBatchMeta(keys=keys, tags=[{}] * len(keys)).chunk(num_ranks)
    steps: list[set[str]] = [set() for _ in range(num_mini_batches)]
    for run in runs:
        size, rest = divmod(len(run), num_mini_batches)
        assert rest == 0
        for number, step in enumerate(steps):
            step |= set(run.keys[number * size : (number + 1) * size])
    return steps


def padding_of(parts: list[MiniBatch], num_ranks: int) -> list[str]:
    real = sum(len(part.keys) for part in parts)
    return [f"pad_{i}_0" for i in range(padded_size(parts, num_ranks) * len(parts) - real)]


@given(st.lists(st.integers(0, 600), min_size=1, max_size=70), st.integers(1, 16))
def test_every_group_is_in_one_mini_batch_and_all_have_equally_many(num_rows, wanted):
    number = min(wanted, len(num_rows))
    parts = assign_groups(num_rows, number)
    assert len(parts) == number
    assert sorted(group for part in parts for group in part) == list(range(len(num_rows)))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    totals = [sum(num_rows[group] for group in part) for part in parts]
    # the rule counts one row more a group
    assert max(totals) - min(totals) <= max(num_rows) + 2
    largest = sorted(num_rows)[-number:]
    assert min(totals) >= min(largest), "the largest groups are apart"


def test_a_place_without_a_group_weighs_less_than_any_group():
    """Of 16 and 15 rows; a place that weighed more would leave 17 and 14."""
    assert assign_groups([8, 8, 9, 5, 1], 2) == [[0, 1], [2, 3, 4]]


@given(st.lists(st.integers(0, 600), min_size=4, max_size=20))
def test_the_assignment_is_the_same_each_time(num_rows):
    assert assign_groups(num_rows, 4) == assign_groups(list(num_rows), 4)


def test_the_first_optimizer_step_is_not_the_one_of_most_rows():
    rng = np.random.default_rng(0)
    first = []
    for _ in range(200):
        num_rows = rng.integers(64, 513, 8).tolist()
        totals = [sum(num_rows[group] for group in part) for part in assign_groups(num_rows, 4)]
        first.append(totals[0] == max(totals))
    assert 0.1 < np.mean(first) < 0.4


@given(STEPS, st.integers(1, 6), st.integers(1, 5), st.randoms(use_true_random=False))
def test_verls_slices_are_the_mini_batches(step, wanted, num_ranks, random):
    keys = keys_of(step)
    random.shuffle(keys)
    parts = cut(keys, set(), wanted)
    padding = padding_of(parts, num_ranks)
    lengths = {key: random.randint(60, 130) for key in [*keys, *padding]}
    order = order_for_ranks(parts, padding, lengths, num_ranks)
    assert sorted(order) == sorted(keys + padding)
    found = slices(order, len(parts), num_ranks)
    assert [{key for key in step if key in lengths and key[0] == "g"} for step in found] == [
        set(part.keys) for part in parts
    ]
    largest = max(map(sum, step))
    assert len(padding) <= len(parts) * (num_ranks - 1) + (len(parts) - 1) * (largest + 2)


@given(STEPS, st.integers(1, 6), st.randoms(use_true_random=False))
def test_a_denominator_counts_the_episodes_of_its_own_groups(step, wanted, random):
    keys = keys_of(step, first=95)
    agreed = {95 + group for group in range(len(step)) if random.random() < 0.4}
    assume(len(agreed) < len(step))
    idle = {key for key in keys if RowKey.parse(key).group in agreed}
    parts = cut(keys, idle, wanted)
    assert len(parts) == min(wanted, len(step) - len(agreed))
    assert all(part.keys for part in parts)
    assert sum(part.num_trajectories for part in parts) == sum(map(len, step))
    for part in parts:
        groups = {RowKey.parse(key).group for key in part.keys}
        own = sum(len(step[group - 95]) for group in groups)
        others = sum(len(step[group - 95]) for group in agreed)
        assert own <= part.num_trajectories <= own + others


def test_rows_stay_in_the_order_in_which_they_were_sampled():
    keys = keys_of([[11, 2], [3]], first=9)
    (part,) = cut(keys[::-1], set(), 1)
    assert part == MiniBatch(keys=keys, num_trajectories=3)


LONGEST = 64
"""Policy steps of a failure: 512 of LIBERO-Long's steps in chunks of 8."""


def outcomes(rng: np.random.Generator) -> list[int]:
    """Eight episodes of one start: failures run to the limit, successes end alike."""
    ends = rng.integers(8, LONGEST - 8) + rng.integers(0, 8, 8)
    return np.where(rng.random(8) < rng.uniform(0.1, 0.9), ends, LONGEST).tolist()


def evenly(rng: np.random.Generator) -> list[int]:
    """Eight episodes of any length."""
    return rng.integers(8, LONGEST + 1, 8).tolist()


def padding_shares(
    lengths: Callable[[np.random.Generator], list[int]], num_groups: int, num_ranks: int
) -> list[float]:
    """What padding is of all rows of training steps with 4 mini-batches."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(12):
        step = [lengths(rng) for _ in range(num_groups)]
        parts = cut(keys_of(step), set(), 4)
        assert {part.num_trajectories for part in parts} == {8 * num_groups // 4}
        padding, rows = len(padding_of(parts, num_ranks)), sum(map(sum, step))
        shares.append(padding / (rows + padding))
    return shares


@pytest.mark.parametrize("lengths", [outcomes, evenly])
def test_padding_is_a_small_share_of_a_large_training_step(lengths):
    assert max(padding_shares(lengths, num_groups=64, num_ranks=8)) < 0.003


@pytest.mark.parametrize("lengths", [outcomes, evenly])
def test_two_groups_a_mini_batch_can_be_balanced_less_well(lengths):
    shares = padding_shares(lengths, num_groups=8, num_ranks=1)
    assert 0.02 < np.mean(shares) < 0.065
    assert max(shares) < 0.2


def test_verl_does_not_order_rows_that_the_update_orders_anyway():
    trainer = object.__new__(VLATrainer)
    recipe = SimpleNamespace(cluster=GRPOClusterConfig(ranks_per_node=2))
    vars(trainer).update(recipe=recipe, tokenizer=SimpleNamespace(eos_token_id=0))
    keys = [str(RowKey(0, 0, step)) for step in range(4)]
    # the lengths would be paired as 9 + 1 and 8 + 2
    tags = [{"seq_len": length} for length in (9, 8, 2, 1)]
    batch = KVBatchMeta(keys=list(keys), tags=tags, partition_id="train")
    assert trainer._balance_batch(batch, {}).keys == keys
