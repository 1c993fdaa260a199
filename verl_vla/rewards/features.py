"""Operations on an episode's features [T, D]: validity, idle rows, time, alignment, similarity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from verl_vla.rewards.base import Rows

Floats = npt.NDArray[np.float64]

IDLE_SHARE = 0.05
"""Share of an episode's median movement below which a row is idle. The threshold is relative to the
median and not in units of the encoder, so that every feature space has the same rule."""
FREQUENCIES = 256
MAX_PERIOD = 10_000.0
"""Size and longest period of the published time embedding (siglip-grpo
``temporal_embedding.py``; its config's own number is never passed on)."""
RELEASED_SCALE, RELEASED_STEEPNESS, SMALL_RANGE = 0.6, 10.0, 1e-6
"""Constants of the scores that siiRL (``utils/reward_score/embodied.py``) and siglip-grpo
(``reward.py:71-130``) released."""


def is_valid(features: Rows) -> bool:
    """Check that an episode can be scored: it has rows, all finite, and not all zero.

    An image that could not be read gives NaN or zeros, which no distance may be computed from.
    """
    return bool(len(features) and np.isfinite(features).all() and np.any(features))


def center_on_start(features: Rows) -> Rows:
    """Subtract the first row, which removes the layout of the scene from the comparison."""
    return features - features[:1]


def is_moving(features: Rows) -> npt.NDArray[np.bool_]:
    """Return [T], false where the features do not change; the first row always counts as moving.

    >>> is_moving(np.array([[0.0], [1.0], [1.0], [2.0]], dtype=np.float32)).tolist()
    [True, True, False, True]
    """
    # [T - 1], how far the features move from row to row
    movement = np.linalg.norm(np.diff(features.astype(np.float64), axis=0), axis=1)
    moved = movement[movement > 0]
    threshold = IDLE_SHARE * float(np.median(moved)) if len(moved) else 0.0
    return np.concatenate([[True], movement > threshold])


def normalised_time(features: Rows) -> Floats:
    """Return [T], the share of a success completed at each row, 0 to 1, flat while nothing moves.

    Idle rows would otherwise teach that waiting is progress. The last row of a success is its
    last policy step, and counts as the end.

    >>> normalised_time(np.array([[0.0], [1.0], [1.0], [2.0]], dtype=np.float32)).tolist()
    [0.0, 0.5, 0.5, 1.0]
    """
    steps = np.cumsum(is_moving(features)) - 1
    # nothing moves in a success: it is at its end from the first row on
    return steps / steps[-1] if steps[-1] else np.ones(len(features))


def idle_share(features: Rows) -> float:
    """Return the share of the rows in which nothing moves."""
    return float(1 - is_moving(features).mean())


def last_rows(num_rows: int, share: float) -> slice:
    """Return the rows that give an episode's final state: a share of them, at least one.

    >>> last_rows(40, 0.1)
    slice(36, 40, None)
    """
    return slice(num_rows - max(1, round(share * num_rows)), num_rows)


def align(features: Rows, successes: Sequence[Rows], num_neighbours: int) -> Floats:
    """Return [T], the progress of each row: the mean normalised time of its nearest neighbours.

    Neighbours are rows of the successes.

    Args:
        features: [T, D] of the episode to align.
        successes: arrays [T', D], at least one.
        num_neighbours: nearest rows, over all successes, whose times are averaged for one row of
            ``features``.
    """
    known = np.concatenate([center_on_start(s) for s in successes]).astype(np.float64)
    time = np.concatenate([normalised_time(s) for s in successes])
    asked = center_on_start(features).astype(np.float64)
    # |a - b|^2 without |a|^2, which is the same for every neighbour of a row
    distance = np.square(known).sum(1)[None, :] - 2 * asked @ known.T
    num = min(num_neighbours, len(known))
    # stable: of equally near rows the earlier one counts, in every run
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :num]
    return time[nearest].mean(axis=1)


class AdditiveTime:
    """The embedding of the row index that siglip-grpo adds to features; random, never trained."""

    def __init__(self, seed: int) -> None:
        """Make the embedding; ``seed`` decides its weights, whose size the first rows decide."""
        self._seed = seed
        self._network: nn.Module | None = None

    @torch.no_grad()
    def __call__(self, rows: Rows) -> Rows:
        """Return features [T, D] with the embedding of each row's index added."""
        if self._network is None:
            self._network = _time_network(rows.shape[1], self._seed)
        half = FREQUENCIES // 2
        # periods from 2 pi to nearly 2 pi times `MAX_PERIOD`, evenly in logarithms
        rates = torch.exp(-np.log(MAX_PERIOD) * torch.arange(half) / half)
        angles = torch.arange(len(rows))[:, None] * rates[None]
        return rows + self._network(torch.cat([angles.cos(), angles.sin()], dim=1)).numpy()


def _time_network(feature_size: int, seed: int) -> nn.Module:
    """Make the published network; the random state of the process does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(FREQUENCIES, feature_size), nn.SiLU(), nn.Linear(feature_size, feature_size)
        )


def cosine(a: Floats, b: Floats) -> float:
    """Return the cosine similarity of two vectors [D], 0 where one of them is 0."""
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size > 0 else 0.0


def min_max_sigmoid(closeness: Floats) -> Floats:
    """Return the released scores [n] of failures, from how close [n] each came to success.

    0.6 sigmoid(10 (c - 0.5)), with c the closeness stretched to 0..1 over the failures. The worst
    of several failures therefore always scores 0.004 and the best 0.596.

    >>> min_max_sigmoid(np.array([0.1, 0.2, 0.3])).round(3).tolist()
    [0.004, 0.3, 0.596]
    """
    extent = float(np.ptp(closeness))
    if extent < SMALL_RANGE:
        # as released: closeness that is all alike stands in the middle
        stretched = np.full(len(closeness), 0.5)
    else:
        stretched = (closeness - closeness.min()) / extent
    return RELEASED_SCALE / (1 + np.exp(-RELEASED_STEEPNESS * (stretched - 0.5)))
