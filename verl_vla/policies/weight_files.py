"""The files of a checkpoint folder that hold its weights: safetensors, whole or in parts."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from verl_vla.core.errors import ConfigError
from verl_vla.core.json_files import Entries, read_begin, read_json

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE_BYTES = 2_000_000_000
"""Bytes of weights after which a file is written: a small part of a host's memory."""
PICKLED_WEIGHTS = "*.bin"
ADAPTER_FILE = "adapter_config.json"
"""PEFT's name for the configuration of adapters."""
LFS_MARK = b"version https://git-lfs"
"""Begin of the small file that Git leaves in place of one that Git LFS was to fetch."""
READ_AGAIN = "fetch it again from where the weights came from"
TAKE_THE_FILE = "take the file of the checkpoint that the weights came from"
"""Remedy for another file of the folder that cannot be right."""
CONVERT = "verl-vla convert {folder} NEW_FOLDER"
"""Command that makes a folder that can be read of one that cannot."""
WRAPPERS = ("module.", "base_model.model.", "_orig_mod.")
"""Prefixes that DistributedDataParallel, PEFT and torch.compile put before names."""


class WeightsIndex(Entries):
    """The declared part of `WEIGHTS_INDEX_FILE`: the file of every weight."""

    weight_map: dict[str, str]


def weight_files(folder: str | Path) -> tuple[Path, ...]:
    """Return the paths of the files that hold the weights.

    Raises:
        ConfigError: if there are none, or one that the index names is missing.
    """
    return _find_weights(Path(folder))[0]


def read_index(index: Path) -> dict[str, str]:
    """Return the file of every weight, as an index names it.

    Raises:
        ConfigError: it is damaged, or names a file that is missing.
    """
    weight_map = read_json(index, WeightsIndex, READ_AGAIN).weight_map
    # every file comes many times
    parts = sorted(set(weight_map.values()))
    missing = [part for part in parts if not (index.parent / part).exists()]
    if missing:
        raise ConfigError(
            f"{index} names {len(parts)} files, of which {missing} are missing; fetch them"
        )
    return weight_map


def require_weights(file: Path) -> None:
    """Refuse what cannot hold weights, before it is opened.

    Raises:
        ConfigError: it is no file, cannot be read, or is a pointer of Git LFS.
    """
    if read_begin(file, len(LFS_MARK), READ_AGAIN) == LFS_MARK:
        raise ConfigError(
            f"{file} is a pointer of Git LFS in place of the weights; run git lfs pull in its "
            "folder"
        )


def _find_weights(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """Return the files that hold the weights, and the index if there is one."""
    whole, index = folder / WEIGHTS_FILE, folder / WEIGHTS_INDEX_FILE
    if whole.exists() and index.exists():
        raise ConfigError(
            f"{folder} holds {WEIGHTS_FILE} and {WEIGHTS_INDEX_FILE}, of which one is of another "
            "save; remove it"
        )
    file_of = None
    # a link to nothing is to be named, so it counts as there
    if index.exists() or index.is_symlink():
        file_of = read_index(index)
        files = tuple(folder / part for part in sorted(set(file_of.values())))
    elif whole.exists() or whole.is_symlink():
        files = (whole,)
    else:
        raise ConfigError(f"{folder} {_without_weights(folder)}")
    if (folder / ADAPTER_FILE).exists():
        raise ConfigError(
            f"{folder} holds {ADAPTER_FILE} beside whole weights, which transformers would replace "
            "by the adapters' base; remove the file, or merge the adapters into their base: "
            f"{CONVERT.format(folder=folder)} --base BASE"
        )
    for file in files:
        require_weights(file)
    return files, file_of


def _without_weights(folder: Path) -> str:
    """Say what a folder without weights holds instead, and what to do."""
    convert = CONVERT.format(folder=folder)
    if (folder / ADAPTER_FILE).is_file():
        return (
            f"holds adapters alone; merge them into their base: {convert} --base BASE, or with "
            "peft: PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(out)"
        )
    others = sorted(file.name for file in folder.glob(PICKLED_WEIGHTS))
    found = f", but {others[0]}" if others else ""
    return (
        f"holds neither {WEIGHTS_FILE} nor {WEIGHTS_INDEX_FILE}{found}; weights are read from "
        f"safetensors alone: convert other formats first, with {convert}, or by loading the folder "
        "with transformers and save_pretrained"
    )


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
    file_of: dict[str, str] = {}
    files, named = _find_weights(Path(folder))
    for file in files:
        try:
            # opened, not loaded: safetensors keeps shapes and dtypes in a header
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 -- not a mapping
                    if name in layout:
                        raise ConfigError(
                            f"{folder}: weight {name} is in {file_of[name]} and in {file.name}; "
                            "the files are of two saves: fetch them again"
                        )
                    part = stored.get_slice(name)
                    layout[name] = (tuple(part.get_shape()), part.get_dtype())
                    file_of[name] = file.name
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{file} ({file.stat().st_size} bytes) is cut off or no safetensors file "
                f"({error}); fetch it again"
            ) from error
    if named is not None:
        _compare_with_index(Path(folder) / WEIGHTS_INDEX_FILE, named, file_of)
    return layout


def wrapper_of(names: Collection[str]) -> str:
    """Return the prefix that wrappers of a model have put before all names of weights, or ""."""
    prefix = ""
    while True:
        inside = [name.removeprefix(prefix) for name in names]
        found = [w for w in WRAPPERS if inside and all(name.startswith(w) for name in inside)]
        if not found:
            return prefix
        prefix += found[0]


def _compare_with_index(index: Path, named: Mapping[str, str], file_of: Mapping[str, str]) -> None:
    """Refuse an index that names another file for a weight than the one that holds it."""
    wrong = sorted(named.items() ^ file_of.items())
    if wrong:
        name, file = wrong[0]
        raise ConfigError(
            f"{index} and the files beside it do not agree on {len(dict(wrong))} weights, first "
            f"{name} in {file}; they are of two saves: fetch them again"
        )


def find_not_finite(folder: str | Path) -> str | None:
    """Read all weights; return the name of the first one with a value that is no number, or None.

    One weight is in memory at a time.
    """
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 -- not a mapping
                if not torch.isfinite(stored.get_tensor(name)).all():
                    return name
    return None


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
