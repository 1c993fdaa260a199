"""Conversion of a checkpoint folder that cannot be read here into one that can.

The source is only read. Weights are read and written one after the other, so the host needs memory
for one file of the result and for one weight.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from verl_vla.core.errors import ConfigError
from verl_vla.core.files import writing_to
from verl_vla.core.json_files import read_json, require_regular
from verl_vla.policies.adapter_files import find_adapters, find_base, merge_adapter_files
from verl_vla.policies.checkpoint import CONFIG_FILE, require_file
from verl_vla.policies.lora import MakeWeight
from verl_vla.policies.normalization import STATISTICS_FILE, ConfigWithStatistics
from verl_vla.policies.stored_weights import stored_weights
from verl_vla.policies.weight_files import (
    ADAPTER_FILE,
    READ_AGAIN,
    TAKE_THE_FILE,
    WEIGHTS_FILE,
    WEIGHTS_INDEX_FILE,
    WeightWriter,
    read_index,
    wrapper_of,
)

LAYOUTS = (
    (WEIGHTS_FILE, WEIGHTS_INDEX_FILE),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""Names of whole weights and of the index of their parts; the first that is there is read."""
LEFT_OUT = (
    *("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json", ADAPTER_FILE),
    # code is never run, and states of a training are not read
    *("*.py", ".*", "optimizer*.pt", "scheduler*.pt", "rng_state*", "lock"),
)
"""Patterns of files that are not copied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What a conversion does."""

    steps: tuple[str, ...]
    """What is changed, a sentence each."""
    files: Mapping[str, Path]
    """Files that are copied, by their name in the result."""
    statistics: Mapping[str, Any] | None
    """Content of a new `STATISTICS_FILE`; None where there is one, or none can be made."""
    weights: Mapping[str, MakeWeight]


def plan_conversion(source: Path, base: Path | None = None) -> Conversion:
    """Find out what has to be done; of the weights only names are read.

    Args:
        source: folder of a checkpoint or of adapters.
        base: folder of the adapters' base; None takes the one that the adapters name.

    Raises:
        ConfigError: something is missing or damaged, or there is nothing to do.
    """
    if not source.is_dir():
        raise ConfigError(f"{source} is no folder; name the folder of a checkpoint or of adapters")
    adapters = find_adapters(source)
    if adapters is None and base is not None:
        raise ConfigError(f"--base is {base}, but {source} holds no adapters; leave --base out")
    folders = [source] if adapters is None else [find_base(adapters, base), source]
    weights, steps = _whole_weights(folders[0])
    if adapters is not None:
        if base is None and any((source / name).exists() for names in LAYOUTS for name in names):
            raise ConfigError(
                f"{source} holds whole weights and adapters; name the weights that the adapters "
                "belong to with --base, or remove one of the two"
            )
        weights, step = merge_adapter_files(weights, adapters)
        steps.append(f"{step} into the weights of {folders[0]}")
    elif (source / ADAPTER_FILE).exists():
        steps.append(f"leave {ADAPTER_FILE} out, which has no weights of adapters beside it")
    # the source's own files count before those of its base
    files = {file.name: file for folder in folders for file in _other_files(folder)}
    if CONFIG_FILE not in files:
        require_file(folders[0], CONFIG_FILE, "the sizes of the model")
    statistics = None if STATISTICS_FILE in files else _read_norm_stats(files[CONFIG_FILE])
    if statistics is not None:
        names = ", ".join(sorted(statistics))
        steps.append(f"write norm_stats of {CONFIG_FILE} to {STATISTICS_FILE}: {names}")
    if not steps:
        raise ConfigError(
            f"{source} needs no conversion: whole weights in safetensors without a prefix, and "
            f"nothing to be moved; see verl-vla doctor --policy {source}"
        )
    return Conversion(steps=tuple(steps), files=files, statistics=statistics, weights=weights)


def carry_out(conversion: Conversion, target: Path) -> None:
    """Write the converted checkpoint to ``target``, which appears when it is complete.

    Raises:
        ConfigError: ``target`` exists or cannot be written, or a weight does not fit.
    """
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} is there already; name a new folder")
    with writing_to(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=f".{target.name[:100]}-") as scratch:
            folder = Path(scratch) / "policy"
            folder.mkdir()
            for name, file in conversion.files.items():
                # the content: a folder of a hub's cache has links
                shutil.copyfile(file, folder / name)
            if conversion.statistics is not None:
                text = json.dumps(conversion.statistics, indent=2)
                (folder / STATISTICS_FILE).write_text(text + "\n", encoding="utf-8")
            writer = WeightWriter(folder)
            for name, make in conversion.weights.items():
                writer.add(name, make())
            writer.close()
            folder.replace(target)


def _whole_weights(folder: Path) -> tuple[dict[str, MakeWeight], list[str]]:
    """Return how to read each weight of a folder, by its plain name, and what that changes."""
    files = _weight_paths(folder)
    weights = stored_weights(files)
    steps: list[str] = []
    if files[0].suffix == ".bin":
        names = files[0].name if len(files) == 1 else f"{len(files)} files such as {files[0].name}"
        steps.append(f"write the {len(weights)} weights of {names} as safetensors")
    prefix = wrapper_of(weights)
    if prefix:
        steps.append(f"take {prefix!r} off the names of all weights")
    return {name.removeprefix(prefix): make for name, make in weights.items()}, steps


def _weight_paths(folder: Path) -> list[Path]:
    for whole, index in LAYOUTS:
        paths = [path for path in (folder / whole, folder / index) if path.exists()]
        if len(paths) == 2:
            raise ConfigError(
                f"{folder} holds {whole} and {index}, of which one is of another save; remove it"
            )
        if paths == [folder / index]:
            return [folder / part for part in sorted(set(read_index(folder / index).values()))]
        if paths:
            return paths
    known = ", ".join(name for layout in LAYOUTS for name in layout)
    raise ConfigError(
        f"{folder} holds none of {known}, and no adapters with their {ADAPTER_FILE}; weights of "
        "other names are not read: name the folder that transformers or peft saved"
    )


def _other_files(folder: Path) -> list[Path]:
    """Return the files of a folder that are copied."""
    found = [
        file
        for file in sorted(folder.iterdir())
        if not file.is_dir() and not any(file.match(pattern) for pattern in LEFT_OUT)
    ]
    for file in found:
        require_regular(file, READ_AGAIN)
    return found


def _read_norm_stats(config: Path) -> Mapping[str, Any] | None:
    """Return the statistics of a ``config.json`` as they are there; None without any."""
    if not read_json(config, ConfigWithStatistics, TAKE_THE_FILE).norm_stats:
        return None
    return read_json(config, dict[str, Any], TAKE_THE_FILE)["norm_stats"]
