"""The ranks of a run as an encoder sees them, all in this process."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from verl_vla.rewards.encoders.base import BatchedEncoder
from verl_vla.trainer.grpo import cluster_encoder
from verl_vla.trainer.grpo.cluster_encoder import RankEncoders


class EncodingRanks:
    """A group of workers that computes a batch when its answer is asked for."""

    def __init__(self, num_ranks: int, device: str = "cpu") -> None:
        self.ranks = [RankEncoders() for _ in range(num_ranks)]
        self.device = device
        self.computed: list[int] = []
        """Rank of each batch, in the order in which they were computed."""
        self.waiting = 0
        self.most_waiting = 0
        self.times_freed = 0

    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cluster_encoder.ray, "get", self._get)

    def make_encoders(self, remakes: list[Callable[[str], BatchedEncoder]]) -> None:
        for rank in self.ranks:
            rank.make(pickle.loads(pickle.dumps(remakes)), self.device)

    def compute_features(self, indices: list[int], images: list[Any]) -> list[Any]:
        assert len(indices) == len(images) == len(self.ranks), "one for each rank"
        self.waiting += sum(batch is not None for batch in images)
        self.most_waiting = max(self.most_waiting, self.waiting)
        # as Ray has it: what the driver holds may change after it was sent
        return [
            (rank, index, pickle.loads(pickle.dumps(batch)))
            for rank, (index, batch) in enumerate(zip(indices, images, strict=True))
        ]

    def name_feature_space(self, index: int) -> list[str]:
        return [rank.name_space(index) for rank in self.ranks]

    def free_encoders(self) -> None:
        self.times_freed += 1
        for rank in self.ranks:
            rank.free()

    def _get(self, answer: tuple[int, int, Any]) -> Any:
        rank, index, batch = answer
        self.waiting -= 1
        self.computed.append(rank)
        try:
            return self.ranks[rank].compute(index, batch)
        except Exception as error:  # noqa: BLE001 -- as Ray does
            raise RayTaskError("compute_features", "traceback", error) from None
