"""Training targets from recorded actions, and their normalization stats, as in openvla-oft.

Sources: openvla ``experiments/robot/libero/regenerate_libero_dataset.py`` for steps without motion,
openvla-oft ``prismatic/vla/datasets/rlds`` for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from verl_vla.core.errors import ConfigError
from verl_vla.policies.action_codec import ActionCodec
from verl_vla.policies.normalization import ActionStatistics

LOW_QUANTILE, HIGH_QUANTILE = 0.01, 0.99
"""Quantiles of openvla-oft's action ranges: ``prismatic/vla/datasets/rlds/utils/data_utils.py``."""
GRIPPER = -1
"""Index of the gripper in an action."""


NOOP_NORM = 1e-4
"""Norm of a motion, in simulator units, below which it counts as none (openvla's `is_noop`)."""

Floats = npt.NDArray[np.float32]
Scalar = TypeVar("Scalar", bound=np.generic)


def moving_steps(actions: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Find the steps that are not idle.

    A step is idle if its motion is below `NOOP_NORM` and the gripper's command is that of the last
    step kept. Before any step was kept, the gripper's command is ignored.

    Args:
        actions: [T, 7] simulator units.

    Returns:
        Indices of the steps to keep.
    """
    values = np.asarray(actions)
    is_still = np.linalg.norm(values[:, :GRIPPER], axis=1) < NOOP_NORM
    kept: list[int] = []
    for step, still in enumerate(is_still):
        is_same_grip = not kept or values[step, GRIPPER] == values[kept[-1], GRIPPER]
        if not (still and is_same_grip):
            kept.append(step)
    return np.array(kept, dtype=np.int64)


def to_dataset_units(actions: npt.ArrayLike) -> Floats:
    """Convert the gripper's command, -1 open to +1 close, into an opening, 1 open to 0 closed.

    Negative commands are clipped to 0 first (``oxe/transforms.py``, `libero_dataset_transform`).

    Args:
        actions: [..., 7] simulator units.
    """
    values = np.array(actions, dtype=np.float32)
    values[..., GRIPPER] = 1 - np.clip(values[..., GRIPPER], 0, 1)
    return values


def measure_statistics(episodes: Sequence[npt.ArrayLike], *, key: str) -> ActionStatistics:
    """Measure the 1% and 99% quantiles of every action value, the gripper's in dataset units.

    Args:
        episodes: arrays [T, 7], simulator units; at least one.
        key: the name under which a checkpoint stores the statistics.

    Raises:
        ConfigError: there are no episodes.
    """
    if not episodes:
        raise ConfigError("there are no demonstrations to measure; record some with `demos`")
    actions = np.concatenate([to_dataset_units(episode) for episode in episodes])
    # one at a time: for both at once numpy interpolates in float64 and the last digits differ
    low, high = (
        np.quantile(actions, q, axis=0).astype(np.float64) for q in (LOW_QUANTILE, HIGH_QUANTILE)
    )
    # openvla-oft leaves the gripper as it is: an opening of 0 or 1 lies within -1..1
    mask = np.ones(actions.shape[1], dtype=bool)
    mask[GRIPPER] = False
    extremes = np.stack([actions.min(axis=0), actions.max(axis=0)]).astype(np.float64)
    return ActionStatistics(q01=low, q99=high, mask=mask, key=key, extremes=extremes)


def action_chunks(actions: npt.NDArray[Scalar], length: int) -> npt.NDArray[Scalar]:
    """Return the chunk of K actions that begins at each step.

    The last K - 1 steps begin no chunk: openvla-oft drops them (``traj_transforms.py``,
    `chunk_act_obs`: the effective length is T - (K - 1)), so no action is ever repeated.

    Args:
        actions: [T, A].
        length: K.

    Returns:
        [T - K + 1, K, A].

    Raises:
        ConfigError: the episode is shorter than one chunk.
    """
    if len(actions) < length:
        raise ConfigError(
            f"an episode has {len(actions)} actions, but the policy acts {length} steps at a time; "
            "leave that episode out"
        )
    # [T - K + 1, A, K] -> [T - K + 1, K, A]; a view, so overlapping chunks take no memory
    return np.lib.stride_tricks.sliding_window_view(actions, length, axis=0).swapaxes(1, 2)


def target_action_tokens(actions: Floats, codec: ActionCodec) -> Tensor:
    """Encode every chunk of an episode as action tokens.

    Args:
        actions: [T, A] simulator units.
        codec: action codec of the policy.

    Returns:
        [T - K + 1, K x A] int64.
    """
    chunks = action_chunks(to_dataset_units(actions), codec.chunk_length)
    return codec.encode(codec.normalize(chunks))
