"""The files of a checkpoint folder that every policy has, read from the local disk only.

    config.json, model*.safetensors, tokenizer.json, preprocessor_config.json,
    dataset_statistics.json

Nothing is fetched from a hub, and no code of the folder is run, even if its ``auto_map`` names
some.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from verl_vla.core.errors import ConfigError
from verl_vla.core.json_files import Entries, read_json
from verl_vla.policies.preprocessing import ImageStatistics
from verl_vla.policies.weight_files import READ_AGAIN, TAKE_THE_FILE

Config = TypeVar("Config", bound=PreTrainedConfig)
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
IMAGE_FILE = "preprocessor_config.json"
RENDER_SIZE = "render_size"
"""Key that this project adds to `IMAGE_FILE`; other readers ignore it."""
HASHED_AT_ONCE = 1 << 24
"""Number of bytes that are read and hashed at a time."""
NUM_LAYERS = ("num_hidden_layers", "depth")
MOST_LAYERS = 1000
"""Layers of one part of a model; the deepest language models have some 130."""
Positive = Annotated[float, Field(gt=0)]


class ConfigHead(Entries):
    """What decides who reads the rest of `CONFIG_FILE`."""

    model_type: str


class TowerStatistics(Entries):
    """An entry of `ImageFile` for one vision tower."""

    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]


class ImageFile(Entries):
    """The declared part of `IMAGE_FILE`."""

    tvf_normalize_params: list[TowerStatistics]


class RenderSize(Entries):
    """The part of `IMAGE_FILE` that this project adds."""

    render_size: Annotated[int, Field(ge=1)] | None = None


def fingerprint(folder: str | Path) -> str:
    """Return a digest of the names and contents of a folder's files.

    All files are read; 15 GB of weights take about as long as loading them.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).iterdir() if p.is_file()):
        # the name too: two files that exchanged their names make another checkpoint
        digest.update(f"{path.name}\n".encode())
        with path.open("rb") as file:
            while block := file.read(HASHED_AT_ONCE):
                digest.update(block)
    return digest.hexdigest()[:16]


def read_model_type(folder: str | Path) -> str:
    """Read the ``model_type`` of a checkpoint folder.

    Raises:
        ConfigError: if the folder or its ``config.json`` is missing, or names no model.
    """
    path = require_file(folder, CONFIG_FILE, "the sizes of the model")
    return read_json(path, ConfigHead, TAKE_THE_FILE).model_type


def read_config(kind: type[Config], folder: str | Path) -> Config:
    """Read the configuration of a checkpoint.

    Raises:
        ConfigError: the folder or its ``config.json`` is missing, or it is none of ``kind``.
    """
    path = require_file(folder, CONFIG_FILE, "the sizes of the model")
    content = read_json(path, dict[str, Any], TAKE_THE_FILE)
    _refuse_endless(path, content)
    try:
        return kind.from_dict(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    # transformers and huggingface_hub raise some ten kinds for values of a wrong type
    except Exception as error:
        raise ConfigError(
            f"{path} is no configuration of {kind.model_type} ({first_line(error)}); "
            f"{TAKE_THE_FILE}"
        ) from error


def _refuse_endless(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse a number of layers that no model has: to build it would take for ever."""
    for name, value in content.items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Mapping):
                _refuse_endless(path, part)
        if name in NUM_LAYERS and isinstance(value, int) and value > MOST_LAYERS:
            raise ConfigError(
                f"{path}: {name} is {value}, and no model has more than {MOST_LAYERS} layers; "
                f"{TAKE_THE_FILE}"
            )


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a checkpoint.

    Raises:
        ConfigError: if ``tokenizer.json`` is missing, or there is no padding token.
    """
    path = require_file(folder, TOKENIZER_FILE, "the vocabulary")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    # the parser is a library in Rust, which raises bare Exceptions
    except Exception as error:
        raise ConfigError(
            f"{path} or tokenizer_config.json beside it cannot be read ({first_line(error)}); "
            f"{READ_AGAIN}"
        ) from error
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"the tokenizer in {folder} has no padding token; prompts of different lengths are "
            "padded in a batch: set pad_token in tokenizer_config.json"
        )
    return tokenizer


def read_tower_statistics(path: Path) -> tuple[ImageStatistics, ...]:
    """Read every vision tower's image statistics from a ``preprocessor_config.json``."""
    towers = read_json(path, ImageFile, READ_AGAIN).tvf_normalize_params
    return tuple(ImageStatistics(mean=tower.mean, std=tower.std) for tower in towers)


def read_render_size(folder: str | Path) -> int | None:
    """Read the size of the camera images that a policy was fine-tuned on, pixels.

    Returns:
        None where the folder does not say; published checkpoints do not.
    """
    path = Path(folder) / IMAGE_FILE
    return read_json(path, RenderSize, READ_AGAIN).render_size if path.is_file() else None


def write_image_statistics(
    folder: str | Path,
    statistics: Sequence[ImageStatistics],
    image_size: int,
    render_size: int | None,
) -> None:
    """Write a file that `read_tower_statistics` and `read_render_size` read back exactly."""
    content: dict[str, Any] = {
        "input_sizes": [[3, image_size, image_size] for _ in statistics],
        "tvf_normalize_params": [{"mean": list(s.mean), "std": list(s.std)} for s in statistics],
    }
    if render_size is not None:
        content[RENDER_SIZE] = render_size
    text = json.dumps(content, indent=2)
    (Path(folder) / IMAGE_FILE).write_text(text + "\n", encoding="utf-8")


def require_file(folder: str | Path, name: str, purpose: str) -> Path:
    """Find a file of a checkpoint folder.

    Raises:
        ConfigError: if the folder or the file is missing; ``purpose`` says what the file is for.
    """
    if not Path(folder).is_dir():
        raise ConfigError(
            f"{folder} is not a folder; checkpoints are read from disk only: fetch it first"
        )
    if not (Path(folder) / name).is_file():
        raise ConfigError(
            f"{folder} holds no {name}, which describes {purpose}; copy it from the checkpoint "
            "that the weights came from"
        )
    return Path(folder) / name


def first_line(error: Exception) -> str:
    """Return what a library's error says, without the paragraphs of advice that follow."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
