"""``eval --policy DIR --suite NAME --out DIR ...``: measure a policy; the same command resumes.

Needs neither veRL nor Ray: the model runs in this process, the simulators beside it.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch

from verl_vla.build import (
    env_config,
    find_policy,
    open_simulators,
    starts,
    task_ids,
)
from verl_vla.comparison import RESULT
from verl_vla.conditions import conditions
from verl_vla.envs.suites import PERTURBED, SUITES, Split, StepLimit, suite
from verl_vla.errors import ConfigError
from verl_vla.evaluation import EvaluationConfig, count_entries
from verl_vla.folder_lock import folder_lock
from verl_vla.journal import Journal, read_episodes
from verl_vla.perturbed_evaluation import (
    PERTURBATIONS,
    bases_of,
    plan_control,
    plan_perturbed,
    read_controls,
    spread,
    write_table,
)
from verl_vla.policies.base import TrainablePolicy
from verl_vla.policies.checkpoint import fingerprint
from verl_vla.policies.loading import load_policy
from verl_vla.progress import EvaluationProgress
from verl_vla.published import PROTOCOLS, compare_with_published, complete, published_table
from verl_vla.recipe import EnvironmentConfig
from verl_vla.resumable_evaluation import play_remaining
from verl_vla.run_folder import evaluation_record
from verl_vla.sampling import Start
from verl_vla.whole_file import write_whole

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run(arguments: Sequence[str]) -> int:
    """Play what is not yet played, count, print a table, and write ``evaluation.json``."""
    options = _parser().parse_args(arguments)
    vars(options).update(complete(vars(options)))
    if options.perturbation:
        if options.protocol is not None:
            raise ConfigError(
                f"--protocol is {options.protocol} and --perturbation "
                f"{', '.join(options.perturbation)}, but nothing is published of perturbed suites "
                "under that protocol; leave one of them out"
            )
        _run_perturbed(options)
        return 0
    chosen, out = suite(options.suite), Path(options.out)
    controls = _known_controls(options)
    tasks = spread(chosen, task_ids(chosen, options.tasks), options.tasks_per_axis)
    names = {task: chosen.tasks[task].name for task in tasks}
    played = starts(chosen, tasks, options.states, per_task=options.episodes)
    record = _evaluate(options, options.suite, names, played, out)
    if options.suite in PERTURBED:
        write_table(out, [record], controls)
    return 0


def _known_controls(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Evaluations that ``--control`` names, by suite."""
    if options.control is None:
        return {}
    if options.suite not in PERTURBED:
        raise ConfigError(
            f"--control is {options.control}, but suite {options.suite!r} is not perturbed; add "
            "--perturbation, or leave it out"
        )
    return read_controls(Path(options.control), bases_of(options.suite))


def _run_perturbed(options: argparse.Namespace) -> None:
    """Evaluate perturbed suites and their control, each in a folder of its own, and compare."""
    out = Path(options.out)
    planned = plan_perturbed(
        options.suite,
        options.perturbation,
        tasks=options.tasks,
        tasks_per_axis=options.tasks_per_axis,
        states=options.states,
        episodes=options.episodes,
    )
    control = plan_control(planned)
    bases = [part.suite for part in control]
    controls = {} if options.control is None else read_controls(Path(options.control), bases)
    records: dict[str, dict[str, Any]] = {}
    for part in [*([] if controls else control), *planned]:
        logger.info("%s: %d episodes", part.suite, len(part.starts))
        records[part.suite] = _evaluate(
            options, part.suite, part.task_names, part.starts, out / part.suite
        )
    write_table(
        out,
        [records[part.suite] for part in planned],
        controls or {suite: records[suite] for suite in bases},
    )


