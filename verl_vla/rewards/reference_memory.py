"""Successes of a run, kept across training steps, that failures of the same task are held against.

With it a group in which every episode failed can still teach something, and a task with one
success in a step is not judged by that one alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.rewards.base import Rows, TrajectoryBatch
from verl_vla.rewards.features import is_sound

SAME_START = 3
"""References of the same init state that suffice without those of the task's other init states.
Two cannot outvote an odd one."""


@dataclass(frozen=True, slots=True)
class Reference:
    """One success."""

    episode_id: int
    init_state_id: int
    features: Rows
    """[T, D]"""
    updated_at: int
    """Count of `ReferenceMemory.add` calls before it came."""


@dataclass(frozen=True, slots=True)
class References:
    """What one failure is measured against, in the order of their episode ids."""

    items: tuple[Reference, ...]
    source: str
    """``batch``, ``memory``, ``batch+memory`` or ``none``."""


class ReferenceMemory:
    """Per task, the newest successes whose features differ; oldest out first."""

    def __init__(self, capacity: int, max_age: int) -> None:
        """Make an empty one.

        Args:
            capacity: successes kept of one task.
            max_age: updates after which a success is forgotten, since the policy has moved on.

        Raises:
            ConfigError: a number below 1.
        """
        for name, value in (("capacity", capacity), ("max_age", max_age)):
            if value < 1:
                raise ConfigError(f"memory_{name} is {value}; set at least 1")
        self._capacity = capacity
        self._max_age = max_age
        self._tasks: dict[str, list[Reference]] = {}
        self._feature_space: str | None = None
        self._num_updates = 0

    def __len__(self) -> int:
        return sum(len(kept) for kept in self._tasks.values())

    @property
    def num_updates(self) -> int:
        """How often `add` was called."""
        return self._num_updates

    def of_task(self, task_key: str) -> tuple[Reference, ...]:
        """What is kept of one task, oldest first."""
        return tuple(self._tasks[task_key]) if task_key in self._tasks else ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of which there is anything, in alphabetical order."""
        return tuple(sorted(self._tasks))

    def check_space(self, batch: TrajectoryBatch) -> None:
        """Refuse features that cannot be compared with those kept.

        Raises:
            ContractError: they were made by another encoder.
        """
        if self._feature_space not in (None, batch.feature_space):
            raise ContractError(
                f"features are of {batch.feature_space!r}, but the references of "
                f"{self._feature_space!r}: another encoder, other weights or other preprocessing "
                "made them; go on with the encoder that the run began with, or begin a new run"
            )

    def select(self, batch: TrajectoryBatch, task_key: str, init_state_id: int) -> References:
        """Collect what a failure of this task and start is measured against.

        Successes of the batch count as well as those kept. Those of the same init state are
        preferred where there are `SAME_START` of them; another task is never touched.
        """
        of_batch = self._of_batch(batch, task_key)
        present = {r.episode_id for r in of_batch}
        kept = [r for r in self.of_task(task_key) if r.episode_id not in present]
        same_start = [r for r in (*of_batch, *kept) if r.init_state_id == init_state_id]
        chosen = same_start if len(same_start) >= SAME_START else [*of_batch, *kept]
        chosen.sort(key=lambda r: r.episode_id)
        from_batch = any(r.episode_id in present for r in chosen)
        from_memory = any(r.episode_id not in present for r in chosen)
        words = [w for w, used in (("batch", from_batch), ("memory", from_memory)) if used]
        return References(tuple(chosen), "+".join(words) or "none")

    def add(self, batch: TrajectoryBatch) -> None:
        """Keep the sound successes of a scored training batch; forget what is too old or too much.

        Raises:
            ContractError: the batch is held out, or of another feature space.
        """
        if batch.split != "train":
            raise ContractError("held-out episodes were offered as references; never learn of them")
        self.check_space(batch)
        self._feature_space = batch.feature_space
        for task_key in sorted(set(batch.task_key)):
            kept = list(self.of_task(task_key))
            seen = {_digest(r.features) for r in kept}
            for reference in self._of_batch(batch, task_key):
                digest = _digest(reference.features)
                if digest not in seen:
                    seen.add(digest)
                    kept.append(reference)
            self._tasks[task_key] = kept
        self._num_updates += 1
        for task_key in self.tasks:
            young = [
                r
                for r in self._tasks[task_key]
                if self._num_updates - r.updated_at <= self._max_age
            ]
            self._tasks[task_key] = young[-self._capacity :]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain values and tensors."""
        return {
            "feature_space": self._feature_space,
            "num_updates": self._num_updates,
            "tasks": {
                key: [
                    {
                        "episode_id": r.episode_id,
                        "init_state_id": r.init_state_id,
                        "features": torch.from_numpy(r.features.copy()),
                        "updated_at": r.updated_at,
                    }
                    for r in kept
                ]
                for key, kept in self._tasks.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._feature_space = state["feature_space"]
        self._num_updates = state["num_updates"]
        self._tasks = {
            key: [
                Reference(
                    r["episode_id"], r["init_state_id"], r["features"].numpy(), r["updated_at"]
                )
                for r in kept
            ]
            for key, kept in state["tasks"].items()
        }

    def _of_batch(self, batch: TrajectoryBatch, task_key: str) -> list[Reference]:
        if batch.features is None:
            raise ContractError("references need features, and the batch has none")
        rows = [
            row
            for row, key in enumerate(batch.task_key)
            if key == task_key and batch.success[row] and is_sound(batch.features[row])
        ]
        rows.sort(key=lambda row: int(batch.episode_id[row]))
        return [
            Reference(
                int(batch.episode_id[row]),
                int(batch.init_state_id[row]),
                batch.features[row],
                self._num_updates,
            )
            for row in rows
        ]


def _digest(features: Rows) -> bytes:
    return hashlib.sha256(str(features.shape).encode() + features.tobytes()).digest()


def without(references: Sequence[Reference], index: int) -> list[Reference]:
    """All references but one, to see how a success looks to the others."""
    return [r for i, r in enumerate(references) if i != index]
