"""``eval --policy DIR --suite NAME ...``: measure a policy on held-out starts.

Needs neither veRL nor Ray: the model runs in this process, the simulators beside it.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from verl_vla.build import (
    check_assets,
    env_config,
    find_policy,
    open_simulators,
    starts,
    task_ids,
)
from verl_vla.envs.suites import SUITES, StepLimit, suite
from verl_vla.errors import ConfigError
from verl_vla.evaluation import EvaluatedStates, Evaluation, EvaluationConfig, evaluate
from verl_vla.policies.loading import load_policy
from verl_vla.provenance import provenance
from verl_vla.recipe import EnvironmentConfig
from verl_vla.run_folder import evaluation_record

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run(arguments: Sequence[str]) -> int:
    """Play, count, print a table, and write ``evaluation.json`` into the output folder."""
    options = _parser().parse_args(arguments)
    chosen = suite(options.suite)
    tasks = task_ids(chosen, options.tasks)
    folder = find_policy(options.policy)
    config = EvaluationConfig(
        episodes_per_task=options.episodes,
        temperature=_temperature(options.sampling),
        states=options.states,
    )
    evaluated = starts(chosen, tasks, config.states, per_task=config.episodes_per_task)
    env = EnvironmentConfig(
        suite=options.suite,
        step_limit=_step_limit(options.limit),
        render_size=options.render_size,
        num_workers=options.workers,
        num_slots=options.slots,
    )
    check_assets(chosen)
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = load_policy(folder, DTYPES[options.dtype], options.unnorm_key)
    torch.nn.Module.to(policy.model, device)
    began = time.perf_counter()
    simulated = env_config(env, policy.processor)
    with open_simulators(env, simulated, policy.shape) as simulators:
        result = evaluate(evaluated, policy, simulators, config=config, seed=options.seed)
    names = {task: chosen.tasks[task].name for task in tasks}
    _show(result, names)
    record = evaluation_record(result, simulated, names) | {
        "policy": options.policy,
        "sampling": options.sampling,
        "seed": options.seed,
        "wall_s": time.perf_counter() - began,
        "versions": provenance(),
    }
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps(record, indent=1))
    logger.info("written to %s", out / "evaluation.json")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m verl_vla eval", description=__doc__)
    add = parser.add_argument
    add("--policy", required=True, help="folder of a checkpoint")
    add("--suite", required=True, help=f"one of {', '.join(SUITES)}")
    add("--tasks", type=int, nargs="+", help="task ids; all if not given")
    add("--episodes", type=int, help="starts per task; all held-out ones if not given")
    add("--states", choices=get_args(EvaluatedStates), default="held_out", help="which starts")
    add("--sampling", default="greedy", help="greedy, or a temperature")
    add("--limit", default="published", help="step limit: published, simplevla, or a number")
    add("--render-size", type=int, help="camera picture, px; the policy's own if not given")
    add("--dtype", choices=sorted(DTYPES), default="float32")
    add("--unnorm-key", help="entry of dataset_statistics.json")
    add("--seed", type=int, default=0, help="of the noise of sampled play")
    add("--workers", type=int, default=2, help="simulator processes")
    add("--slots", type=int, default=16, help="episodes under way at the same time")
    add("--out", required=True, help="folder to write to")
    return parser


def _temperature(sampling: str) -> float:
    if sampling == "greedy":
        return 0.0
    try:
        return float(sampling)
    except ValueError as error:
        raise ConfigError(
            f"--sampling is {sampling!r}; write greedy, or a temperature such as 1.0"
        ) from error


def _step_limit(limit: str) -> StepLimit:
    if limit.isdigit():
        return int(limit)
    if limit not in ("published", "simplevla"):
        raise ConfigError(f"--limit is {limit!r}; write published, simplevla, or a number of steps")
    return limit


def _show(result: Evaluation, names: dict[int, str]) -> None:
    width = max(len(name) for name in names.values())
    for task, rate in [*result.per_task.items(), (None, result.total)]:
        low, high = rate.ci95
        logger.info(
            "%-*s  %5.1f%%  %3d of %3d  95%% %5.1f-%5.1f%%  crashed %d",
            width,
            "all tasks" if task is None else names[task],
            100 * rate.rate,
            rate.successes,
            rate.episodes,
            100 * low,
            100 * high,
            rate.crashes,
        )