def _evaluate(
    options: argparse.Namespace,
    suite_name: str,
    names: Mapping[int, str],
    played: Sequence[Start],
    out: Path,
) -> dict[str, Any]:
    """Play what ``out`` lacks of the starts, and write the record."""
    chosen = suite(suite_name)
    folder = find_policy(options.policy)
    config = EvaluationConfig(
        episodes_per_task=options.episodes, temperature=_temperature(options.sampling)
    )
    env = EnvironmentConfig(
        suite=suite_name,
        step_limit=_step_limit(options.limit),
        render_size=options.render_size,
        num_workers=options.workers,
        num_slots=options.slots,
    )
    chosen.require_simulator()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = _load(folder, options.dtype, options.unnorm_key, device)
    simulated = env_config(env, policy.processor)
    given = conditions(
        simulated, names, states=options.states, temperature=config.temperature, seed=options.seed
    ) | {
        "policy": {
            "path": options.policy,
            "fingerprint": fingerprint(folder),
            "unnorm_key": options.unnorm_key,
        },
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    began = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(folder_lock(out))
        journal = Journal(out, given | {"starts": [[s.task_id, s.init_state_id] for s in played]})
        found = read_episodes(out)
        if found:
            logger.info("%d episodes are in %s already; the others follow", len(found), out)
        simulators = stack.enter_context(open_simulators(env, simulated, policy.shape))
        lines = play_remaining(
            played,
            policy,
            simulators,
            policy.processor.codec,
            journal,
            found,
            temperature=config.temperature,
            seed=options.seed,
            show=EvaluationProgress(len(played), found).show,
        )
        _show(lines, names)
        time_spent = {"wall_s": time.perf_counter() - began, "episodes_found": len(found)}
        record = evaluation_record(lines, given, names) | {"time": time_spent}
        if options.protocol is not None:
            record["published"] = compare_with_published(
                chosen, count_entries(lines, names), policy.shape, env.step_limit, len(names)
            )
            logger.info("\n%s\n", published_table(options.suite, record["published"]))
        _write(out / RESULT, record)
    return record


@cache
def _load(folder: Path, dtype: str, unnorm_key: str | None, device: str) -> TrainablePolicy:
    """The policy; read once, however many suites it plays."""
    policy = load_policy(folder, DTYPES[dtype], unnorm_key)
    torch.nn.Module.to(policy.model, device)
    return policy


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m verl_vla eval", description=__doc__)
    add = parser.add_argument
    add("--policy", required=True, help="folder of a checkpoint")
    add(
        "--suite",
        required=True,
        help=f"{', '.join(SUITES)}, a perturbed one such as libero_plus, "
        "or path/to/file.py:ClassName",
    )
    add("--tasks", type=int, nargs="+", help="task ids; all if not given")
    add("--episodes", type=int, help="starts per task; all recorded ones if not given")
    add(
        "--protocol",
        choices=PROTOCOLS,
        help="published: all tasks and recorded init states, greedy, openvla-oft's step limits, "
        "256 px, and a table beside published rates; LIBERO's suites of ten tasks",
    )
    add(
        "--states",
        choices=get_args(Split),
        help="held_out (default); official: all recorded starts; drawn: new ones",
    )
    add("--sampling", help="greedy (default), or a temperature")
    add("--limit", help="step limit: published (default), simplevla, or a number")
    add("--render-size", type=int, help="camera picture, px; the policy's own if not given")
    add("--dtype", choices=sorted(DTYPES), default="float32")
    add("--unnorm-key", help="entry of dataset_statistics.json")
    add("--seed", type=int, default=0, help="of the noise of sampled play")
    add("--workers", type=int, default=2, help="simulator processes")
    add("--slots", type=int, default=16, help="episodes under way at the same time")
    add(
        "--perturbation",
        nargs="+",
        help=f"perturb the suite, and print a table beside its control: {', '.join(PERTURBATIONS)}",
    )
    add("--control", help="earlier eval of the unperturbed suite; played too if not given")
    add("--tasks-per-axis", type=int, help="of LIBERO-Plus: at most so many variants of each axis")
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


def _show(lines: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> None:
    rows = [(name, [task]) for task, name in names.items()] + [("all tasks", list(names))]
    width = max(len(name) for name, _ in rows)
    for name, tasks in rows:
        rate = count_entries(lines, tasks)
        low, high = rate.ci95
        logger.info(
            "%-*s  %5.1f%%  %3d of %3d  95%% %5.1f-%5.1f%%  crashed %d",
            width,
            name,
            100 * rate.rate,
            rate.successes,
            rate.episodes,
            100 * low,
            100 * high,
            rate.crashes,
        )


def _write(file: Path, record: Mapping[str, Any]) -> None:
    write_whole(file, json.dumps(record, indent=1))
    logger.info("written to %s", file)
