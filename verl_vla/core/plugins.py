"""Optional packages with the extras that install them, and import of single Python files."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from verl_vla.core.errors import ConfigError

PLUGIN_PREFIX = "verl_vla_plugin_"
"""Begin of the names of modules that are single files."""


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
    name = f"{PLUGIN_PREFIX}{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} cannot be imported; name a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    try:
        with without_exits():
            spec.loader.exec_module(module)
    # code of the user's, which may raise anything; half of a module must not be found later
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(
            f"{path} cannot be imported: {error!r}{origin(error, path)}; correct the file"
        ) from error
    return module


class PluginExit(RuntimeError):  # noqa: N818 -- an event, named for what happened
    """A plug-in asked to end the process that runs it."""


@contextmanager
def without_exits() -> Generator[None]:
    """Raise `PluginExit` where code of somebody else would end this process.

    The command line would take ``exit()`` for its own end, and after ``os._exit`` nothing is said
    and nothing saved.
    """
    real = os._exit

    def refuse(code: int) -> NoReturn:
        raise PluginExit(f"it called os._exit({code})")

    os._exit = refuse
    try:
        yield
    except SystemExit as error:
        raise PluginExit(f"it called exit({error.code})") from error
    finally:
        os._exit = real


def origin(error: BaseException, path: Path | None = None) -> str:
    """Return where in a plug-in's file an error comes from, for a message; empty if unknown.

    Args:
        error: what it raised, perhaps while another error of its own was handled.
        path: the file; None takes the file of any plug-in.
    """
    found = ""
    seen: BaseException | None = error
    while seen is not None:
        for frame in traceback.extract_tb(seen.__traceback__):
            # the last one is the innermost
            if _is_plugin(frame.filename) if path is None else Path(frame.filename) == path:
                found = f" ({frame.filename}, line {frame.lineno})"
        seen = seen.__cause__
    return found


def _is_plugin(filename: str) -> bool:
    """Whether a module of this file was imported by `import_file`."""
    return any(
        name.startswith(PLUGIN_PREFIX) and module.__file__ == filename
        for name, module in list(sys.modules.items())
    )
