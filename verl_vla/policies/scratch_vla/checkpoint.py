"""The folder of a scratch VLA, which holds only the files that every policy has."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoModel

from verl_vla.core.errors import ConfigError
from verl_vla.policies import checkpoint
from verl_vla.policies.checkpoint import IMAGE_FILE, read_tower_statistics, require_file
from verl_vla.policies.preprocessing import ImageStatistics
from verl_vla.policies.scratch_vla.configuration import ScratchVLAConfig
from verl_vla.policies.scratch_vla.modelling import ScratchVLAModel


def register_auto_classes() -> None:
    """Register the model with transformers' Auto classes, for ``model_type: scratch_vla``."""
    AutoConfig.register(ScratchVLAConfig.model_type, ScratchVLAConfig, exist_ok=True)
    AutoModel.register(ScratchVLAConfig, ScratchVLAModel, exist_ok=True)


def read_config(folder: str | Path) -> ScratchVLAConfig:
    """Read the configuration of a checkpoint.

    Raises:
        ConfigError: if the folder or its ``config.json`` is missing, or the parts do not fit.
    """
    return checkpoint.read_config(ScratchVLAConfig, folder)


def read_image_statistics(folder: str | Path, num_towers: int) -> tuple[ImageStatistics, ...]:
    """Read the image statistics of every vision tower.

    Raises:
        ConfigError: if the file is missing or there are not as many statistics as towers.
    """
    path = require_file(folder, IMAGE_FILE, "how the towers want their pixels")
    found = read_tower_statistics(path)
    if len(found) != num_towers:
        raise ConfigError(
            f"{path} gives image statistics of {len(found)} towers, the model has {num_towers}; "
            "tvf_normalize_params needs one entry a tower"
        )
    return found
