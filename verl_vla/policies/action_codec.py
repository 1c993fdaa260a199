"""Conversion between bins, action values and simulator commands, exactly as in fine-tuning.

    simulator command  <->  dataset units  <->  normalised -1..1  <->  bin

A *bin* is the class index of one action token, counted from the first action id of the vocabulary:
bin ``k`` is token id ``first_action_id + k`` and column ``k`` of the action logits. openvla-oft
assigns values to token ids downwards from the vocabulary's end, so bin 0 is the largest value.

Bins are int64 tensors, as in the tables; action values are numpy arrays, as in the simulator.
Source of every rule and constant here: openvla-oft, ``prismatic/vla/action_tokenizer.py``,
``prismatic/extern/hf/modeling_prismatic.py`` and ``experiments/robot/robot_utils.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.policies.normalization import ActionStatistics, Array


@dataclass(frozen=True)
class ActionCodec:
    """Conversion of bins into action chunks and back.

    Args:
        num_bins: C, number of classes per action token; they cut -1..1 into ``C - 1`` equal cells.
        chunk_length: K, number of actions per policy step.
        action_dim: A, number of values per action.
        statistics: normalization statistics of the A values.

    Raises:
        ConfigError: if the statistics are for another number of action values.
    """

    num_bins: int
    chunk_length: int
    action_dim: int
    statistics: ActionStatistics

    def __post_init__(self) -> None:
        if len(self.statistics) != self.action_dim:
            raise ConfigError(
                f"statistics '{self.statistics.key}' describe {len(self.statistics)} action "
                f"values, the policy has {self.action_dim}; choose the statistics of its data"
            )

    def encode(self, normalised: npt.ArrayLike) -> Tensor:
        """Find the bins of normalised actions.

        Args:
            normalised: [..., K, A]; values outside -1..1 are clipped.

        Returns:
            [..., T] int64.
        """
        values = np.asarray(normalised)
        expected = (self.chunk_length, self.action_dim)
        if values.shape[-2:] != expected:
            raise ContractError(f"actions must be [..., {expected}], got {values.shape}")
        # 1..C edges lie at or below a value: C only at +1 itself, which so has bin 0 alone
        cells = np.digitize(np.clip(values, -1.0, 1.0), self._edges)
        action_tokens = (self.num_bins - cells).reshape(*values.shape[:-2], -1)
        return torch.from_numpy(action_tokens.astype(np.int64))

    def decode(self, action_tokens: Tensor) -> Array:
        """Return the action values at the centres of the bins' cells.

        The first two bins share one cell, because C edges bound only ``C - 1`` cells.

        Args:
            action_tokens: [..., T] integers in 0..C-1.

        Returns:
            [..., K, A] float64, normalised.
        """
        num_tokens = self.chunk_length * self.action_dim
        index = action_tokens.detach().cpu().numpy()
        if index.shape[-1] != num_tokens or index.dtype.kind != "i":
            raise ContractError(
                f"action tokens must be integers [..., {num_tokens}], got {index.dtype} "
                f"{index.shape}"
            )
        if index.size and not 0 <= index.min() <= index.max() < self.num_bins:
            raise ContractError(
                f"action tokens run from {index.min()} to {index.max()}; only "
                f"0..{self.num_bins - 1} exist"
            )
        cells = np.minimum(self.num_bins - 1 - index, self.num_bins - 2)
        centres = (self._edges[:-1] + self._edges[1:]) / 2
        return centres[cells].reshape(*index.shape[:-1], self.chunk_length, self.action_dim)

    def unnormalize(self, normalised: npt.ArrayLike) -> Array:
        """Return [..., A] in dataset units; see `ActionStatistics.unnormalize`."""
        return self.statistics.unnormalize(normalised)

    def normalize(self, actions: npt.ArrayLike) -> Array:
        """Return [..., A] in -1..1; see `ActionStatistics.normalize`."""
        return self.statistics.normalize(actions)

    def gripper(self, opening: npt.ArrayLike) -> Array:
        """Turn the dataset's gripper, 0 closed to 1 open, into a command, -1 open or +1 close.

        An opening of exactly one half commands 0, no motion.
        """
        return -np.sign(2 * np.asarray(opening, dtype=np.float64) - 1)

    def to_simulator(self, action_tokens: Tensor) -> npt.NDArray[np.float32]:
        """Turn bins into simulator commands.

        Args:
            action_tokens: [n, T] integers.

        Returns:
            [n, K, A] float32, simulator units.
        """
        # [n, T] -> [n, K, A]
        actions = self.unnormalize(self.decode(action_tokens))
        grip = ~self.statistics.mask
        actions[..., grip] = self.gripper(actions[..., grip])
        return actions.astype(np.float32)

    def from_simulator(self, actions: npt.ArrayLike) -> Tensor:
        """Find the bins that command ``actions``; inverts `to_simulator` up to one cell.

        Args:
            actions: [n, K, A], simulator units; a gripper in -1 (open) .. +1 (close).

        Returns:
            [n, T] int64.
        """
        values = np.array(actions, dtype=np.float64)
        grip = ~self.statistics.mask
        # the inverse of `gripper`: -1 open -> 1, +1 closed -> 0
        values[..., grip] = (1 - values[..., grip]) / 2
        return self.encode(self.normalize(values))

    @cached_property
    def _edges(self) -> Array:
        return np.linspace(-1.0, 1.0, self.num_bins)
