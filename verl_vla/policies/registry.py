"""Registry of architectures, which loads a checkpoint by the ``model_type`` of its config.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from verl_vla.core.errors import ConfigError
from verl_vla.core.text import nearest
from verl_vla.policies.base import ModelConfig, Processor, TrainablePolicy
from verl_vla.policies.checkpoint import CONFIG_FILE, read_model_type
from verl_vla.policies.checks import Finding
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.policies.openvla_oft import (
    OpenVLAOFTConfig,
    OpenVLAOFTModel,
    OpenVLAOFTPolicy,
    OpenVLAOFTProcessor,
)
from verl_vla.policies.openvla_oft import checks as openvla_oft_checks
from verl_vla.policies.openvla_oft import tiny as tiny_openvla_oft
from verl_vla.policies.openvla_oft.checkpoint import read_config as read_openvla_oft_config
from verl_vla.policies.scratch_vla import (
    ScratchVLAConfig,
    ScratchVLAModel,
    ScratchVLAPolicy,
    ScratchVLAProcessor,
)
from verl_vla.policies.scratch_vla import checks as scratch_vla_checks
from verl_vla.policies.scratch_vla import tiny as tiny_scratch_vla
from verl_vla.policies.scratch_vla.configuration import read_config as read_scratch_vla_config


class TinyBuilder(Protocol):
    """Builds an untrained tiny policy, small enough for a CPU."""

    def __call__(
        self, instructions: Sequence[str], statistics: ActionStatistics, *, seed: int
    ) -> TrainablePolicy:
        """Build it: the tokenizer knows the words of ``instructions``, ``seed`` is the weights'."""
        ...


class Examine(Protocol):
    """Checks everything that a checkpoint folder must hold."""

    def __call__(
        self, folder: str | Path, unnorm_key: str | None = None, *, reads_values: bool = True
    ) -> list[Finding]:
        """Return one finding per subject; ``reads_values`` also reads all weights."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The loaders and checks of the checkpoints of one ``model_type``."""

    load_policy: Callable[[str | Path, torch.dtype, str | None], TrainablePolicy]
    load_processor: Callable[[str | Path, str | None], Processor]
    model: type[PreTrainedModel]
    read_config: Callable[[str | Path], ModelConfig]
    examine: Examine
    check_adapters: Callable[[str | Path, int, bool], None]
    """Refuses new adapters of a rank, with or without the reference policy; see `check_adapters`.
    """
    build_tiny: TinyBuilder


ARCHITECTURES = {
    OpenVLAOFTConfig.model_type: Architecture(
        load_policy=OpenVLAOFTPolicy.from_pretrained,
        load_processor=OpenVLAOFTProcessor.from_pretrained,
        model=OpenVLAOFTModel,
        read_config=read_openvla_oft_config,
        examine=openvla_oft_checks.examine,
        check_adapters=openvla_oft_checks.check_adapters,
        build_tiny=tiny_openvla_oft.build_tiny_policy,
    ),
    ScratchVLAConfig.model_type: Architecture(
        load_policy=ScratchVLAPolicy.from_pretrained,
        load_processor=ScratchVLAProcessor.from_pretrained,
        model=ScratchVLAModel,
        read_config=read_scratch_vla_config,
        examine=scratch_vla_checks.examine,
        check_adapters=scratch_vla_checks.check_adapters,
        build_tiny=tiny_scratch_vla.build_tiny_policy,
    ),
}
"""Architectures by the ``model_type`` of ``config.json``. Importing this module also registers them
with transformers' Auto classes."""


def find_architecture(model_type: str) -> Architecture:
    """Return the architecture of a ``model_type``.

    Raises:
        ConfigError: there is none of that name.
    """
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"there is no architecture {model_type!r}; {nearest(model_type, sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[model_type]


def load_policy(
    folder: str | Path, dtype: torch.dtype = torch.float32, unnorm_key: str | None = None
) -> TrainablePolicy:
    """Load a checkpoint folder, without a hub and without code from the folder.

    Args:
        folder: folder of the checkpoint.
        dtype: dtype of the weights; logits are always float32.
        unnorm_key: key of the action statistics to use; see `load_statistics`.

    Raises:
        ConfigError: a file is missing, damaged or does not fit; names it.
    """
    # by the headers of the weights: transformers would make up what is missing, or raise its own
    require_valid(folder, unnorm_key, reads_values=False)
    return _architecture(folder).load_policy(folder, dtype, unnorm_key)


def load_processor(folder: str | Path, unnorm_key: str | None = None) -> Processor:
    """Load the processor of a checkpoint folder, without its weights; see `load_policy`."""
    return _architecture(folder).load_processor(folder, unnorm_key)


def load_config(folder: str | Path) -> ModelConfig:
    """Read the configuration of a checkpoint.

    Raises:
        ConfigError: the file is missing or damaged, or of no architecture that is known here.
    """
    return _architecture(folder).read_config(folder)


def load_model(folder: str | Path, **options: Any) -> PreTrainedModel:
    """Load only the model; ``options`` are those of `PreTrainedModel.from_pretrained`."""
    model = _architecture(folder).model
    return model.from_pretrained(str(folder), local_files_only=True, **options)


def examine(
    folder: str | Path, unnorm_key: str | None = None, *, reads_values: bool = True
) -> list[Finding]:
    """Check everything that a checkpoint folder must hold, without loading a model.

    Args:
        folder: folder of the checkpoint.
        unnorm_key: key of the action statistics to use; see `load_statistics`.
        reads_values: whether to read all weights too, to see that they are finite.

    Returns:
        One finding per subject.
    """
    try:
        architecture = _architecture(folder)
    except ConfigError as error:
        return [Finding(subject="architecture", says=str(error), is_fault=True)]
    return architecture.examine(folder, unnorm_key, reads_values=reads_values)


def require_valid(
    folder: str | Path, unnorm_key: str | None = None, *, reads_values: bool = True
) -> None:
    """Refuse a checkpoint with a fault, as `examine` finds it.

    Raises:
        ConfigError: the folder has a fault; gives the first one with value, reason and remedy.
    """
    for finding in examine(folder, unnorm_key, reads_values=reads_values):
        if finding.is_fault:
            raise ConfigError(finding.says)


def check_adapters(folder: str | Path, lora_rank: int | None, *, has_kl: bool) -> None:
    """Refuse a recipe's adapters if they are not compatible with the checkpoint.

    Args:
        folder: folder of the checkpoint.
        lora_rank: rank of new adapters, or None for none.
        has_kl: whether the reference policy is needed too, which is the learner without its
            adapters.

    Raises:
        ConfigError: the adapters are not compatible; gives the reason.
    """
    if lora_rank is not None:
        _architecture(folder).check_adapters(folder, lora_rank, has_kl)


def _architecture(folder: str | Path) -> Architecture:
    model_type = read_model_type(folder)
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"{Path(folder) / CONFIG_FILE}: model_type is {model_type!r}, which cannot be trained "
            f"here; {nearest(model_type, sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[model_type]
