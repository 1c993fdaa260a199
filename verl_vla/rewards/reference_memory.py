"""Successes of a run, kept across training steps, as references for failures of the same task.

With it a group in which every episode failed can still give a learning signal, and a task with one
success in a step is not measured against that one only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.rewards.base import Rows, TrajectoryBatch
from verl_vla.rewards.features import is_valid

SAME_START = 3
"""Number of references of the same init state that suffice without those of the task's other init
states. With two, one outlier would have as much weight as the other reference."""


@dataclass(frozen=True, slots=True)
class Reference:
    """One success."""

    episode_id: int
    init_state_id: int
    features: Rows
    """[T, D]"""
    updated_at: int
    """Count of `ReferenceMemory.add` calls before it was added."""


@dataclass(frozen=True, slots=True)
class References:
    """References that one failure is measured against, in the order of their episode ids."""

    items: tuple[Reference, ...]
    source: str
    """``batch``, ``memory``, ``batch+memory`` or ``none``."""


class ReferenceMemory:
    """The newest successes of each task whose features differ; the oldest are removed first."""

    def __init__(self, capacity: int, max_age: int) -> None:
        """Make an empty memory.

        Args:
            capacity: successes kept of one task.
            max_age: updates after which a success is removed, since the policy has changed.

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
        """Number of `add` calls."""
        return self._num_updates

    def of_task(self, task_key: str) -> tuple[Reference, ...]:
        """Return the references of one task, oldest first."""
        return tuple(self._tasks[task_key]) if task_key in self._tasks else ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that have references, in alphabetical order."""
        return tuple(sorted(self._tasks))

    def check_space(self, batch: TrajectoryBatch) -> None:
        """Check that the features of a batch can be compared with those kept.

        Raises:
            ContractError: they were made by another encoder.
        """
        if self._feature_space not in (None, batch.feature_space):
            raise ContractError(
                f"features are of {batch.feature_space!r}, but the references of "
                f"{self._feature_space!r}: another encoder, other weights or other preprocessing "
                "made them; use the encoder that the run began with, or begin a new run"
            )

    def select(self, batch: TrajectoryBatch, task_key: str, init_state_id: int) -> References:
        """Collect the references of a failure of this task and init state.

        They are successes of the batch and of the memory, always of the same task. If at least
        `SAME_START` of them have the same init state, only those are used.
        """
        of_batch = self._of_batch(batch, task_key)
        present = {r.episode_id for r in of_batch}
        # an episode that is in both counts once
        kept = [r for r in self.of_task(task_key) if r.episode_id not in present]
        same_start = [r for r in (*of_batch, *kept) if r.init_state_id == init_state_id]
        chosen = same_start if len(same_start) >= SAME_START else [*of_batch, *kept]
        # the same order whatever the batch's, so that sums round alike
        chosen.sort(key=lambda r: r.episode_id)
        from_batch = any(r.episode_id in present for r in chosen)
        from_memory = any(r.episode_id not in present for r in chosen)
        words = [w for w, used in (("batch", from_batch), ("memory", from_memory)) if used]
        return References(tuple(chosen), "+".join(words) or "none")

    def add(self, batch: TrajectoryBatch) -> None:
        """Add the valid successes of a scored training batch; remove old and surplus references.

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
                # a policy that repeats itself would fill the memory with one episode
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
            # the newest are at the end
            self._tasks[task_key] = young[-self._capacity :]

    def state_dict(self) -> dict[str, Any]:
        """Return the complete state, as plain values and tensors."""
        return {
            "feature_space": self._feature_space,
            "num_updates": self._num_updates,
            "tasks": {
                key: [
                    {
                        "episode_id": r.episode_id,
                        "init_state_id": r.init_state_id,
                        # a checkpoint is read back with plain values and tensors only
                        "features": torch.from_numpy(r.features.copy()),
                        "updated_at": r.updated_at,
                    }
                    for r in kept
                ]
                for key, kept in self._tasks.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
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
            if key == task_key and batch.success[row] and is_valid(batch.features[row])
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
    """Return all references but one, so that this one can be measured against the others."""
    return [r for i, r in enumerate(references) if i != index]
