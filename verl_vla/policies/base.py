"""What a policy must look like to a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from verl_vla.types import ActionChunk, Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyShape:
    """The sizes that the rest of the system must agree with; all of them from the checkpoint."""

    num_views: int
    image_size: int
    """Height and width of an observation image, pixels."""
    chunk_length: int
    """K, actions per decision."""
    action_dim: int
    """A, values per action."""
    num_bins: int
    """Classes per action token."""

    @property
    def num_tokens(self) -> int:
        """T, action tokens per decision."""
        return self.chunk_length * self.action_dim


class Policy(Protocol):
    """Chooses action chunks."""

    @property
    def shape(self) -> PolicyShape:
        """Sizes of what goes in and what comes out."""
        ...

    def act(
        self, observations: Sequence[Observation], noise: Tensor, *, temperature: float
    ) -> ActionChunk:
        """Choose one chunk for each of the ``n`` observations.

        Args:
            observations: n of them; their order is the order of the answer.
            noise: [n, T] float64, uniform in [0, 1); the only source of randomness, so the same
                observation and noise give the same bins in whatever batch they arrive.
            temperature: of the categorical distribution; 0 takes the most likely bin and
                ignores ``noise``.
        """
        ...
