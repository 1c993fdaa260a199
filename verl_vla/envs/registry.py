"""Every suite by its name: LIBERO's, the embedded one, or a file of the user's own."""

from __future__ import annotations

from verl_vla.envs.base import Env, EnvConfig, StepLimit, Suite
from verl_vla.envs.libero.suite import libero_suite
from verl_vla.envs.plugin_suite import load_own_suite, locate_own_suite


def suite(name: str) -> Suite:
    """Return a suite by its name, or one of your own by ``path/to/file.py:ClassName``.

    Raises:
        ConfigError: the name is unknown (with the nearest known one), LIBERO is not installed, or
            the file or class cannot be used.
    """
    return load_own_suite(name) if ".py:" in name else libero_suite(name)


def absolute_name(name: str) -> str:
    """The name of a suite for a process that works in another folder."""
    return locate_own_suite(name) if ".py:" in name else name


def make_env(config: EnvConfig) -> Env:
    """Build an environment of any suite; ``functools.partial(make_env, config)`` can be pickled.

    Raises:
        ConfigError: what simulates it is missing.
    """
    return suite(config.suite).make_env(config)


def step_limit(name: str, limit: StepLimit, task_id: int) -> int:
    """Return `Suite.step_limit` of the suite called ``name``."""
    return suite(name).step_limit(limit, task_id)
