"""The simulators and the noise of the benchmarks of a pool and of a rollout."""

from __future__ import annotations

import argparse
from functools import partial

from verl_vla.envs.base import EnvConfig, EnvFactory
from verl_vla.envs.libero.suite import make_libero_env
from verl_vla.envs.pool.env_pool import EnvPool
from verl_vla.policies.base import PolicyShape
from verl_vla.rl.rollout import NoiseSource

START_LIMIT_S = 300.0
"""Seconds after which a simulator that has not started counts as lost; the default of
`EnvironmentConfig.timeout_s`."""
NOISE = NoiseSource(seed=0, stream=0)


def factory_of(options: argparse.Namespace, shape: PolicyShape) -> EnvFactory:
    """Return a factory of simulators of ``--suite``, with the given step limit and image sizes."""
    config = EnvConfig(
        suite=options.suite,
        step_limit=options.steps,
        render_size=options.render_size,
        image_size=shape.image_size,
    )
    return partial(make_libero_env, config)


def open_pool(
    factory: EnvFactory, shape: PolicyShape, *, num_workers: int, num_slots: int
) -> EnvPool:
    """Start ``num_workers`` processes; the pool is a context manager."""
    return EnvPool(
        factory,
        num_workers=num_workers,
        num_slots=num_slots,
        image_shape=shape.image_shape,
        timeout_s=START_LIMIT_S,
        worker_env={},
    )
