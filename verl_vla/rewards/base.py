"""The interface of a reward plug-in.

A reward receives complete groups of finished trajectories, because progress is measured against
successes of the same group. It never sees the policy, the trainer or the simulator. Plug-ins are
plain Python files: `rewards/binary.py` is the smallest, docs/add-a-reward.md shows how to write
one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from verl_vla.core.episode import GoalReadings
from verl_vla.core.errors import ConfigError

Rows = npt.NDArray[np.float32]
"""Features of one episode in the order of its policy steps, [T, D]."""

Need = Literal["frames", "proprio", "features", "goals", "video"]
"""Inputs that a reward may require beyond the outcome: the images that the policy saw, the joint
readings, the features that its own `encoder` computes from the images, the simulator's distances
to the goals, or a video of the whole episode (`HasVideo`), from which features then are computed.
"""

Split = Literal["train", "held_out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryBatch:
    """Finished trajectories of complete groups, without crashed episodes.

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
    """B arrays [policy steps + 1, V, H, W, 3]: the images before each policy step, and the image
    after the last one, in which a success can be seen; None unless required."""
    proprio: tuple[npt.NDArray[np.float32], ...] | None
    """B arrays [policy steps, P]; None unless required."""
    videos: tuple[npt.NDArray[np.uint8], ...] | None = None
    """B arrays [F, H, W, 3], ragged in F: frames of the first camera, as rendered and not as
    prepared for the policy, at the rate of `VideoNeed`; None unless required."""
    goals: tuple[GoalReadings, ...] | None = None
    """B arrays [policy steps + 1, G, 3], columns as in `Reading`, from the start to the end; None
    unless required. Only a simulator has them: a reward that needs them runs in simulation only."""
    features: tuple[Rows, ...] | None = None
    """B arrays [T, D] of the reward's encoder, ragged in T; None unless required."""
    feature_space: str | None = None
    """`FeatureExtractor.feature_space` of the encoder that made ``features``; None without them."""
    mirrored: bool = False
    """True where left and right are swapped in ``frames`` and ``videos``, as LIBERO's policies see
    them."""
    split: Split = "train"
    """Split of the init states; held-out trajectories are scored but must never change a reward's
    state."""

    def __len__(self) -> int:
        return len(self.episode_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """One score per episode, and the parts that it was computed from."""

    score: npt.NDArray[np.float32]
    """[B], finite; the input of the advantage."""
    progress: npt.NDArray[np.float32]
    """[B] raw measure of progress before scaling; NaN where unknown."""
    status: tuple[str, ...]
    """B labels of how each score was found, e.g. ``success`` or ``failure``."""
    num_references: npt.NDArray[np.int64] | None = None
    """[B], successes that each score was measured against; None for a reward without references."""
    reference_source: tuple[str, ...] | None = None
    """B labels: ``batch``, ``memory``, ``batch+memory`` or ``none``; None as above."""
    max_score: float = 1.0
    """Largest score that this reward may give; a larger one is an error."""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """Metrics that are logged under ``reward/``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoNeed:
    """The video that a reward compares; `EnvConfig.video_every` says what rendering it costs.

    A frame of 256 px takes 0.2 MB: 64 of them for each of 512 episodes are 6.4 GB.
    """

    every: int
    """Simulator steps between two frames, at least 1."""
    max_frames: int | None
    """Most frames that are kept of an episode, evenly in time; None keeps all."""


def optional_video(video_every: int, *, max_frames: int | None) -> VideoNeed | None:
    """Return the video that a reward's argument ``video_every`` asks for; None where it is 0.

    Raises:
        ConfigError: ``video_every`` is below 0.
    """
    if video_every < 0:
        raise ConfigError(f"video_every is {video_every}; set at least 1, or 0 for no video")
    return VideoNeed(every=video_every, max_frames=max_frames) if video_every else None


class StatelessReward:
    """Base class of rewards without state: `update` and the checkpoint methods do nothing."""

    requires: frozenset[Need] = frozenset()

    def update(self, batch: TrajectoryBatch) -> Mapping[str, float]:
        """Learn nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore nothing."""


class FeatureExtractor(Protocol):
    """An encoder: turns images into features that a reward compares.

    Implementations are in `verl_vla.rewards.encoders`.
    """

    @property
    def feature_space(self) -> str:
        """Name of weights, layer and preprocessing; features of two spaces are never compared."""
        ...

    def encode(self, frames: Sequence[npt.NDArray[np.uint8]]) -> list[Rows]:
        """Map episodes [T, H, W, 3], ragged in T, to [T', D], each independently of the others."""
        ...


class TrajectoryReward(Protocol):
    """A reward: scores trajectories. The constructor takes its arguments from the recipe."""

    requires: frozenset[Need]
    """Inputs that `TrajectoryBatch` must hold beyond the outcome."""

    def __call__(self, batch: TrajectoryBatch) -> RewardResult:
        """Return one score per episode, in the order of the batch."""
        ...

    def update(self, batch: TrajectoryBatch) -> Mapping[str, float]:
        """Learn from a scored training batch (references, heads); return metrics."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return all that must survive a restart: plain values and tensors, nested in any way."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


@runtime_checkable
class HasVideo(Protocol):
    """A reward with a video, which every reward that requires ``video`` must have."""

    @property
    def video(self) -> VideoNeed:
        """The video that it requires."""
        ...


@runtime_checkable
class HasEncoder(Protocol):
    """A reward with an encoder, which every reward that requires ``features`` must have."""

    @property
    def encoder(self) -> FeatureExtractor:
        """Encoder that computes the features."""
        ...


@runtime_checkable
class HasEncoders(Protocol):
    """A reward with several encoders, for one that combines or compares features itself."""

    @property
    def encoders(self) -> Sequence[FeatureExtractor]:
        """All encoders, in any order."""
        ...


def encoders_of(reward: TrajectoryReward) -> tuple[FeatureExtractor, ...]:
    """Return the encoders that a reward uses: those that it lists, or its one."""
    if isinstance(reward, HasEncoders):
        return tuple(reward.encoders)
    return (reward.encoder,) if isinstance(reward, HasEncoder) else ()
