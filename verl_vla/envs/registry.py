"""Suites by name: LIBERO's, the embedded one, or a file of the user."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import Any

from verl_vla.core.errors import ConfigError
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.core.plugins import import_file
from verl_vla.core.text import nearest
from verl_vla.envs.base import Env, EnvConfig, StepLimit, Suite
from verl_vla.envs.libero.suite import libero_suite

ATTRIBUTES = (
    "name",
    "tasks",
    "num_init_states",
    "cameras",
    "action_dim",
    "proprio_dim",
    "gripper_dims",
)
"""Attributes that a suite of your own has to have; a base class cannot require them."""


def suite(name: str) -> Suite:
    """Return a suite by its name, or your own suite by ``path/to/file.py:ClassName``.

    Raises:
        ConfigError: the name is unknown (with the nearest known one), LIBERO is not installed, or
            the file or class cannot be used.
    """
    return _load_own_suite(name) if ".py:" in name else libero_suite(name)


def absolute_name(name: str) -> str:
    """Return a suite's name that is valid in any working directory."""
    return _locate_own_suite(name) if ".py:" in name else name


def make_env(config: EnvConfig) -> Env:
    """Build an environment of any suite; ``functools.partial(make_env, config)`` can be pickled.

    Raises:
        ConfigError: a package or file that its simulator needs is missing.
    """
    return suite(config.suite).make_env(config)


def step_limit(name: str, limit: StepLimit, task_id: int) -> int:
    """Return `Suite.step_limit` of the suite called ``name``."""
    return suite(name).step_limit(limit, task_id)


@cache
def _load_own_suite(name: str) -> Suite:
    """Make the suite that ``path/to/file.py:ClassName`` names; a process reads the file once.

    Args:
        name: a relative path starts in the working directory, or else at the project's root.

    Raises:
        ConfigError: there is no such file or class, it cannot be made, or lacks an attribute.
    """
    path, class_name = _locate(name)
    own: dict[str, type[Any]] = {
        name: cls
        for name, cls in inspect.getmembers(import_file(path), inspect.isclass)
        if issubclass(cls, Suite)
    }
    if class_name not in own:
        raise ConfigError(
            f"{path} has no suite {class_name!r}; {nearest(class_name, list(own))}; a suite "
            "extends verl_vla.envs.base.Suite"
        )
    try:
        suite = own[class_name]()
    except Exception as error:
        raise ConfigError(f"suite {name!r} could not be made: {error!r}; correct it") from error
    missing = [attribute for attribute in ATTRIBUTES if attribute not in dir(suite)]
    if missing:
        raise ConfigError(
            f"suite {name!r} lacks {', '.join(missing)}; see Suite in verl_vla/envs/base.py"
        )
    return suite


def _locate_own_suite(name: str) -> str:
    """Return the suite's name with an absolute path."""
    path, class_name = _locate(name)
    return f"{path}:{class_name}"


def _locate(name: str) -> tuple[Path, str]:
    given, class_name = name.rsplit(":", 1)
    folders = (Path.cwd(), PROJECT_FOLDER)
    found = next((f / given for f in folders if (f / given).is_file()), Path(given))
    return found.resolve(), class_name
