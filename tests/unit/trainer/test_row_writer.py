"""Rows of episodes, stored in a thread of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from row_store import RowStore
from row_store import one_by_one as rows_of
from step_tables import episode_column, step_tables

from verl_vla.core.episode import Outcome
from verl_vla.core.tables import Trajectories
from verl_vla.trainer.grpo import row_writer
from verl_vla.trainer.grpo.row_writer import RowWriter
from verl_vla.trainer.grpo.rows import RowKey, make_rows

CHUNK, DIM = 4, 2
TOKENS = CHUNK * DIM
LENGTHS = [2, 1, 3, 2]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> RowStore:
    store = RowStore()
    store.stand_in(monkeypatch)
    return store


def played(outcomes: list[Outcome] | None = None) -> Trajectories:
    """Two groups of two episodes of `LENGTHS` policy steps."""
    episode, is_last = episode_column(LENGTHS)
    count = len(episode)
    return step_tables(
        [5, 5, 6, 6],
        episode,
        image=torch.arange(count, dtype=torch.uint8)[:, None, None, None, None].expand(
            count, 1, 2, 2, 3
        ),
        action_tokens=torch.arange(count * TOKENS).view(count, TOKENS),
        log_probs=-torch.ones(count, TOKENS),
        executed=torch.where(is_last, 1, CHUNK),
        prompt_ids=[torch.arange(3)] * count,
        outcome=torch.tensor([int(o) for o in outcomes or [Outcome.SUCCESS] * 4]),
    )


def one_by_one(trajectories: Trajectories) -> list[Trajectories]:
    count = len(trajectories.episodes)
    return [trajectories.select(torch.arange(count) == b) for b in range(count)]


def write(parts: list[Trajectories]) -> None:
    with RowWriter(chunk_length=CHUNK, global_step=3) as writer:
        for part in parts:
            writer.add(part)


def comparable(row: dict[str, Any]) -> dict[str, Any]:
    return {n: v.tolist() if isinstance(v, torch.Tensor) else v for n, v in row.items()}


@pytest.mark.parametrize("rows_a_put", [1, 3, 4, 100])
@pytest.mark.parametrize("in_one", [True, False], ids=["all at once", "one by one"])
def test_rows_are_the_same_however_they_arrive(
    store: RowStore, monkeypatch: pytest.MonkeyPatch, rows_a_put: int, in_one: bool
) -> None:
    monkeypatch.setattr(row_writer, "ROWS_A_PUT", rows_a_put)
    whole = played()
    write([whole] if in_one else one_by_one(whole))
    keys, fields, tags = make_rows(whole, chunk_length=CHUNK, global_step=3)
    # in the order in which episodes end
    assert [key for put in store.puts for key in put] == keys
    assert [comparable(store.rows[key]) for key in keys] == list(map(comparable, rows_of(fields)))
    assert [store.tags[key] for key in keys] == tags
    # an episode is not cut where episodes come one by one
    most = rows_a_put if in_one else rows_a_put + max(LENGTHS) - 1
    assert max(map(len, store.puts)) <= most


def test_a_crashed_episode_has_no_rows(store: RowStore) -> None:
    outcomes = [Outcome.SUCCESS, Outcome.CRASH, Outcome.TIMEOUT, Outcome.CRASH]
    write(one_by_one(played(outcomes)))
    assert {(k.group, k.episode) for k in map(RowKey.parse, store.rows)} == {(5, 0), (6, 2)}


def test_the_first_error_of_a_put_is_raised_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    store = RowStore()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no memory")

    store.stand_in(monkeypatch)
    monkeypatch.setattr(row_writer.tq, "kv_batch_put", refuse)
    with pytest.raises(OSError, match="no memory"):
        write(one_by_one(played()))


def test_an_error_of_the_rollout_is_not_hidden_by_what_is_left_to_store(store: RowStore) -> None:
    with (
        pytest.raises(RuntimeError, match="lost"),
        RowWriter(chunk_length=CHUNK, global_step=3) as writer,
    ):
        writer.add(played())
        raise RuntimeError("lost")
