"""Base classes of image encoders: batches, where they are computed, and the feature space.

An encoder composes batches in the process that scores. They are computed there, or by the same
encoder in other processes (`BatchedEncoder.elsewhere`). A batch is the same wherever it is
computed, so features do not depend on the number of processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.rewards.base import TrajectoryReward, encoders_of
from verl_vla.rewards.encoders.network import FrozenNetwork, name_space

Images = npt.NDArray[np.uint8]
"""Images [T, H, W, 3] of one view of one episode, in the order of its policy steps."""
Features = npt.NDArray[np.float32]
"""Features [T, D] of one episode."""

Piece = tuple[int, npt.NDArray[np.int64]]
"""Index of an episode, and the indices of those of its images that are in a batch."""
Batch = Sequence[Piece]
BATCHES_A_RANK = 2
"""Most batches that wait at a rank or are computed there: one can be sent while the other is."""


class BatchExecutor(Protocol):
    """Computes the batches of an encoder in other processes."""

    @property
    def feature_space(self) -> str:
        """Feature space of the encoder there, see `FeatureExtractor`."""
        ...

    def compute_each(
        self, batches: Iterable[Sequence[Images]]
    ) -> Generator[Sequence[Features], None, None]:
        """Yield what `BatchedEncoder.compute` makes of each batch, in their order."""
        ...


class BatchedEncoder(ABC):
    """An encoder that computes in batches, here or elsewhere."""

    def __init__(
        self,
        kind: str,
        description: Mapping[str, Any],
        network: FrozenNetwork | None,
        *,
        batch_size: int,
    ) -> None:
        """Make the encoder; its network is read when it is first used.

        Args:
            kind: name of the kind of encoder, for the name of the feature space.
            description: layer, preprocessing, dtype; plain values, see `name_space`.
            network: network of the encoder; None where it has none.
            batch_size: images or clips of one batch.

        Raises:
            ConfigError: ``batch_size`` is below 1.
        """
        check_positive(batch_size=batch_size)
        self.batch_size = batch_size
        self.network = network
        self.track: Callable[[Sequence[Any]], Iterable[Any]] = iter
        """Iterator over the batches of one call of ``encode``."""
        self.remake: Callable[[str], BatchedEncoder] | None = None
        """Picklable function that makes the same encoder in another process, given the name of its
        device there; set by `make_encoder`."""
        self.elsewhere: BatchExecutor | None = None
        """Processes that compute instead of this one, which then never reads the network."""
        self._kind = kind
        self._description = description
        self._feature_space: str | None = None

    @property
    def feature_space(self) -> str:
        """Name of weights, layer and preprocessing; features of two spaces are never compared."""
        if self.elsewhere is not None:
            return self.elsewhere.feature_space
        if self._feature_space is None:
            weights = None if self.network is None else self.network.weights
            self._feature_space = name_space(self._kind, self._description, weights)
        return self._feature_space

    def encode(self, frames: Sequence[Images]) -> list[Features]:
        """Map episodes [T, H, W, 3], ragged in T, to [T', D].

        Raises:
            ContractError: images that are not uint8 [T, H, W, 3].
        """
        check_images(frames)
        batches = self.split(frames)
        found: list[list[Features]] = [[] for _ in frames]
        # one at a time: the images of all batches are another copy of the round's
        images = ([frames[episode][rows] for episode, rows in batch] for batch in batches)
        with closing(self._compute_each(images)) as computed:
            # the bar ends first, and `closing` ends the computation
            for batch, pieces in zip(self.track(batches), computed, strict=False):
                for (episode, _), features in zip(batch, pieces, strict=True):
                    found[episode].append(features)
        size = next((parts[0].shape[1] for parts in found if parts), 0)
        # an episode without images gets no rows
        empty = np.zeros((0, size), dtype=np.float32)
        return [np.concatenate(parts) if parts else empty for parts in found]

    @abstractmethod
    def split(self, frames: Sequence[Images]) -> list[Batch]:
        """Compose batches of episodes [T, H, W, 3]; the pieces of an episode are in its order."""

    @abstractmethod
    def compute(self, images: Sequence[Images]) -> list[Features]:
        """Map the pieces [T, H, W, 3] of one batch to [T', D], in this process."""

    def _compute_each(
        self, batches: Iterable[Sequence[Images]]
    ) -> Generator[Sequence[Features], None, None]:
        if self.elsewhere is not None:
            return self.elsewhere.compute_each(batches)
        return (self.compute(batch) for batch in batches)


def track_batches(
    reward: TrajectoryReward, track: Callable[[Sequence[Any]], Iterable[Any]]
) -> None:
    """Let ``track`` iterate over the batches of a reward's encoders; not in another process."""
    for encoder in encoders_of(reward):
        if isinstance(encoder, BatchedEncoder):
            encoder.track = track


def movable_encoders(reward: TrajectoryReward) -> list[BatchedEncoder]:
    """Return the encoders of a reward that other processes can compute.

    Left out are those without a network, whose images take longer to send than to encode, and those
    that `make_encoder` did not make, or that it made in a process of their own.
    """
    found = [encoder for encoder in encoders_of(reward) if isinstance(encoder, BatchedEncoder)]
    return [encoder for encoder in found if encoder.network and encoder.remake]


class ImageEncoder(BatchedEncoder):
    """An encoder of single images: features of an episode do not depend on others in the batch."""

    def split(self, frames: Sequence[Images]) -> list[Batch]:
        """Fill batches with the images of all episodes, one after the other."""
        # all together: short episodes would leave most of a batch empty
        lengths = [len(images) for images in frames]
        episode = np.repeat(np.arange(len(frames)), lengths)
        row = np.concatenate([np.arange(length) for length in lengths] or [episode])
        batches: list[Batch] = []
        for start in range(0, len(row), self.batch_size):
            rows, owner = (of[start : start + self.batch_size] for of in (row, episode))
            batches.append([(int(index), rows[owner == index]) for index in np.unique(owner)])
        return batches

    def compute(self, images: Sequence[Images]) -> list[Features]:
        """Map the pieces [T, H, W, 3] of one batch to [T, D]."""
        rows = self.embed(np.concatenate(images)).astype(np.float32)
        return np.split(rows, np.cumsum([len(piece) for piece in images])[:-1])

    @abstractmethod
    def embed(self, images: Images) -> Features:
        """Map n images [n, H, W, 3] to [n, D]."""


def check_positive(**values: int) -> None:
    """Check that values are at least 1.

    Raises:
        ConfigError: a value is below 1; the message names it.
    """
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; set at least 1")


def check_images(frames: Sequence[Images]) -> None:
    """Check that the images of every episode are uint8 [T, H, W, 3].

    Raises:
        ContractError: they are not; the message names the episode's index.
    """
    for index, episode in enumerate(frames):
        if episode.dtype != np.uint8 or episode.ndim != 4 or episode.shape[3] != 3:
            raise ContractError(
                f"images of episode {index} must be uint8 [T, H, W, 3], got {episode.dtype} "
                f"{list(episode.shape)}"
            )
