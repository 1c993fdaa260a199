"""Normalization statistics of a policy's actions and proprio, and their file.

Source of every rule and constant here: openvla-oft, ``prismatic/vla/datasets/rlds/utils/
data_utils.py`` and ``prismatic/vla/constants.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from verl_vla.core.errors import ConfigError
from verl_vla.core.json_files import Entries, naming, read_json
from verl_vla.policies.weight_files import TAKE_THE_FILE

Array = npt.NDArray[np.float64]
Normalization = Literal["bounds_q99", "bounds"]
"""``ACTION_PROPRIO_NORMALIZATION_TYPE``: -1 and +1 correspond to the 1% and 99% quantiles (LIBERO),
or to the smallest and largest values (ALOHA, and with it RoboTwin)."""

STATISTICS_FILE = "dataset_statistics.json"
NO_NOOPS_SUFFIX = "_no_noops"
"""Suffix of published LIBERO datasets' names: the suite with its idle steps filtered out."""
UNNAMED = "actions"
"""Key of statistics whose data have no name."""
RANGE_EPSILON = 1e-8
"""Value that fine-tuning adds to ``q99 - q01``, in dataset units."""
COLUMNS: dict[Normalization, tuple[str, str]] = {
    "bounds_q99": ("q01", "q99"),
    "bounds": ("min", "max"),
}
EXTREMES = ("min", "max")
"""Names of a value's smallest and largest number in the file."""
NORM_STATS_FILE = "config.json"
"""File of a checkpoint that holds the statistics where `STATISTICS_FILE` is absent, in the entry
``norm_stats``: OpenVLA's own checkpoints (openvla, ``extern/hf/configuration_prismatic.py``).
"""
ARM_AND_GRIPPER_DIM = 7
"""Six values of the hand's motion and the gripper's."""


@dataclass(frozen=True, eq=False)
class NormalizationStats:
    """The ranges of A values in the fine-tuning data.

    Args:
        q01: [A] value that is mapped to -1, dataset units; with ``bounds`` the smallest value.
        q99: [A] value that is mapped to +1.
        mask: [A] true where a value is normalised.
        key: name that a checkpoint stores the statistics under.
        normalization: the normalization, which decides the columns of the file.
        extremes: [2, A] smallest and largest value; None where they are not known.

    Raises:
        ConfigError: if the lengths differ, or a range is reversed or not finite.
    """

    q01: Array
    q99: Array
    mask: npt.NDArray[np.bool_]
    key: str = UNNAMED
    normalization: Normalization = "bounds_q99"
    extremes: Array | None = None

    def __post_init__(self) -> None:
        for name, dtype in (("q01", np.float64), ("q99", np.float64), ("mask", np.bool_)):
            # copies that cannot be written to: the class is frozen, and its arrays should be too
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

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def is_constant(self) -> npt.NDArray[np.bool_]:
        """[A], true where a value never changes; without extremes, where its quantiles agree.

        A value that changes in less than 1% of the steps has equal quantiles and is no constant:
        openvla-oft normalises it to -1 or +1 (``normalize_action_and_proprio``, ``zeros_mask``).
        """
        low, high = (self.q01, self.q99) if self.extremes is None else self.extremes
        return low == high

    def unnormalize(self, normalised: npt.ArrayLike) -> Array:
        """Map -1..1 to the ranges; a value without a range gets ``q01``.

        Args:
            normalised: [..., A].

        Returns:
            [..., A] float64, dataset units; unchanged where ``mask`` is false.
        """
        values = np.asarray(normalised, dtype=np.float64)
        # fine-tuning divides by the range plus an epsilon, so its inverse has both
        moved = 0.5 * (values + 1) * (self.q99 - self.q01 + RANGE_EPSILON) + self.q01
        moved = np.where(self.q01 == self.q99, self.q01, moved)
        return np.where(self.mask, moved, values)

    def normalize(self, values: npt.ArrayLike) -> Array:
        """Map the ranges to -1..1, clipped; a value that never changes gets 0.

        Args:
            values: [..., A], dataset units.

        Returns:
            [..., A] float64; unchanged where ``mask`` is false.
        """
        given = np.asarray(values, dtype=np.float64)
        scaled = 2 * (given - self.q01) / (self.q99 - self.q01 + RANGE_EPSILON) - 1
        # a range of 0 would turn noise in a constant value into +-1
        scaled = np.where(self.is_constant, 0.0, np.clip(scaled, -1.0, 1.0))
        return np.where(self.mask, scaled, given)


class Columns(Entries):
    """Statistics of A values in a file, each entry [A]."""

    q01: list[float] | None = None
    q99: list[float] | None = None
    min: list[float] | None = None
    max: list[float] | None = None
    mask: list[bool] | None = None


class Dataset(Entries):
    """Statistics of one data set in a file."""

    action: Columns
    proprio: Columns | None = None


class ConfigWithStatistics(Entries):
    """The part of `NORM_STATS_FILE` that holds statistics."""

    norm_stats: dict[str, Dataset] = {}


class ActionStatistics(NormalizationStats):
    """Statistics of actions; values with ``mask`` false are grippers, which are not normalised."""

    @property
    def gripper_dims(self) -> tuple[int, ...]:
        """Indices of the grippers in an action; empty where all values are normalised."""
        return tuple(np.flatnonzero(~self.mask).tolist())


