"""Files of an OpenVLA-OFT folder in the published layout, besides those of every policy."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoModel

from verl_vla.core.errors import ConfigError
from verl_vla.policies import checkpoint
from verl_vla.policies.checkpoint import IMAGE_FILE, read_tower_statistics
from verl_vla.policies.openvla_oft.configuration import OpenVLAOFTConfig
from verl_vla.policies.openvla_oft.modelling import OpenVLAOFTModel
from verl_vla.policies.preprocessing import OPENVLA_IMAGE_STATISTICS, ImageStatistics

REGRESSION_HEAD_FILES = "action_head--*.pt"


def register_auto_classes() -> None:
    """Register the model with transformers' Auto classes, for ``model_type: openvla``."""
    AutoConfig.register(OpenVLAOFTConfig.model_type, OpenVLAOFTConfig, exist_ok=True)
    AutoModel.register(OpenVLAOFTConfig, OpenVLAOFTModel, exist_ok=True)


def read_config(folder: str | Path) -> OpenVLAOFTConfig:
    """Read the configuration of a checkpoint.

    Raises:
        ConfigError: if the folder or its ``config.json`` is missing.
    """
    return checkpoint.read_config(OpenVLAOFTConfig, folder)


def read_image_statistics(folder: str | Path, num_towers: int) -> tuple[ImageStatistics, ...]:
    """Read the image statistics of every vision tower.

    A two-tower checkpoint without the file gets the published constants.

    Args:
        folder: folder of the checkpoint.
        num_towers: number of the model's vision towers.

    Raises:
        ConfigError: if there are not as many statistics as towers.
    """
    path = Path(folder) / IMAGE_FILE
    found = read_tower_statistics(path) if path.is_file() else OPENVLA_IMAGE_STATISTICS
    if len(found) != num_towers:
        source = path if path.is_file() else f"OpenVLA's two published towers, {path} being absent,"
        raise ConfigError(
            f"{source} gives image statistics of {len(found)} towers, the model has {num_towers}; "
            "tvf_normalize_params needs one entry a tower"
        )
    return found


def refuse_regression_head(folder: str | Path) -> None:
    """Refuse a checkpoint whose actions come from a regression head instead of tokens.

    Such a folder holds the head beside the weights (openvla-oft, ``vla-scripts/finetune.py``).

    Raises:
        ConfigError: the folder has such a head; names its file.
    """
    heads = sorted(path.name for path in Path(folder).glob(REGRESSION_HEAD_FILES))
    if heads:
        raise ConfigError(
            f"{folder} holds {heads[0]}: an L1-regression checkpoint, whose language model was not "
            "trained to say action tokens; take one fine-tuned with use_l1_regression False, for "
            "example SimpleVLA-RL's, or fine-tune your own"
        )
