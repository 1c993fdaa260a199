"""The files of a checkpoint folder that every policy has, read from the local disk only.

    config.json, model*.safetensors, tokenizer.json, preprocessor_config.json,
    dataset_statistics.json

Nothing is fetched from a hub, and no code of the folder is run, even if its ``auto_map`` names
some.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerFast

from verl_vla.core.errors import ConfigError
from verl_vla.policies.preprocessing import ImageStatistics

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
IMAGE_FILE = "preprocessor_config.json"
RENDER_SIZE = "render_size"
"""Key that this project adds to `IMAGE_FILE`; other readers ignore it."""
HASHED_AT_ONCE = 1 << 24
"""Number of bytes that are read and hashed at a time."""
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"


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
    content = json.loads(path.read_text(encoding="utf-8"))
    if "model_type" not in content:
        raise ConfigError(f"{path} names no model_type; take the file that came with the weights")
    return str(content["model_type"])


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a checkpoint.

    Raises:
        ConfigError: if ``tokenizer.json`` is missing, or there is no padding token.
    """
    require_file(folder, TOKENIZER_FILE, "the vocabulary")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"the tokenizer in {folder} has no padding token; prompts of different lengths are "
            "padded in a batch: set pad_token in tokenizer_config.json"
        )
    return tokenizer


def read_tower_statistics(path: Path) -> tuple[ImageStatistics, ...]:
    """Read every vision tower's image statistics from a ``preprocessor_config.json``."""
    towers = json.loads(path.read_text(encoding="utf-8"))["tvf_normalize_params"]
    return tuple(
        ImageStatistics(mean=tuple(tower["mean"]), std=tuple(tower["std"])) for tower in towers
    )


def read_render_size(folder: str | Path) -> int | None:
    """Read the size of the camera images that a policy was fine-tuned on, pixels.

    Returns:
        None where the folder does not say; published checkpoints do not.
    """
    path = Path(folder) / IMAGE_FILE
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return int(content[RENDER_SIZE]) if RENDER_SIZE in content else None


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


def weight_files(folder: str | Path) -> tuple[Path, ...]:
    """Return the paths of the files that hold the weights.

    Raises:
        ConfigError: if there are none, or one that the index names is missing.
    """
    root = Path(folder)
    index = root / WEIGHTS_INDEX_FILE
    if index.is_file():
        # the index names the file of every weight, so each file comes many times
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
    """Read name, shape and dtype of every stored weight, from the files' headers only.

    Returns:
        Name to (shape, dtype as safetensors spells it).

    Raises:
        ConfigError: if a file is missing or truncated.
    """
    layout: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in weight_files(folder):
        try:
            # opened, not loaded: safetensors keeps shapes and dtypes in a header
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


def require_all_weights(folder: str | Path, report: Mapping[str, Collection[Any]]) -> None:
    """Refuse a model whose folder does not hold exactly its weights.

    Args:
        folder: folder that the weights were read from.
        report: transformers' ``output_loading_info``.

    Raises:
        ConfigError: if a weight is missing, superfluous or of another shape.
    """
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            names = sorted(str(key) for key in report[problem])
            raise ConfigError(
                f"{folder}: {len(names)} {problem.replace('_', ' ')}, first {names[:3]}; the "
                "weights do not belong to this config.json: take both from one checkpoint"
            )
