"""Findings about a checkpoint folder, and the checks that all policies share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from verl_vla.core.errors import ConfigError
from verl_vla.policies.checkpoint import CONFIG_FILE, first_line
from verl_vla.policies.weight_files import (
    CONVERT,
    TAKE_THE_FILE,
    find_not_finite,
    read_weight_layout,
    wrapper_of,
)

Model = TypeVar("Model", bound=nn.Module)

FLOATING = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights that a model computes with, as safetensors spells them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one check."""

    subject: str
    says: str
    """Description of the finding; for a fault, also the reason and the remedy."""
    is_fault: bool
    is_warning: bool = False
    """True for what can be trained with and is unusual enough to be looked at."""


def look(subject: str, describe: Callable[[], str]) -> Finding:
    """Return a finding with the result of ``describe``, or a fault if it raises `ConfigError`."""
    try:
        return Finding(subject=subject, says=describe(), is_fault=False)
    except ConfigError as error:
        return Finding(subject=subject, says=str(error), is_fault=True)


def build_empty(folder: str | Path, build: Callable[[], Model]) -> Model:
    """Build a model without memory for its weights.

    Raises:
        ConfigError: the sizes in ``config.json`` are those of no model.
    """
    try:
        with torch.device("meta"):
            return build()
    except ConfigError:
        raise
    # sizes that do not fit raise what the layer that meets them first raises
    except Exception as error:
        raise ConfigError(
            f"{Path(folder) / CONFIG_FILE} describes a model that cannot be built "
            f"({first_line(error)}); {TAKE_THE_FILE}"
        ) from error


def describe_weights(folder: str | Path, model: nn.Module, *, reads_values: bool) -> str:
    """Compare the stored weights with an empty ``model``.

    Args:
        folder: folder of the checkpoint.
        model: the model that its configuration describes, on the meta device.
        reads_values: whether to read the weights too; else only the files' headers are read.

    Returns:
        The number of tensors, in all and by dtype, for a message.

    Raises:
        ConfigError: if a weight is missing, unknown, of another shape or not finite, or a file is
            truncated.
    """
    stored = read_weight_layout(folder)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrapper = wrapper_of(stored)
    if wrapper:
        raise ConfigError(
            f"{folder}: all names of weights begin with {wrapper!r}, which a wrapper of the model "
            f"adds; take it off: {CONVERT.format(folder=folder)}"
        )
    for problem, names in (
        ("missing", sorted(wanted.keys() - stored.keys())),
        ("unknown", sorted(stored.keys() - wanted.keys())),
    ):
        if names:
            raise ConfigError(
                f"{folder}: {len(names)} weights are {problem}, first {names[:3]}; the weights do "
                "not belong to this config.json: take both from one checkpoint"
            )
    other = [name for name, shape in wanted.items() if stored[name][0] != shape]
    if other:
        name = other[0]
        raise ConfigError(
            f"{folder}: {len(other)} weights have another shape than config.json says, first "
            f"{name}, {stored[name][0]} for {wanted[name]}; take both from one checkpoint"
        )
    types = Counter(dtype for _, dtype in stored.values())
    for name, (_, dtype) in stored.items():
        if dtype not in FLOATING:
            raise ConfigError(
                f"{folder}: weight {name} is stored as {dtype}, and weights are read as one of "
                f"{', '.join(FLOATING)} only; save them again without quantization"
            )
    name = find_not_finite(folder) if reads_values else None
    if name is not None:
        raise ConfigError(
            f"{folder}: weight {name} holds values that are not finite, so no action of this "
            "policy means anything; the training that wrote it diverged: take an earlier checkpoint"
        )
    return f"{len(stored)} tensors, {', '.join(f'{n} {dtype}' for dtype, n in types.items())}"
