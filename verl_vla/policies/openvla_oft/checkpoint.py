"""The files of a checkpoint folder, in the published layout, read without leaving the machine.

    config.json, model*.safetensors, tokenizer.json, preprocessor_config.json,
    dataset_statistics.json

Nothing is fetched from a hub and no code of the folder is run, whatever its ``auto_map`` says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from verl_vla.errors import ConfigError
from verl_vla.observations import OPENVLA_IMAGE_STATISTICS, ImageStatistics
from verl_vla.policies.openvla_oft.configuration import OpenVLAOFTConfig
from verl_vla.policies.openvla_oft.modelling import OpenVLAOFTModel

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
IMAGE_FILE = "preprocessor_config.json"


def register_auto_classes() -> None:
    """Let transformers' Auto classes build our model for ``model_type: openvla``."""
    AutoConfig.register(OpenVLAOFTConfig.model_type, OpenVLAOFTConfig, exist_ok=True)
    AutoModel.register(OpenVLAOFTConfig, OpenVLAOFTModel, exist_ok=True)


def read_config(folder: str | Path) -> OpenVLAOFTConfig:
    """Read the sizes of a checkpoint.

    Raises:
        ConfigError: if the folder or its ``config.json`` is missing.
    """
    _require_file(folder, CONFIG_FILE, "the sizes of the model")
    return OpenVLAOFTConfig.from_pretrained(str(folder), local_files_only=True)


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a checkpoint.

    Raises:
        ConfigError: if ``tokenizer.json`` is missing, or no token is for padding.
    """
    _require_file(folder, TOKENIZER_FILE, "the vocabulary")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"the tokenizer in {folder} has no padding token; prompts of different lengths are "
            "padded in a batch: set pad_token in tokenizer_config.json"
        )
    return tokenizer


def read_image_statistics(folder: str | Path, num_towers: int) -> tuple[ImageStatistics, ...]:
    """Read how every vision tower wants its pixels.

    The published constants stand in where a two-tower checkpoint has no file of its own.

    Args:
        folder: of the checkpoint.
        num_towers: how many towers the model has.

    Raises:
        ConfigError: if there are not as many statistics as towers.
    """
    path = Path(folder) / IMAGE_FILE
    if path.is_file():
        towers = json.loads(path.read_text(encoding="utf-8"))["tvf_normalize_params"]
        found = tuple(
            ImageStatistics(mean=tuple(tower["mean"]), std=tuple(tower["std"])) for tower in towers
        )
    else:
        found = OPENVLA_IMAGE_STATISTICS
    if len(found) != num_towers:
        source = path if path.is_file() else f"OpenVLA's two published towers, {path} being absent,"
        raise ConfigError(
            f"{source} gives image statistics of {len(found)} towers, the model has {num_towers}; "
            "tvf_normalize_params needs one entry a tower"
        )
    return found


def write_image_statistics(
    folder: str | Path, statistics: Sequence[ImageStatistics], image_size: int
) -> None:
    """Write ``statistics`` so that `read_image_statistics` reads them back exactly."""
    content = {
        "input_sizes": [[3, image_size, image_size] for _ in statistics],
        "tvf_normalize_params": [{"mean": list(s.mean), "std": list(s.std)} for s in statistics],
    }
    text = json.dumps(content, indent=2)
    (Path(folder) / IMAGE_FILE).write_text(text + "\n", encoding="utf-8")


def _require_file(folder: str | Path, name: str, purpose: str) -> None:
    if not Path(folder).is_dir():
        raise ConfigError(
            f"{folder} is not a folder; checkpoints are read from disk only: fetch it first"
        )
    if not (Path(folder) / name).is_file():
        raise ConfigError(
            f"{folder} holds no {name}, which describes {purpose}; copy it from the checkpoint "
            "that the weights came from"
        )
