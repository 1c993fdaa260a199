"""Findings about a checkpoint folder, and the checks that all policies share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from verl_vla.core.errors import ConfigError
from verl_vla.policies.checkpoint import read_weight_layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one check."""

    subject: str
    says: str
    """Description of the finding; for a fault, also the reason and the remedy."""
    is_fault: bool


def look(subject: str, describe: Callable[[], str]) -> Finding:
    """Return a finding with the result of ``describe``, or a fault if it raises `ConfigError`."""
    try:
        return Finding(subject=subject, says=describe(), is_fault=False)
    except ConfigError as error:
        return Finding(subject=subject, says=str(error), is_fault=True)


def describe_weights(folder: str | Path, model: nn.Module) -> str:
    """Compare the stored weights with an empty ``model``, by the files' headers only.

    Returns:
        The number of tensors, in all and by dtype, for a message.

    Raises:
        ConfigError: if a weight is missing, unknown or of another shape, or a file is truncated.
    """
    stored = read_weight_layout(folder)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
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
    return f"{len(stored)} tensors, {', '.join(f'{n} {dtype}' for dtype, n in types.items())}"
