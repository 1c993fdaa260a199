"""Ranks as threads of this process: the collectives that the trainer's own code calls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor

PATIENCE_S = 60.0
"""Time after which a rank that waits for its turn gives up."""


class PartedError(RuntimeError):
    """Ranks have called different collectives, or one has ended while others wait for it."""


class ThreadRanks:
    """A process group whose ranks are threads that take turns.

    A rank moves alone until it calls a collective; then the next one moves. Whatever a rank does
    between two collectives, the others see either all of it or nothing, as ``first`` decides: so a
    missing barrier shows each time and not once in a while.

    Args:
        num_ranks: number of ranks.
        first: the rank that moves first.
    """

    def __init__(self, num_ranks: int, first: int = 0) -> None:
        self._num_ranks = num_ranks
        self._turn = first
        self._moved = threading.Condition()
        self._running = set(range(num_ranks))
        self._given: dict[int, tuple[str, Any]] = {}
        """What the ranks bring to the collective that not all have reached yet."""
        self._answers: list[Any] = []
        """What all have brought to the last one."""
        self._errors: list[BaseException] = []
        self._local = threading.local()

    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in (
            *("get_rank", "get_world_size", "barrier", "broadcast", "all_reduce"),
            *("broadcast_object_list", "all_gather_object"),
        ):
            monkeypatch.setattr(torch.distributed, name, getattr(self, name))

    def run(self, *works: Callable[[], Any]) -> list[Any]:
        """Run one function on each rank; return what they return, or raise what one raised."""
        answers: list[Any] = [None] * self._num_ranks

        def work(rank: int) -> None:
            self._local.rank = rank
            try:
                self._wait(rank)
                answers[rank] = works[rank]()
            except BaseException as error:  # noqa: BLE001 -- raised again by the test's thread
                self._errors.append(error)
            self._running.discard(rank)
            self._pass_on(rank)

        threads = [threading.Thread(target=work, args=(r,)) for r in range(self._num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        return answers

    def get_rank(self, group: Any = None) -> int:
        return self._local.rank

    def get_world_size(self, group: Any = None) -> int:
        return self._num_ranks

    def barrier(self, group: Any = None) -> None:
        self._exchange("barrier", None)

    def broadcast(self, tensor: Tensor, src: int) -> None:
        tensor.copy_(self._exchange("broadcast", tensor.clone())[src])

    def all_reduce(
        self, tensor: Tensor, op: Any = torch.distributed.ReduceOp.SUM, group: Any = None
    ) -> None:
        given = torch.stack(self._exchange("all_reduce", tensor.clone()))
        is_sum = op == torch.distributed.ReduceOp.SUM
        tensor.copy_(given.sum(0) if is_sum else given.min(0).values)

    def broadcast_object_list(self, box: list[Any], src: int) -> None:
        box[:] = self._exchange("broadcast_object_list", list(box))[src]

    def all_gather_object(self, parts: list[Any], value: Any) -> None:
        parts[:] = self._exchange("all_gather_object", value)

    def _exchange(self, what: str, value: Any) -> list[Any]:
        """What every rank gives, in the order of ranks."""
        rank = self._local.rank
        self._given[rank] = what, value
        if len(self._given) == self._num_ranks:
            names, self._answers = zip(
                *(self._given[one] for one in range(self._num_ranks)), strict=True
            )
            self._given.clear()
            if set(names) != {what}:
                raise PartedError(f"the ranks have called {names}")
        self._pass_on(rank)
        self._wait(rank)
        return list(self._answers)

    def _pass_on(self, rank: int) -> None:
        others = [(rank + step) % self._num_ranks for step in range(1, self._num_ranks + 1)]
        with self._moved:
            self._turn = next((other for other in others if other in self._running), rank)
            self._moved.notify_all()

    def _wait(self, rank: int) -> None:
        """Wait for this rank's turn; raise where a collective will never be complete."""
        with self._moved:
            if not self._moved.wait_for(lambda: self._turn == rank, PATIENCE_S):
                raise TimeoutError(f"rank {rank} has not had its turn")
        is_waiting = rank in self._given
        if is_waiting and (self._errors or len(self._running) < self._num_ranks):
            raise PartedError(f"rank {rank} waits in {self._given[rank][0]}, and another has ended")
