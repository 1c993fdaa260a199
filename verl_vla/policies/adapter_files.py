"""Folders of adapters that PEFT wrote, merged into the weights of their base."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from verl_vla.core.errors import ConfigError
from verl_vla.core.json_files import Entries, read_json
from verl_vla.policies.lora import MakeWeight, merge_factors
from verl_vla.policies.stored_weights import stored_weights
from verl_vla.policies.weight_files import ADAPTER_FILE, READ_AGAIN

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_SUBFOLDER = "lora_adapter"
"""Folder in which openvla-oft's ``finetune.py`` saves adapters, beside the statistics."""
PREFIX = "base_model.model."
FIRST, SECOND = ".lora_A.weight", ".lora_B.weight"
OTHER_MATHS = (
    *("use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern"),
    *("layer_replication", "target_parameters", "loftq_config", "arrow_config"),
)
"""Entries with which a merged weight is not ``W + scale * B @ A`` with one scale for all."""
PLAIN_STARTS = (True, False, "gaussian")
"""Values of ``init_lora_weights`` that leave the base as it is; PiSSA etc. change it."""
WITH_PEFT = "merge the adapters with peft itself, and use the whole weights that it saves"


class AdapterConfig(Entries):
    """The declared part of `ADAPTER_FILE`."""

    peft_type: Literal["LORA"]
    r: Annotated[int, Field(ge=1)]
    lora_alpha: Annotated[float, Field(gt=0)]
    base_model_name_or_path: str | None = None
    use_rslora: bool = False
    init_lora_weights: bool | str = True

    @property
    def scale(self) -> float:
        """Factor of the adapters' product."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


def find_adapters(folder: Path) -> Path | None:
    """Return the folder of the adapters that ``folder`` holds; None if it holds none."""
    for place in (folder, folder / ADAPTER_SUBFOLDER):
        if (place / ADAPTER_FILE).exists() and _weights(place) is not None:
            return place
    return None


def find_base(adapters: Path, named: Path | None) -> Path:
    """Return the folder of the base: the one that is named, or that the adapters name.

    Raises:
        ConfigError: it is not on this machine.
    """
    if named is not None:
        return named
    name = read_json(adapters / ADAPTER_FILE, AdapterConfig, READ_AGAIN).base_model_name_or_path
    if name is None or not Path(name).is_dir():
        raise ConfigError(
            f"{adapters / ADAPTER_FILE} says that the adapters' base is {name!r}, which is no "
            "folder here; fetch it first, and name its folder with --base"
        )
    return Path(name)


def merge_adapter_files(
    base: Mapping[str, MakeWeight], adapters: Path
) -> tuple[dict[str, MakeWeight], str]:
    """Return how to make each weight of the base with the adapters merged in, and what is merged.

    Args:
        base: how to read each weight of the base.
        adapters: result of `find_adapters`.

    Raises:
        ConfigError: the adapters are of another kind than LoRA, or of another base.
    """
    config = _read_config(adapters)
    file = _weights(adapters)
    assert file is not None, "`find_adapters` has found it"
    parts = {_own_name(name, file): make for name, make in stored_weights([file]).items()}
    merged, num_merged = dict(base), 0
    for name, make in parts.items():
        layer = name.removesuffix(FIRST)
        if name.endswith(SECOND) and name.removesuffix(SECOND) + FIRST in parts:
            continue
        if layer != name and layer + SECOND in parts and f"{layer}.weight" in base:
            plain = base[f"{layer}.weight"]
            merged[f"{layer}.weight"] = partial(
                _merge, f"{layer}.weight", plain, make, parts[layer + SECOND], config
            )
            num_merged += 1
        elif name in base:
            # trained as a whole, by modules_to_save
            merged[name] = make
        else:
            raise ConfigError(
                f"{file} holds {name}, which is neither a LoRA factor of a weight of the base nor "
                "such a weight; name the base that the adapters were trained on with --base"
            )
    return merged, f"merge {num_merged} adapters of rank {config.r}, scale {config.scale:g}"


def _read_config(adapters: Path) -> AdapterConfig:
    path = adapters / ADAPTER_FILE
    config = read_json(path, AdapterConfig, READ_AGAIN)
    content = read_json(path, dict[str, Any], READ_AGAIN)
    for name in OTHER_MATHS:
        if name in content and content[name]:
            raise ConfigError(f"{path}: {name} is {content[name]!r:.60}; {WITH_PEFT}")
    if config.init_lora_weights not in PLAIN_STARTS:
        raise ConfigError(
            f"{path}: init_lora_weights is {config.init_lora_weights!r}, which changes the base "
            f"too; {WITH_PEFT}"
        )
    return config


def _weights(folder: Path) -> Path | None:
    found = (folder / name for name in ADAPTER_WEIGHTS)
    # a link to nothing is to be named, so it counts as there
    return next((file for file in found if file.exists() or file.is_symlink()), None)


def _own_name(name: str, file: Path) -> str:
    if not name.startswith(PREFIX):
        raise ConfigError(f"{file} holds {name}, which does not begin with {PREFIX}; {WITH_PEFT}")
    return name.removeprefix(PREFIX)


def _merge(
    name: str, plain: MakeWeight, first: MakeWeight, second: MakeWeight, config: AdapterConfig
) -> Tensor:
    weight, down, up = plain(), first(), second()
    # [rank, in], [out, rank] and [out, in]
    shapes = [list(tensor.shape) for tensor in (down, up, weight)]
    sizes = [size for shape in shapes for size in shape]
    if len(sizes) != 6 or sizes != [config.r, sizes[5], sizes[4], config.r, sizes[4], sizes[5]]:
        raise ConfigError(
            f"{name} of the base is {shapes[2]}, and its adapter is {shapes[0]} and {shapes[1]} of "
            f"rank {config.r}; name the base that the adapters were trained on with --base"
        )
    return merge_factors(lambda: weight, lambda: down, lambda: up, config.scale)