def load_statistics(
    folder: str | Path,
    unnorm_key: str | None = None,
    normalization: Normalization = "bounds_q99",
) -> ActionStatistics:
    """Read the action statistics of a checkpoint.

    Args:
        folder: folder of the checkpoint; its ``dataset_statistics.json`` maps a dataset's name to
            ``{"action": {"q01", "q99", "mask"}}``.
        unnorm_key: name of the dataset, or of the suite that it was made from; may be None where
            the file holds only one dataset.
        normalization: the fine-tuning's; ``bounds`` reads ``min`` and ``max``.

    Raises:
        ConfigError: the file or the dataset is missing, or there are several and none is named.
    """
    path, key, dataset = _read_dataset(folder, unnorm_key)
    low, high, mask = _columns(path, key, dataset.action, (*COLUMNS[normalization], "mask"))
    with naming(path):
        return ActionStatistics(low, high, mask, key, normalization, _extremes(dataset.action))


def load_proprio_stats(
    folder: str | Path,
    unnorm_key: str | None = None,
    normalization: Normalization = "bounds_q99",
) -> NormalizationStats:
    """Read the proprio statistics: entry ``proprio`` beside the ``action`` of `load_statistics`.

    All proprio values are normalised; published files have no mask for them.

    Raises:
        ConfigError: if the file, the dataset or its ``proprio`` is missing.
    """
    path, key, dataset = _read_dataset(folder, unnorm_key)
    if dataset.proprio is None:
        raise ConfigError(
            f"{path}: '{key}' lacks ['proprio'], which this policy reads; {TAKE_THE_FILE}"
        )
    low, high = _columns(path, key, dataset.proprio, COLUMNS[normalization])
    mask = np.ones(len(low), dtype=np.bool_)
    with naming(path):
        return NormalizationStats(low, high, mask, key, normalization, _extremes(dataset.proprio))


def require_usual_mask(statistics: ActionStatistics) -> None:
    """Refuse a mask with which the robot moves, and no task can succeed.

    Raises:
        ConfigError: no value is normalised, or the gripper's is.
    """
    mask = statistics.mask
    if not mask.any():
        raise ConfigError(
            f"statistics '{statistics.key}': the mask says that no value is normalised, so the "
            f"policy's -1..1 would be taken for metres; {TAKE_THE_FILE}"
        )
    # with "bounds" the grippers of ALOHA are normalised
    if mask.all() and statistics.normalization == "bounds_q99" and len(mask) == ARM_AND_GRIPPER_DIM:
        raise ConfigError(
            f"statistics '{statistics.key}': the mask says that all {len(mask)} values are "
            "normalised, the gripper's among them, which then never closes; set the last entry of "
            "the mask to false"
        )


def save_statistics(
    folder: str | Path, statistics: ActionStatistics, proprio: NormalizationStats | None = None
) -> None:
    """Write action and proprio statistics, which `load_statistics` etc. read back exactly."""
    low, high = COLUMNS[statistics.normalization]
    dataset: dict[str, dict[str, list[Any]]] = {}
    for name, r in (("action", statistics), ("proprio", proprio)):
        if r is not None:
            known = (
                {} if r.extremes is None else dict(zip(EXTREMES, r.extremes.tolist(), strict=True))
            )
            dataset[name] = known | {
                low: r.q01.tolist(),
                high: r.q99.tolist(),
                "mask": r.mask.tolist(),
            }
    text = json.dumps({statistics.key: dataset}, indent=2)
    (Path(folder) / STATISTICS_FILE).write_text(text + "\n", encoding="utf-8")


def read_datasets(folder: str | Path) -> tuple[Path, Mapping[str, Dataset]]:
    """Read the statistics of all data sets that a checkpoint was fine-tuned on.

    Returns:
        The file that holds them, and the statistics by the data set's name.

    Raises:
        ConfigError: there is no file with statistics, or it is damaged.
    """
    path, config = Path(folder) / STATISTICS_FILE, Path(folder) / NORM_STATS_FILE
    # also where it is a link to nothing, which is to be named
    if path.exists() or path.is_symlink():
        return path, read_json(path, dict[str, Dataset], TAKE_THE_FILE)
    if config.is_file():
        found = read_json(config, ConfigWithStatistics, TAKE_THE_FILE).norm_stats
        if found:
            return config, found
    raise ConfigError(
        f"{folder} holds no {STATISTICS_FILE}; without the ranges of the fine-tuning data bins "
        "cannot become motions: copy the file from the checkpoint that the weights came from"
    )


def _read_dataset(folder: str | Path, unnorm_key: str | None) -> tuple[Path, str, Dataset]:
    path, by_dataset = read_datasets(folder)
    key = _choose_key(list(by_dataset), unnorm_key, path)
    return path, key, by_dataset[key]


def _columns(path: Path, key: str, values: Columns, names: Sequence[str]) -> list[Any]:
    found = values.model_dump()
    missing = [name for name in names if found[name] is None]
    if missing:
        raise ConfigError(f"{path}: '{key}' lacks {missing}; they must come with the fine-tuning")
    return [found[name] for name in names]


def _extremes(values: Columns) -> Array | None:
    """Return the smallest and largest values [2, A], which published files have."""
    if values.min is None or values.max is None:
        return None
    return np.array([values.min, values.max], dtype=np.float64)


def _choose_key(present: Sequence[str], wanted: str | None, path: Path) -> str:
    """Return the key of the dataset that ``wanted`` names, or the only key if it is None."""
    if wanted is None:
        if len(present) == 1:
            return present[0]
        raise ConfigError(
            f"{path} holds statistics of {len(present)} datasets and none was chosen; set "
            f"unnorm_key to one of {sorted(present)}"
        )
    # a suite's name stands for the dataset without idle steps that was made from it, and the other
    # way round: published checkpoints use either for the same data
    for key in (wanted, wanted + NO_NOOPS_SUFFIX, wanted.removesuffix(NO_NOOPS_SUFFIX)):
        if key in present:
            return key
    raise ConfigError(
        f"unnorm_key is '{wanted}', which {path} does not hold; choose one of {sorted(present)}"
    )
