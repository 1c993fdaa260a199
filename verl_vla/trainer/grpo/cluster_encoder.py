"""The encoders of a reward, when the ranks compute them.

The driver composes batches and hands each to one rank, so a batch is the same with any number of
ranks. Between two rounds of scoring the weights wait in the memory of the rank's host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import ray
from ray.exceptions import RayTaskError

from verl_vla.core.errors import ConfigError
from verl_vla.rewards import TrajectoryReward
from verl_vla.rewards.encoders.base import (
    BATCHES_A_RANK,
    BatchedEncoder,
    Features,
    Images,
    movable_encoders,
)


def place_encoders(reward: TrajectoryReward, workers: Any, *, num_ranks: int) -> None:
    """Let the ranks compute the encoders of ``reward``, as far as they can be moved.

    Args:
        reward: the run's reward.
        workers: group of `VLAWorker`.
        num_ranks: number of workers in it.

    Raises:
        ConfigError: a rank cannot make an encoder, for example because its node lacks the folder.
    """
    encoders = movable_encoders(reward)
    if not encoders:
        return
    workers.make_encoders([encoder.remake for encoder in encoders])
    for index, encoder in enumerate(encoders):
        encoder.elsewhere = ClusterEncoder(workers, index, num_ranks=num_ranks)


class ClusterEncoder:
    """A `verl_vla.rewards.encoders.base.BatchExecutor` whose batches are computed by all ranks."""

    def __init__(self, workers: Any, index: int, *, num_ranks: int) -> None:
        """Refer to an encoder that the workers have made.

        Args:
            workers: group of `VLAWorker`.
            index: position of the encoder in the list given to `VLAWorker.make_encoders`.
            num_ranks: number of workers.
        """
        self._workers = workers
        self._index = index
        self._num_ranks = num_ranks
        self._feature_space: str | None = None

    @property
    def feature_space(self) -> str:
        """Feature space of the encoder on the ranks.

        Raises:
            ConfigError: ranks have different weights, for example in folders of different nodes.
        """
        if self._feature_space is None:
            spaces: list[str] = self._workers.name_feature_space(self._index)
            if len(set(spaces)) > 1:
                raise ConfigError(
                    f"ranks have different encoders ({', '.join(sorted(set(spaces)))}); put the "
                    "same weights into encoder_args.path on every node"
                )
            self._feature_space = spaces[0]
        return self._feature_space

    def compute_each(
        self, batches: Iterable[Sequence[Images]]
    ) -> Generator[Sequence[Features], None, None]:
        """Yield the features of each batch, in their order; afterwards the devices are free."""
        # batches that were sent, the oldest first
        sent: deque[Any] = deque()
        try:
            for together in _rounds(batches, self._num_ranks):
                sent.extend(self._send(together))
                # while ranks compute the round just sent, its follower is composed
                while len(sent) > (BATCHES_A_RANK - 1) * self._num_ranks:
                    yield _receive(sent.popleft())
            while sent:
                yield _receive(sent.popleft())
        finally:
            # served after what was sent, so nothing is computed any more
            self._workers.free_encoders()

    def _send(self, together: list[Sequence[Images]]) -> list[Any]:
        """Send at most one batch to each rank; return where the features will be."""
        # `EACH_ITS_OWN` calls every rank, so those without a batch get None
        idle = [None] * (self._num_ranks - len(together))
        answers = self._workers.compute_features(
            [self._index] * self._num_ranks, [*together, *idle]
        )
        return answers[: len(together)]


class RankEncoders:
    """The encoders of one rank."""

    def __init__(self) -> None:
        self._encoders: list[BatchedEncoder] = []

    def make(self, remakes: Sequence[Callable[[str], BatchedEncoder]], device: str) -> None:
        """Make the encoders; none is read yet.

        Raises:
            ConfigError: as in `verl_vla.rewards.encoders.make_encoder`.
        """
        self._encoders = [remake(device) for remake in remakes]

    def compute(self, index: int, images: Sequence[Images] | None) -> list[Features] | None:
        """Compute one batch, whose weights are read or moved to the device if they are not there.

        Args:
            index: encoder.
            images: pieces of the batch [T, H, W, 3]; None where there is none for this rank.
        """
        return None if images is None else self._encoders[index].compute(images)

    def name_space(self, index: int) -> str:
        """Return the feature space of an encoder."""
        return self._encoders[index].feature_space

    def free(self) -> None:
        """Move all weights from the device to the host."""
        for encoder in self._encoders:
            assert encoder.network is not None, "`movable_encoders` leaves out others"
            encoder.network.leave_device()


def _rounds(
    batches: Iterable[Sequence[Images]], num_ranks: int
) -> Iterator[list[Sequence[Images]]]:
    """Yield batches in groups of ``num_ranks``; the last one may be smaller."""
    left = iter(batches)
    while together := list(islice(left, num_ranks)):
        yield together


def _receive(answer: Any) -> list[Features]:
    try:
        return ray.get(answer)
    except RayTaskError as error:
        # as if the encoder had raised it here
        raise error.cause from error
