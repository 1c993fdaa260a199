"""Episodes whose true progress is known: features move along a curve, then stand still."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from verl_vla.rewards import TrajectoryBatch

SIZE = 12
SPACE = "planted"
CURVE = np.random.default_rng(0).normal(size=(2, 4, SIZE))
"""By task: how four smooth functions of progress mix into features."""


def rows_at(progress: np.ndarray, task: int) -> np.ndarray:
    angle = np.pi / 2 * progress[:, None]
    basis = np.concatenate(
        [np.sin(angle), np.cos(angle), np.sin(2 * angle), np.cos(3 * angle)], axis=1
    )
    return 4 * basis @ CURVE[task % len(CURVE)]


def episode(reached: float, *, rng: np.random.Generator, num_rows: int = 12, task: int = 0):
    """[num_rows, SIZE]: on the way for most of the time, idle at ``reached`` for the rest."""
    layout = rng.normal(size=SIZE)
    moving = num_rows if reached == 1 else max(2, round(0.7 * num_rows))
    along = np.concatenate([np.linspace(0, reached, moving), np.full(num_rows - moving, reached)])
    noise = 0.02 * rng.normal(size=(num_rows, SIZE))
    return (rows_at(along, task) + layout + noise).astype(np.float32)


def make_batch(
    reached: Sequence[float],
    *,
    seed: int = 0,
    group_size: int = 4,
    tasks: Sequence[int] | None = None,
    first_id: int = 0,
    **changes: Any,
) -> TrajectoryBatch:
    """Episodes that ``reached`` so far; 1 is a success. Groups are consecutive."""
    rng = np.random.default_rng(seed)
    num = len(reached)
    task_of = [0] * num if tasks is None else list(tasks)
    lengths = rng.integers(8, 16, num)
    group = np.arange(num) // group_size
    values: dict[str, Any] = {
        "episode_id": np.arange(num) + first_id,
        "group_id": group + first_id,
        "task_key": tuple(f"mini/{t}" for t in task_of),
        "init_state_id": group + first_id,
        "success": np.array([r == 1 for r in reached]),
        "num_steps": lengths * 8,
        "frames": None,
        "proprio": None,
        "features": tuple(
            episode(r, rng=rng, num_rows=int(n), task=t)
            for r, n, t in zip(reached, lengths, task_of, strict=True)
        ),
        "feature_space": SPACE,
    }
    return TrajectoryBatch(**{**values, **changes})
