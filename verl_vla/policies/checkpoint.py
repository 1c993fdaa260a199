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
from safetensors.torch import save_file
from torch import Tensor
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
WEIGHTS_FILE_BYTES = 2_000_000_000
"""Bytes of weights after which a file is written: a small part of a host's memory."""


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


class WeightWriter:
    """Writes weights to a folder one after the other, in files of a few GB as transformers does.

    No more than one file's weights need to be in memory.
    """

    def __init__(self, folder: Path, left_out: Collection[str] = ()) -> None:
        """Begin in ``folder``, which exists; weights of an earlier save are removed.

        Args:
            folder: folder of the checkpoint.
            left_out: names of weights that are not written.
        """
        self._folder = folder
        self._left_out = left_out
        for old in [*folder.glob("model*.safetensors"), folder / WEIGHTS_INDEX_FILE]:
            # a leftover would be taken for weights of this checkpoint
            old.unlink(missing_ok=True)
        self._waiting: dict[str, Tensor] = {}
        self._files: list[tuple[Path, list[str]]] = []
        self._bytes_waiting = self._bytes_written = 0

    def add(self, name: str, weight: Tensor) -> None:
        """Write one weight, now or with later ones."""
        if name in self._left_out:
            return
        # safetensors refuses a view with gaps
        self._waiting[name] = weight.contiguous()
        self._bytes_waiting += weight.nbytes
        if self._bytes_waiting >= WEIGHTS_FILE_BYTES:
            self._write_waiting()

    def close(self) -> None:
        """Write what waits, and which file holds which weight."""
        self._write_waiting()
        if len(self._files) == 1:
            self._files[0][0].rename(self._folder / WEIGHTS_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, (file, names) in enumerate(self._files, start=1):
            final = f"model-{number:05d}-of-{len(self._files):05d}.safetensors"
            file.rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._bytes_written}, "weight_map": weight_map}
        (self._folder / WEIGHTS_INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def _write_waiting(self) -> None:
        if not self._waiting:
            return
        # the number of files, a part of their names, is known at the end
        file = self._folder / f"model-{len(self._files) + 1:05d}.safetensors"
        # safetensors makes files that only their owner can read; this one gets the usual mode
        file.touch()
        mode = file.stat().st_mode
        # as transformers marks its own
        save_file(self._waiting, file, metadata={"format": "pt"})
        file.chmod(mode)
        self._files.append((file, list(self._waiting)))
        self._bytes_written += self._bytes_waiting
        self._waiting, self._bytes_waiting = {}, 0


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
