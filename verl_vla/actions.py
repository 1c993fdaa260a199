"""Action values, bins and simulator commands, exactly as in fine-tuning.

    simulator command  <->  dataset units  <->  normalised -1..1  <->  bin

A *bin* counts the classes of one action token from the first action id of the vocabulary, so
bin ``k`` is token id ``first_action_id + k`` and column ``k`` of the action logits. Published
vocabularies count downwards from their end, so bin 0 is the largest value.

Bins are int64 tensors, as in the tables; action values are numpy arrays, as in the simulator.
Source of every rule and constant here: openvla-oft, ``prismatic/vla/action_tokenizer.py``,
``prismatic/extern/hf/modeling_prismatic.py`` and ``experiments/robot/robot_utils.py``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from verl_vla.errors import ConfigError, ContractError

Array = npt.NDArray[np.float64]

STATISTICS_FILE = "dataset_statistics.json"
NO_NOOPS_SUFFIX = "_no_noops"
"""Published LIBERO datasets are named for a suite with its idle steps filtered out."""
RANGE_EPSILON = 1e-8
"""Added to ``q99 - q01`` in fine-tuning, in dataset units."""


@dataclass(frozen=True, eq=False)
class ActionStatistics:
    """The range of every action value in the fine-tuning data.

    Args:
        q01: [A] 1% quantile, dataset units.
        q99: [A] 99% quantile, dataset units; equal to ``q01`` where a value never moves.
        mask: [A] true where a value is normalised; false for the gripper alone.
        key: the name that a checkpoint stores them under.

    Raises:
        ConfigError: if the lengths differ, a range is reversed or not finite, or ``mask`` does
            not single out one gripper.
    """

    q01: Array
    q99: Array
    mask: npt.NDArray[np.bool_]
    key: str = "actions"

    def __post_init__(self) -> None:
        for name, dtype in (("q01", np.float64), ("q99", np.float64), ("mask", np.bool_)):
            values = np.array(self.__dict__[name], dtype=dtype)
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        if self.q01.ndim != 1 or not self.q01.shape == self.q99.shape == self.mask.shape:
            raise ConfigError(
                f"statistics '{self.key}' hold q01 {self.q01.shape}, q99 {self.q99.shape} and mask "
                f"{self.mask.shape}; all three need one number per action value"
            )
        if not np.all(np.isfinite(self.q01) & np.isfinite(self.q99) & (self.q01 <= self.q99)):
            raise ConfigError(
                f"statistics '{self.key}' hold q01 {self.q01} and q99 {self.q99}; every range must "
                "be finite and must not be reversed: compute them again from the demonstrations"
            )
        if np.count_nonzero(~self.mask) != 1:
            raise ConfigError(
                f"statistics '{self.key}' hold mask {self.mask.tolist()}; exactly one value must "
                "be false, the gripper, which is never normalised"
            )

    @property
    def gripper_index(self) -> int:
        """Position of the gripper in an action."""
        return int(np.argmin(self.mask))


def load_statistics(folder: str | Path, unnorm_key: str | None = None) -> ActionStatistics:
    """Read the action statistics that lie beside a checkpoint.

    Args:
        folder: of the checkpoint; its ``dataset_statistics.json`` maps a dataset's name to
            ``{"action": {"q01", "q99", "mask"}}``.
        unnorm_key: the dataset, or the suite that it was made from; may be left out where the
            file holds one dataset.

    Raises:
        ConfigError: if the file or the dataset is missing, or several are there and none is named.
    """
    path = Path(folder) / STATISTICS_FILE
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no {STATISTICS_FILE}; without the ranges of the fine-tuning data bins "
            "cannot become motions: copy the file from the checkpoint that the weights came from"
        )
    by_dataset = json.loads(path.read_text(encoding="utf-8"))
    key = _choose_key(list(by_dataset), unnorm_key, path)
    action = by_dataset[key]["action"]
    missing = [name for name in ("q01", "q99", "mask") if name not in action]
    if missing:
        raise ConfigError(f"{path}: '{key}' lacks {missing}; they must come with the fine-tuning")
    return ActionStatistics(q01=action["q01"], q99=action["q99"], mask=action["mask"], key=key)


def save_statistics(folder: str | Path, statistics: ActionStatistics) -> None:
    """Write ``statistics`` so that `load_statistics` reads them back exactly."""
    columns = {name: statistics.__dict__[name].tolist() for name in ("q01", "q99", "mask")}
    text = json.dumps({statistics.key: {"action": columns}}, indent=2)
    (Path(folder) / STATISTICS_FILE).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class ActionCodec:
    """Turns bins into action chunks and back.

    Args:
        num_bins: C, classes per action token; they cut -1..1 into ``C - 1`` equal cells.
        chunk_length: K, actions per decision.
        action_dim: A, values per action.
        statistics: ranges of the A values.

    Raises:
        ConfigError: if the statistics are for another number of action values.
    """

    num_bins: int
    chunk_length: int
    action_dim: int
    statistics: ActionStatistics

    def __post_init__(self) -> None:
        if len(self.statistics.mask) != self.action_dim:
            raise ConfigError(
                f"statistics '{self.statistics.key}' describe {len(self.statistics.mask)} action "
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
        cells = np.digitize(np.clip(values, -1.0, 1.0), self._edges)
        bins = (self.num_bins - cells).reshape(*values.shape[:-2], -1)
        return torch.from_numpy(bins.astype(np.int64))

    def decode(self, bins: Tensor) -> Array:
        """Place every action value at the centre of its cell.

        The first two bins share one cell, because C edges bound only ``C - 1`` cells.

        Args:
            bins: [..., T] integers in 0..C-1.

        Returns:
            [..., K, A] float64, normalised.
        """
        num_tokens = self.chunk_length * self.action_dim
        index = bins.detach().cpu().numpy()
        if index.shape[-1] != num_tokens or index.dtype.kind != "i":
            raise ContractError(
                f"bins must be integers [..., {num_tokens}], got {index.dtype} {index.shape}"
            )
        if index.size and not 0 <= index.min() <= index.max() < self.num_bins:
            raise ContractError(
                f"bins run from {index.min()} to {index.max()}; only 0..{self.num_bins - 1} exist"
            )
        cells = np.minimum(self.num_bins - 1 - index, self.num_bins - 2)
        centres = (self._edges[:-1] + self._edges[1:]) / 2
        return centres[cells].reshape(*index.shape[:-1], self.chunk_length, self.action_dim)

    def unnormalize(self, normalised: npt.ArrayLike) -> Array:
        """Map -1..1 to q01..q99; leave the gripper; put a value that never moves at its constant.

        Args:
            normalised: [..., A].

        Returns:
            [..., A] float64, dataset units.
        """
        values = np.asarray(normalised, dtype=np.float64)
        low, high = self.statistics.q01, self.statistics.q99
        moved = 0.5 * (values + 1) * (high - low + RANGE_EPSILON) + low
        moved = np.where(low == high, low, moved)
        return np.where(self.statistics.mask, moved, values)

    def normalize(self, actions: npt.ArrayLike) -> Array:
        """Map q01..q99 to -1..1, clipped; leave the gripper; put a value that never moves at 0.

        Args:
            actions: [..., A], dataset units.

        Returns:
            [..., A] float64.
        """
        values = np.asarray(actions, dtype=np.float64)
        low, high = self.statistics.q01, self.statistics.q99
        scaled = 2 * (values - low) / (high - low + RANGE_EPSILON) - 1
        scaled = np.where(low == high, 0.0, np.clip(scaled, -1.0, 1.0))
        return np.where(self.statistics.mask, scaled, values)

    def gripper(self, opening: npt.ArrayLike) -> Array:
        """Turn the dataset's gripper, 0 closed to 1 open, into a command, -1 open or +1 close.

        An opening of exactly one half commands 0, no motion.
        """
        return -np.sign(2 * np.asarray(opening, dtype=np.float64) - 1)

    def to_simulator(self, bins: Tensor) -> npt.NDArray[np.float32]:
        """Turn bins into commands.

        Args:
            bins: [n, T] integers.

        Returns:
            [n, K, A] float32, simulator units.
        """
        actions = self.unnormalize(self.decode(bins))
        grip = self.statistics.gripper_index
        actions[..., grip] = self.gripper(actions[..., grip])
        return actions.astype(np.float32)

    def from_simulator(self, actions: npt.ArrayLike) -> Tensor:
        """Find the bins that command ``actions``: `to_simulator` backwards, up to one cell.

        Args:
            actions: [n, K, A], simulator units; the gripper in -1 (open) .. +1 (close).

        Returns:
            [n, T] int64.
        """
        values = np.array(actions, dtype=np.float64)
        grip = self.statistics.gripper_index
        values[..., grip] = (1 - values[..., grip]) / 2
        return self.encode(self.normalize(values))

    @cached_property
    def _edges(self) -> Array:
        return np.linspace(-1.0, 1.0, self.num_bins)


def _choose_key(present: Sequence[str], wanted: str | None, path: Path) -> str:
    """Name the one dataset that is meant."""
    if wanted is None:
        if len(present) == 1:
            return present[0]
        raise ConfigError(
            f"{path} holds statistics of {len(present)} datasets and none was chosen; set "
            f"unnorm_key to one of {sorted(present)}"
        )
    for key in (wanted, wanted + NO_NOOPS_SUFFIX):
        if key in present:
            return key
    raise ConfigError(
        f"unnorm_key is '{wanted}', which {path} does not hold; choose one of {sorted(present)}"
    )
