"""Dynamic sampling at the border, with a dictionary in place of TransferQueue's processes."""

from __future__ import annotations

from typing import Any

import pytest
import transfer_queue as tq

from verl_vla.config.grpo import SamplingConfig
from verl_vla.core.errors import StarvedError
from verl_vla.trainer.grpo.replay_buffer import GroupReplayBuffer
from verl_vla.trainer.grpo.rows import group_key

KNOBS = {"groups_per_step": 2, "group_size": 2, "temperature": 1.0, "max_rounds": 3}


class Store:
    """The tags of one partition; a group is played as soon as it is asked for."""

    def __init__(self, solved: dict[int, int]) -> None:
        self.tags: dict[str, dict[str, Any]] = {}
        self.played: list[int] = []
        self._solved = solved
        """Of two episodes, by group; -1: both crashed."""

    def play(self, number: int) -> int:
        for _ in range(number):
            self._play_group(len(self.played))
        return number

    def kv_list(self, partition_id: str | None = None) -> dict[str, dict[str, Any]]:
        return {"train": dict(self.tags)}

    def kv_clear(self, *, partition_id: str, keys: list[str]) -> None:
        for key in keys:
            del self.tags[key]

    def _play_group(self, group: int) -> None:
        solved = self._solved[group]
        crashed = 2 if solved < 0 else 0
        self.played.append(group)
        # rows arrive in no order at all; ten policy steps sort after two only as numbers
        for member in range(0 if crashed else 2):
            for place in reversed(range(11)):
                self.tags[f"{group_key(group)}_{member}_{place}"] = {"seq_len": 9}
        self.tags[group_key(group)] = {
            "is_prompt": True,
            "status": "finished",
            "global_steps": 1,
            "task_id": 0,
            "num_solved": max(solved, 0),
            "num_failed": 0 if crashed else 2 - solved,
            "num_crashed": crashed,
            "score_spread": float(solved == 1),
        }


@pytest.fixture
def sample(monkeypatch):
    """Play a step whose groups have these numbers of solved episodes; return batch and store."""

    def sample_step(*solved: int, **options: Any):
        store = Store(dict(enumerate(solved)))
        monkeypatch.setattr(tq, "kv_list", store.kv_list)
        monkeypatch.setattr(tq, "kv_clear", store.kv_clear)
        buffer = GroupReplayBuffer(
            trainer_mode="sync",
            trainer_config={},
            max_off_policy_threshold=None,
            max_off_policy_strategy="drop",
            sampler_kwargs=KNOBS | options,
            refill_fn=store.play,
        )
        store.play(SamplingConfig(**(KNOBS | options)).groups_per_step)
        return *buffer.sample(1, "train", batch_size=2), store

    return sample_step


def rows_of(group: int) -> list[str]:
    return [f"g{group}_{member}_{place}" for member in range(2) for place in range(11)]


def test_groups_that_disagree_are_taken_as_they_are(sample):
    batch, metrics, store = sample(1, 1)
    assert batch.keys == rows_of(0) + rows_of(1)
    assert len(batch.tags) == len(batch.keys)
    assert metrics == {"sampling/groups_played": 2, "sampling/groups_kept": 2, "sampling/rounds": 1}
    assert store.played == [0, 1]


def test_just_as_many_groups_are_played_again_as_were_dropped(sample):
    batch, metrics, store = sample(0, 1, 2, 1)
    assert batch.keys == rows_of(1) + rows_of(3)
    assert metrics == {"sampling/groups_played": 4, "sampling/groups_kept": 2, "sampling/rounds": 3}
    assert store.played == [0, 1, 2, 3]


def test_nothing_of_a_dropped_group_and_no_prompt_stays_in_the_store(sample):
    batch, _, store = sample(0, 1, 2, 1)
    assert set(store.tags) == set(batch.keys)


def test_at_the_cap_the_step_goes_on_with_what_it_has(sample):
    batch, metrics, _ = sample(0, 0, 1, 0, 2)
    assert batch.keys == rows_of(2)
    assert metrics == {"sampling/groups_played": 5, "sampling/groups_kept": 1, "sampling/rounds": 3}


def test_a_group_that_was_lost_whole_is_replaced(sample):
    batch, metrics, store = sample(-1, 1, 1)
    assert batch.keys == rows_of(1) + rows_of(2)
    assert (metrics["sampling/groups_played"], store.played) == (3, [0, 1, 2])


def test_a_step_that_teaches_nothing_stops_with_a_reason(sample):
    with pytest.raises(StarvedError, match="6 groups .12 episodes. were played in 3 rounds"):
        sample(0, 0, 0, 0, 0, 0)


def test_without_dynamic_sampling_agreeing_groups_are_trained_on(sample):
    batch, metrics, _ = sample(0, 2, dynamic=False)
    assert batch.keys == rows_of(0) + rows_of(1)
    assert metrics["sampling/rounds"] == 1


def test_groups_come_in_the_order_of_their_numbers(sample):
    batch, _, _ = sample(*[1] * 12, groups_per_step=12)
    assert batch.keys == [key for group in range(12) for key in rows_of(group)]
