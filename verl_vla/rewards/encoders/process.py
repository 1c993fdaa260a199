"""An encoder in a separate process, instead of in the ranks or in the process that scores.

Neither of them then holds the encoder's weights, and both survive its death: a lost encoder stops
one training step, whose episodes are kept for the next start of the run.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

from verl_vla.core.signals import end_with_parent
from verl_vla.rewards import FeatureExtractor
from verl_vla.rewards.encoders.base import Features, Images

_made: list[FeatureExtractor] = []
"""List that holds the one encoder of a process that `EncoderProcess` started."""


class EncoderProcess:
    """Proxy of an encoder in another process: sends it episodes and returns its features."""

    def __init__(self, make: Callable[[], FeatureExtractor]) -> None:
        """Start the process and have the encoder made there.

        Args:
            make: picklable function that returns the encoder; its exceptions are raised here.
        """
        # not a fork, which would share threads and device context with the trainer
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent)
        # waits: an encoder that cannot be made is reported at the start of the run
        self._feature_space = self._pool.submit(_make, make).result()

    @property
    def feature_space(self) -> str:
        """Feature space of the encoder; it does not depend on the process that it runs in."""
        return self._feature_space

    def encode(self, frames: Sequence[Images]) -> list[Features]:
        """Map episodes with the encoder."""
        return self._pool.submit(_encode, list(frames)).result()


def _make(make: Callable[[], FeatureExtractor]) -> str:
    _made.append(make())
    return _made[0].feature_space


def _encode(frames: list[Images]) -> list[Features]:
    return _made[0].encode(frames)
