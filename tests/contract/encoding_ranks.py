"""The ranks of a run as an encoder sees them, all in this process."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError
from verl.single_controller.ray.base import RayWorkerGroup, func_generator

from verl_vla.trainer.grpo import worker
from verl_vla.trainer.grpo.cluster_encoder import RankEncoders
from verl_vla.trainer.grpo.worker import VLAWorker


@dataclass
class Call:
    """A call that a rank was sent, carried out when its answer is asked for."""

    rank: int
    method: str
    arguments: bytes
    """Pickled: what the driver holds may change after it was sent."""


class EncodingRanks(RayWorkerGroup):
    """veRL's group of `VLAWorker`, with its dispatch, whose ranks have nothing but encoders."""

    def __init__(self, num_ranks: int) -> None:
        self.ranks = [RankEncoders() for _ in range(num_ranks)]
        self._workers: list[Any] = [Handle(rank, self) for rank in range(num_ranks)]
        self._world_size = num_ranks
        self.fused_worker_used = False
        self.waiting = 0
        """Batches that were sent and are not computed."""
        self.most_waiting = 0
        self.computed: list[int] = []
        """Rank of each batch, in the order in which they were computed."""
        self.times_freed = 0
        self._bind_worker_method(VLAWorker, func_generator)

    def stand_in(self, monkeypatch: pytest.MonkeyPatch, device: str = "cpu") -> None:
        monkeypatch.setattr(ray, "get", self._get)
        monkeypatch.setattr(worker, "get_device_name", lambda: device)

    def send(self, rank: int, method: str, *arguments: Any) -> Call:
        if method == "compute_features" and arguments[1] is not None:
            self.waiting += 1
            self.most_waiting = max(self.most_waiting, self.waiting)
        return Call(rank, method, pickle.dumps(arguments))

    def _get(self, calls: Call | list[Call]) -> Any:
        return (
            [self._answer(call) for call in calls]
            if isinstance(calls, list)
            else (self._answer(calls))
        )

    def _answer(self, call: Call) -> Any:
        arguments = pickle.loads(call.arguments)
        if call.method == "compute_features":
            self.waiting -= 1
            self.computed.append(call.rank)
        self.times_freed += call.method == "free_encoders" and call.rank == 0
        here = SimpleNamespace(_encoders=self.ranks[call.rank])
        try:
            return getattr(VLAWorker, call.method)(here, *arguments)
        except Exception as error:  # noqa: BLE001 -- as Ray does
            raise RayTaskError(call.method, "traceback", error).as_instanceof_cause() from None


class Handle:
    """A rank as Ray hands it out."""

    def __init__(self, rank: int, group: EncodingRanks) -> None:
        self._rank, self._group = rank, group

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any) -> Call:
            return self._group.send(self._rank, method, *arguments)

        return SimpleNamespace(remote=remote)
