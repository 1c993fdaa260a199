"""Weights of files that other programs wrote, by name and one at a time: safetensors or pickled.

Pickled files are read by ``torch.load`` with ``weights_only``, which runs no code of theirs.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from verl_vla.core.errors import ConfigError
from verl_vla.policies.checkpoint import first_line
from verl_vla.policies.lora import MakeWeight
from verl_vla.policies.weight_files import READ_AGAIN, require_weights

STATE_DICT = "state_dict"
"""Entry in which some trainers put the weights, beside the state of the training."""


def stored_weights(files: Sequence[Path]) -> dict[str, MakeWeight]:
    """Return how to read each weight of ``files``, in their order.

    What is read last decides what is in memory: a weight of a safetensors file, or of a pickled one
    what is used of it, as far as the file can be mapped.

    Raises:
        ConfigError: a file is damaged, holds something else than weights, or one that another file
            holds too.
    """
    pickled = _Pickled()
    found: dict[str, MakeWeight] = {}
    for file in files:
        require_weights(file)
        is_safe = file.suffix == ".safetensors"
        names = _safe_names(file) if is_safe else list(pickled.load(file))
        twice = found.keys() & set(names)
        if twice:
            raise ConfigError(
                f"{file} holds {min(twice)}, which another file of its folder holds too; the files "
                f"are of two saves: {READ_AGAIN}"
            )
        read = partial(_read_safe, file) if is_safe else partial(pickled.read, file)
        found |= {name: partial(read, name) for name in names}
    return found


class _Pickled:
    """Pickled files, of which one at a time is open."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._weights: Mapping[str, Tensor] = {}

    def load(self, file: Path) -> Mapping[str, Tensor]:
        if file != self._file:
            # the one before is let go first, or two would be in memory
            self._file, self._weights = None, {}
            self._weights = _load_pickled(file)
            self._file = file
        return self._weights

    def read(self, file: Path, name: str) -> Tensor:
        # a copy: the file is mapped, and weights may share memory, which safetensors refuses
        return self.load(file)[name].detach().clone()


def _load_pickled(file: Path) -> Mapping[str, Tensor]:
    try:
        content: Any = torch.load(
            file,
            map_location="cpu",
            weights_only=True,
            # files of before PyTorch 1.6 are no archives and cannot be mapped
            mmap=zipfile.is_zipfile(file),
        )
    # what a damaged file raises depends on the byte: some ten kinds
    except Exception as error:
        raise ConfigError(
            f"{file} ({file.stat().st_size} bytes) is damaged, or holds code beside weights, which "
            f"is not run ({first_line(error)}); {READ_AGAIN}"
        ) from error
    if isinstance(content, dict) and STATE_DICT in content:
        content = cast("dict[str, Any]", content)[STATE_DICT]
    if not isinstance(content, Mapping):
        raise ConfigError(f"{file} holds {type(content).__name__}, and no weights by their names")
    for name, value in cast("Mapping[Any, Any]", content).items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ConfigError(
                f"{file} holds {type(value).__name__} as {name!r:.60}, which is no weight; save "
                "the model's state_dict alone"
            )
    return cast("Mapping[str, Tensor]", content)


def _safe_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as stored:
            return list(stored.keys())
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{file} ({file.stat().st_size} bytes) is cut off or no safetensors file ({error}); "
            f"{READ_AGAIN}"
        ) from error


def _read_safe(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as stored:
        return stored.get_tensor(name)
