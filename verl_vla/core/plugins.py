"""Optional packages with the extras that install them, and import of single Python files."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from verl_vla.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Extra:
    """A package, and the extra in ``pyproject.toml`` that installs it."""

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
"""Extras by option and value."""


def require_extras(options: Mapping[str, str]) -> None:
    """Refuse option values whose package is not installed.

    Raises:
        ConfigError: a package is missing; names the extra that installs it.
    """
    for option, value in options.items():
        extra = EXTRAS.get((option, value))
        if extra is not None and find_spec(extra.package) is None:
            raise ConfigError(
                f"{option} is {value!r}, which needs the package {extra.package}; install it with "
                f"pip install 'verl-vla[{extra.name}]', or choose another value"
            )


def import_file(path: Path) -> ModuleType:
    """Import a Python file that belongs to no package.

    Raises:
        ConfigError: there is no such file, or it raises while it is imported.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; check the path")
    # with a prefix, so that a file called json.py hides no module
    name = f"verl_vla_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} cannot be imported; name a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    # code of the user's, which may raise anything; half of a module must not be found later
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"{path} cannot be imported: {error!r}; correct the file") from error
    return module
