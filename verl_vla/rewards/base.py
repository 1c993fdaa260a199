"""What a reward plug-in must look like.

A reward sees whole groups of finished trajectories at once, since progress is measured against
sibling successes. It never sees the policy, the trainer or the simulator. Plug-ins are plain
Python files: `rewards/binary.py` is the smallest, docs/add-a-reward.md shows how to write one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from verl_vla.core.episode import GoalReadings

Rows = npt.NDArray[np.float32]
"""[T, D], the features of one episode in the order of its policy steps."""

Need = Literal["frames", "proprio", "features", "goals"]
"""What a reward may ask for beyond the outcome: the images that the policy saw, the joint readings,
what its own `encoder` makes of the images, or the simulator's distances to the goals."""

Split = Literal["train", "held_out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryBatch:
    """Finished trajectories of whole groups; crashed episodes are already gone.

    Dimensions as in `verl_vla.core.tables`; row b of every field is the same episode.
    """

    episode_id: npt.NDArray[np.int64]
    """[B], unique in the run."""
    group_id: npt.NDArray[np.int64]
    """[B], episodes compared with each other."""
    task_key: tuple[str, ...]
    """B strings ``suite/task_id``; features of different tasks must never be compared."""
    init_state_id: npt.NDArray[np.int64]
    """[B], the recorded start within the task."""
    success: npt.NDArray[np.bool_]
    """[B], from the simulator."""
    num_steps: npt.NDArray[np.int64]
    """[B], simulator steps the policy chose."""
    frames: tuple[npt.NDArray[np.uint8], ...] | None
    """B arrays [policy steps + 1, V, H, W, 3]: what the policy saw before each policy step, and the
    image after the last one, in which a success can be seen; None unless required."""
    proprio: tuple[npt.NDArray[np.float32], ...] | None
    """B arrays [policy steps, P]; None unless required."""
    goals: tuple[GoalReadings, ...] | None = None
    """B arrays [policy steps + 1, G, 3], columns as in `Reading`, the start first and the end last;
    None unless required. Only a simulator has them: a reward that needs them cannot leave it."""
    features: tuple[Rows, ...] | None = None
    """B arrays [T, D] of the reward's encoder, ragged in T; None unless required."""
    feature_space: str | None = None
    """`FeatureExtractor.feature_space` of what made ``features``; None without them."""
    split: Split = "train"
    """Held-out trajectories are scored but must never change a reward's state."""

    def __len__(self) -> int:
        return len(self.episode_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """One number per episode, and the parts it was made of."""

    score: npt.NDArray[np.float32]
    """[B] finite; what the advantage is computed from."""
    progress: npt.NDArray[np.float32]
    """[B] raw measure of progress before scaling; NaN where unknown."""
    status: tuple[str, ...]
    """B words saying how each score came about, e.g. ``success`` or ``failure``."""
    num_references: npt.NDArray[np.int64] | None = None
    """[B] successes that each score was measured against; None where none ever are."""
    reference_source: tuple[str, ...] | None = None
    """B words: ``batch``, ``memory``, ``batch+memory`` or ``none``; None as above."""
    max_score: float = 1.0
    """The largest score this reward may give; a larger one is refused."""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """Logged under ``reward/``."""


class StatelessReward:
    """What a reward that learns nothing and keeps nothing need not write down."""

    requires: frozenset[Need] = frozenset()

    def update(self, batch: TrajectoryBatch) -> Mapping[str, float]:
        """Nothing is learned."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is restored."""


class FeatureExtractor(Protocol):
    """Turns images into numbers that a reward compares; see `verl_vla.rewards.encoders`."""

    @property
    def feature_space(self) -> str:
        """Names weights, layer and preprocessing; features of two spaces are never compared."""
        ...

    def encode(self, frames: Sequence[npt.NDArray[np.uint8]]) -> list[Rows]:
        """Map episodes [T, H, W, 3], ragged in T, to [T', D]; each as if it were alone."""
        ...


class TrajectoryReward(Protocol):
    """Scores trajectories. The constructor takes its arguments from the recipe."""

    requires: frozenset[Need]
    """What `TrajectoryBatch` must hold beyond the outcome."""

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        """Return one score per episode, in the order of the batch."""
        ...

    def update(self, batch: TrajectoryBatch) -> Mapping[str, float]:
        """Learn from a scored training batch (references, heads); return metrics."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that must survive a restart: plain values and tensors, nested as you like."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        ...


@runtime_checkable
class HasEncoder(Protocol):
    """A reward that requires ``features`` owns what makes them."""

    @property
    def encoder(self) -> FeatureExtractor:
        """Makes the features."""
        ...
