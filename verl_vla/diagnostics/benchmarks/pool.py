"""Benchmark of the number of simulator processes: speedup, and its limit."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from verl_vla.config.choices import SUITES
from verl_vla.core.episode import EpisodeSpec, Observation
from verl_vla.core.tables import ActionChunk
from verl_vla.diagnostics.benchmarks.measuring import (
    NOISE,
    Record,
    Seconds,
    factory_of,
    open_pool,
    ratio,
    record,
    require_policy,
    require_positive,
    require_scene,
    take_turns,
    timed,
)
from verl_vla.envs.base import EnvFactory
from verl_vla.envs.pool.env_pool import EnvPool
from verl_vla.policies.base import Policy, PolicyShape
from verl_vla.policies.registry import load_policy
from verl_vla.rl.rollout import RolloutTimes, rollout

SLOTS_PER_PROCESS = 2
"""Slots per process: one for each slot group of a rollout, so that no process waits for the
policy."""
LEAST_EPISODES = 16


class IdlePolicy:
    """A policy without cost, whose small moves solve no task: only the simulators take time."""

    def __init__(self, shape: PolicyShape) -> None:
        self.shape = shape

    def act(
        self, observations: Sequence[Observation], noise: torch.Tensor, *, temperature: float
    ) -> ActionChunk:
        """Return small moves that are a function of ``noise`` only."""
        n, shape = len(observations), self.shape
        # [n, T] in [0, 1) -> [n, K, A] in [-0.5, 0.5)
        moves = (noise.numpy() - 0.5).reshape(n, shape.chunk_length, shape.action_dim)
        return ActionChunk(
            action_tokens=torch.zeros(n, shape.num_tokens, dtype=torch.int64),
            log_probs=torch.zeros(n, shape.num_tokens),
            prompt_ids=[torch.zeros(1, dtype=torch.int64)] * n,
            actions=moves.astype(np.float32),
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add = parser.add_argument
    add("--suite", choices=SUITES, default="mini")
    add("--task", type=int, default=1, help="task id within the suite")
    add("--steps", type=int, default=48, help="step limit of every episode")
    add("--processes", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="simulator processes")
    add("--rounds", type=int, default=5, help="rounds of 1 and 2 processes, which alternate")
    add("--policy", default="bases/mini", help="policy folder; also measured without a policy")
    add("--render-size", type=int, default=128, help="height and width of an image, pixels")


def measure(options: argparse.Namespace) -> Record:
    """Roll out the same episodes with more and more processes, without a policy and with one."""
    require_positive(options, "processes", "rounds", "steps", "render_size")
    # before any process starts
    require_scene(options.suite, options.task)
    policy = load_policy(require_policy(options.policy))
    factory = factory_of(options, policy.shape)
    idle = IdlePolicy(policy.shape)
    results: dict[str, Any] = {
        "suite": options.suite,
        "render_size": options.render_size,
        "steps_per_episode": options.steps,
        "slots_per_process": SLOTS_PER_PROCESS,
        "cores": os.cpu_count(),
        **two_against_one(factory, idle, rounds=options.rounds, task=options.task),
    }
    # the policy has one core; simulators have the others
    torch.set_num_threads(1)
    for count in options.processes:
        results |= scaling(factory, count, {"idle": idle, "policy": policy}, task=options.task)
    return record("pool", options, results)


def two_against_one(
    factory: EnvFactory, policy: IdlePolicy, *, rounds: int, task: int
) -> dict[str, Any]:
    """Roll out the same episodes with one process and with two, alternately."""
    # both pools stay open, so that their rounds can alternate
    with _pool(factory, 1, policy.shape) as one, _pool(factory, 2, policy.shape) as two:
        ways = {
            "one": partial(_timed_play, one, policy, task),
            "two": partial(_timed_play, two, policy, task),
        }
        taken = take_turns(ways, rounds=rounds, warm_up=1)
    times = ratio([s.clock for s in taken["one"]], [s.clock for s in taken["two"]])
    return {"two_processes_times_one": times}


def scaling(
    factory: EnvFactory, count: int, policies: dict[str, Policy], *, task: int
) -> dict[str, Any]:
    """Measure ``count`` processes under each policy: policy steps per second, shares of time."""
    found: dict[str, Any] = {}
    for name, policy in policies.items():
        with _pool(factory, count, policy.shape) as pool:
            _play(pool, policy, task)  # warm-up: builds the simulators
            times = RolloutTimes()
            policy_steps = [_play(pool, policy, task, times) for _ in range(2)]
        found |= {
            f"{name}_policy_steps_per_s_{count}": round(sum(policy_steps) / times.total_s, 1),
            f"{name}_env_wait_share_{count}": round(times.wait_s / times.total_s, 2),
            f"{name}_policy_share_{count}": round(times.policy_s / times.total_s, 2),
        }
    return found


def _pool(factory: EnvFactory, count: int, shape: PolicyShape) -> EnvPool:
    return open_pool(factory, shape, num_workers=count, num_slots=SLOTS_PER_PROCESS * count)


def _play(pool: EnvPool, policy: Policy, task: int, times: RolloutTimes | None = None) -> int:
    specs = [
        EpisodeSpec(task_id=task, init_state_id=0, group_id=0, episode_id=i)
        # at least two episodes a slot, so that slots are taken over as in training
        for i in range(max(LEAST_EPISODES, 2 * pool.num_slots))
    ]
    return len(rollout(specs, policy, pool, temperature=1.0, noise=NOISE, times=times).policy_steps)


def _timed_play(pool: EnvPool, policy: Policy, task: int) -> Seconds:
    return timed(lambda: _play(pool, policy, task))
