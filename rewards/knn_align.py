"""Progress by nearest-neighbour alignment with the successes of the task; nothing is trained.

The progress of each row is the mean normalised time of its nearest rows among all successes. Rows
are relative to the first row of their episode. This alignment ranks failures almost perfectly in a
synthetic test world where pooled features fail, so it is the baseline of a trained head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from verl_vla.core.errors import ConfigError
from verl_vla.rewards import Floats, Reference, ReferenceReward, Rows, align, last_rows
from verl_vla.rewards.encoders import make_encoder


class KnnAlignReward(ReferenceReward):
    """A reward of the mean normalised time of the nearest reference rows, at an episode's end."""

    def __init__(
        self,
        encoder: str,
        encoder_args: Mapping[str, Any] | None = None,
        alpha: float = 0.6,
        anneal: bool = False,
        num_neighbours: int = 5,
        final_share: float = 0.1,
        memory_capacity: int = 64,
        memory_max_age: int = 100,
        max_invalid_share: float = 0.05,
        noise_gate: bool = True,
    ) -> None:
        """Make a reward without references.

        Args:
            encoder: see `verl_vla.rewards.encoders.make_encoder`.
            encoder_args: arguments of the encoder.
            alpha: score of the best possible failure, in (0, 1).
            anneal: see `ReferenceReward`.
            num_neighbours: nearest reference rows whose times are averaged for one row.
            final_share: share of an episode's rows, at its end, over which progress is averaged.
            memory_capacity: successes kept of each task.
            memory_max_age: updates after which they are removed.
            max_invalid_share: see `ReferenceReward`.
            noise_gate: see `ReferenceReward`.

        Raises:
            ConfigError: a number outside its range.
        """
        # checked before the encoder's weights are loaded
        if num_neighbours < 1:
            raise ConfigError(f"num_neighbours is {num_neighbours}; set at least 1")
        if not 0 < final_share <= 1:
            raise ConfigError(f"final_share is {final_share}; it is a share, above 0 up to 1")
        super().__init__(
            make_encoder(encoder, encoder_args or {}),
            alpha=alpha,
            anneal=anneal,
            memory_capacity=memory_capacity,
            memory_max_age=memory_max_age,
            max_invalid_share=max_invalid_share,
            noise_gate=noise_gate,
        )
        self._num_neighbours = num_neighbours
        self._final_share = final_share

    def measure(
        self, task_key: str, episodes: Sequence[Rows], references: Sequence[Reference]
    ) -> Floats:
        """Return [n], the progress of the last rows, 0 to 1."""
        successes = [r.features for r in references]
        return np.array(
            [
                align(rows, successes, self._num_neighbours)[
                    last_rows(len(rows), self._final_share)
                ].mean()
                for rows in episodes
            ]
        )

    def quality(self, task_key: str, measures: Floats) -> Floats:
        """Return the measures, which are progress from 0 to 1 already."""
        return measures
