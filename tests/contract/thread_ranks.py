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
"""Time after which a rank that waits alone gives up."""


class ThreadRanks:
    """A process group whose ranks are threads; a rank that raises ends the waiting of the others.

    Every collective also checks that all ranks have called the same one.
    """

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._meeting = threading.Barrier(num_ranks, timeout=PATIENCE_S)
        self._given: list[Any] = [None] * num_ranks
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
        errors: list[BaseException] = []

        def work(rank: int) -> None:
            self._local.rank = rank
            try:
                answers[rank] = works[rank]()
            except threading.BrokenBarrierError as error:
                errors.append(error)
            except BaseException as error:  # noqa: BLE001 -- raised again by the test's thread
                errors.insert(0, error)
                self._meeting.abort()

        threads = [threading.Thread(target=work, args=(r,)) for r in range(self._num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
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
        self._given[self._local.rank] = what, value
        self._meeting.wait()
        names, values = zip(*self._given, strict=True)
        assert set(names) == {what}, f"the ranks have parted: {names}"
        # nobody gives anything new before everybody has read
        self._meeting.wait()
        return list(values)
