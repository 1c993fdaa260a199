"""The files of a checkpoint folder, in the published layout, read without leaving the machine.

    config.json, model*.safetensors, tokenizer.json, preprocessor_config.json,
    dataset_statistics.json

Nothing is fetched from a hub and no code of the folder is run, whatever its ``auto_map`` says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from verl_vla.errors import ConfigError
from verl_vla.observations import OPENVLA_IMAGE_STATISTICS, ImageStatistics
from verl_vla.policies.openvla_oft.configuration import OpenVLAOFTConfig
from verl_vla.policies.openvla_oft.modelling import OpenVLAOFTModel

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
IMAGE_FILE = "preprocessor_config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
REGRESSION_HEAD_FILES = "action_head--*.pt"


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


def weight_files(folder: str | Path) -> tuple[Path, ...]:
    """Name the files that hold the weights.

    Raises:
        ConfigError: if there are none, or one that the index names is missing.
    """
    root = Path(folder)
    index = root / WEIGHTS_INDEX_FILE
    if index.is_file():
        parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [part for part in parts if not (root / part).is_file()]
        if missing:
            raise ConfigError(
                f"{index} names {len(parts)} files, of which {missing} are missing; fetch them"
            )
        return tuple(root / part for part in parts)
    if not (root / WEIGHTS_FILE).is_file():
        raise ConfigError(
            f"{folder} holds neither {WEIGHTS_FILE} nor {WEIGHTS_INDEX_FILE}; weights are read "
            "from safetensors alone: convert other formats first"
        )
    return (root / WEIGHTS_FILE,)


def read_weight_layout(folder: str | Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Read name, shape and type of every stored weight from the files' headers alone.

    Returns:
        Name to (shape, dtype as safetensors spells it).

    Raises:
        ConfigError: if a file is missing or cut off.
    """
    layout: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 -- not a mapping
                    part = stored.get_slice(name)
                    layout[name] = (tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise ConfigError(
                f"{file} ({file.stat().st_size} bytes) is cut off or no safetensors file "
                f"({error}); fetch it again"
            ) from error
    return layout


def refuse_regression_head(folder: str | Path) -> None:
    """Refuse a checkpoint whose actions come from a regression head instead of tokens.

    Such a folder holds the head beside the weights (openvla-oft, ``vla-scripts/finetune.py``).

    Raises:
        ConfigError: names the head's file.
    """
    heads = sorted(path.name for path in Path(folder).glob(REGRESSION_HEAD_FILES))
    if heads:
        raise ConfigError(
            f"{folder} holds {heads[0]}: an L1-regression checkpoint, whose language model was not "
            "trained to say action tokens; take one fine-tuned with use_l1_regression False, for "
            "example SimpleVLA-RL's, or fine-tune your own"
        )


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
