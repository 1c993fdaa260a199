"""An encoder in a process of its own.

The process that trains then holds neither its weights nor its device's context, and outlives it:
a lost encoder is an error of one step, which is kept for the next start.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

from verl_vla.core.processes import end_with_parent
from verl_vla.rewards import FeatureExtractor
from verl_vla.rewards.encoders.base import Features, Images

_made: list[FeatureExtractor] = []
"""The one encoder of a process that was started here."""


class EncoderProcess:
    """Passes episodes to an encoder beside this process, and its features back."""

    def __init__(self, make: Callable[[], FeatureExtractor]) -> None:
        """Start the process and have the encoder made there.

        Args:
            make: picklable; what it raises is raised here.
        """
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent)
        self._feature_space = self._pool.submit(_make, make).result()

    @property
    def feature_space(self) -> str:
        """That of the encoder: where it runs does not change what its numbers mean."""
        return self._feature_space

    def encode(self, frames: Sequence[Images]) -> list[Features]:
        """Map episodes as the encoder does."""
        return self._pool.submit(_encode, list(frames)).result()


def _make(make: Callable[[], FeatureExtractor]) -> str:
    _made.append(make())
    return _made[0].feature_space


def _encode(frames: list[Images]) -> list[Features]:
    return _made[0].encode(frames)
