"""Benchmark of a rollout with two alternating slot groups, against one without overlap.

The reference is the same loop with all slots in one group, in which simulators and policy wait for
each other. It also drops finished episodes and renders on demand, so the only difference is the
overlap.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch

from verl_vla.config.choices import SUITES
from verl_vla.core.episode import EpisodeSpec
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
    spread,
    take_turns,
    timed,
)
from verl_vla.envs.pool.env_pool import EnvPool
from verl_vla.policies.base import Policy
from verl_vla.policies.registry import load_policy
from verl_vla.rl.rollout import RolloutTimes, rollout

PARTS = {"peer": 1, "ours": 2}
"""Number of slot groups of each method."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add = parser.add_argument
    add("--suite", choices=SUITES, default="mini")
    add("--task", type=int, default=0, help="task id within the suite")
    add("--episodes", type=int, default=32, help="episodes per round")
    add("--steps", type=int, default=48, help="step limit of every episode")
    add("--processes", type=int, default=2, help="simulator processes")
    add("--slots", type=int, default=16, help="simulator slots: episodes that run at the same time")
    add("--rounds", type=int, default=5, help="rounds of each method; the methods alternate")
    add("--policy", default="bases/mini", help="folder of the policy")
    add("--render-size", type=int, default=128, help="height and width of an image, pixels")


def measure(options: argparse.Namespace) -> Record:
    """Roll out the same episodes with both methods, alternately."""
    require_positive(options, "episodes", "steps", "processes", "slots", "rounds", "render_size")
    require_scene(options.suite, options.task)
    torch.set_num_threads(1)
    policy = load_policy(require_policy(options.policy))
    specs = [
        EpisodeSpec(task_id=options.task, init_state_id=0, group_id=0, episode_id=i)
        for i in range(options.episodes)
    ]
    factory = factory_of(options, policy.shape)
    slots = options.slots
    with open_pool(factory, policy.shape, num_workers=options.processes, num_slots=slots) as pool:
        results = compare(pool, policy, specs, rounds=options.rounds)
    kept = ("suite", "episodes", "steps", "processes", "slots", "rounds", "render_size")
    return record("rollout", options, {k: getattr(options, k) for k in kept} | results)


def compare(
    pool: EnvPool, policy: Policy, specs: list[EpisodeSpec], *, rounds: int
) -> dict[str, Any]:
    """Measure both methods on ``specs``, after a round that builds the simulators."""
    rollout(specs, policy, pool, temperature=1.0, noise=NOISE)
    times = {name: RolloutTimes() for name in PARTS}
    policy_steps = dict.fromkeys(PARTS, 0)

    def one_round(name: str) -> Seconds:
        def work() -> None:
            played = rollout(
                specs,
                policy,
                pool,
                temperature=1.0,
                noise=NOISE,
                times=times[name],
                num_parts=PARTS[name],
            )
            policy_steps[name] += len(played.policy_steps)

        return timed(work)

    # warm already: the round above has built the simulators
    taken = take_turns({name: partial(one_round, name) for name in PARTS}, rounds=rounds, warm_up=0)
    found: dict[str, Any] = {
        "times_faster": ratio([s.clock for s in taken["peer"]], [s.clock for s in taken["ours"]])
    }
    for name, spent in times.items():
        found |= {
            f"{name}_round_s": spread([s.clock for s in taken[name]], 2),
            f"{name}_policy_steps_per_s": round(policy_steps[name] / spent.total_s, 1),
            f"{name}_env_wait_share": round(spent.wait_s / spent.total_s, 2),
            f"{name}_policy_share": round(spent.policy_s / spent.total_s, 2),
        }
    return found
