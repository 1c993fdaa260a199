"""Packages that only some recipes need, and which extra of the project brings them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from verl_vla.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Extra:
    """A package, and the extra in ``pyproject.toml`` that holds it."""

    package: str
    name: str


EXTRAS = {
    ("policy.quantization", "nf4"): Extra("bitsandbytes", "qlora"),
    ("optimizer.name", "adamw_8bit"): Extra("bitsandbytes", "qlora"),
    ("optimizer.name", "paged_adamw_8bit"): Extra("bitsandbytes", "qlora"),
    ("optimizer.name", "deepspeed_cpu_adam"): Extra("deepspeed", "deepspeed"),
    ("trainer.loggers", "mlflow"): Extra("mlflow", "tracking"),
    ("trainer.loggers", "swanlab"): Extra("swanlab", "tracking"),
}
"""By knob and value."""


def require_extras(knobs: Mapping[str, str]) -> None:
    """Refuse values of knobs whose package is not installed.

    Raises:
        ConfigError: names the extra.
    """
    for knob, value in knobs.items():
        extra = EXTRAS.get((knob, value))
        if extra is not None and find_spec(extra.package) is None:
            raise ConfigError(
                f"{knob} is {value!r}, which needs the package {extra.package}; install it with "
                f"pip install 'verl-vla[{extra.name}]', or choose another value"
            )
