"""Suites by name: LIBERO's, the embedded one, or a file of the user."""

from __future__ import annotations

from verl_vla.envs.base import Env, EnvConfig, StepLimit, Suite
from verl_vla.envs.libero.suite import libero_suite
from verl_vla.envs.plugin_suite import load_own_suite, locate_own_suite


def suite(name: str) -> Suite:
    """Return a suite by its name, or your own suite by ``path/to/file.py:ClassName``.

    Raises:
        ConfigError: the name is unknown (with the nearest known one), LIBERO is not installed, or
            the file or class cannot be used.
    """
    return load_own_suite(name) if ".py:" in name else libero_suite(name)


def absolute_name(name: str) -> str:
    """Return a suite's name that is valid in any working directory."""
    return locate_own_suite(name) if ".py:" in name else name


def make_env(config: EnvConfig) -> Env:
    """Build an environment of any suite; ``functools.partial(make_env, config)`` can be pickled.

    Raises:
        ConfigError: a package or file that its simulator needs is missing.
    """
    return suite(config.suite).make_env(config)


def step_limit(name: str, limit: StepLimit, task_id: int) -> int:
    """Return `Suite.step_limit` of the suite called ``name``."""
    return suite(name).step_limit(limit, task_id)
