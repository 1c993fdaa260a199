"""Evaluate a policy; the same command resumes.

It does not need veRL or Ray: the model runs in this process, the simulators in others.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from verl_vla.config.shared import EnvironmentConfig, EvaluationConfig
from verl_vla.core.episode import Start
from verl_vla.core.errors import ConfigError
from verl_vla.core.files import atomic_write, folder_lock, recording
from verl_vla.core.success_rate import count_entries
from verl_vla.envs.base import EnvConfig, StepLimit
from verl_vla.envs.libero.suite import PERTURBED
from verl_vla.envs.registry import suite
from verl_vla.evaluation.compare import RESULT
from verl_vla.evaluation.conditions import conditions, fixtures_of
from verl_vla.evaluation.perturbation_table import check_control
from verl_vla.evaluation.perturbed import (
    bases_of,
    plan_control,
    plan_perturbed,
    read_controls,
    spread,
    write_table,
)
from verl_vla.evaluation.published import compare_with_published, complete, published_table
from verl_vla.evaluation.resumable import (
    last_of_each,
    play_remaining,
    read_played,
    require_evaluation,
    unplayed,
)
from verl_vla.policies.base import DTYPES, Processor, TrainablePolicy
from verl_vla.policies.checkpoint import fingerprint
from verl_vla.policies.registry import load_policy, load_processor, require_valid
from verl_vla.rl.setup import (
    env_config,
    find_policy,
    find_unnorm_key,
    open_simulators,
    starts,
    task_ids,
)
from verl_vla.runs.console import EvaluationProgress
from verl_vla.runs.episode_log import EpisodeLog
from verl_vla.runs.run_dir import evaluation_record
from verl_vla.runs.terminal import bar

logger = logging.getLogger(__name__)

MOST_DIGITS = 9
"""Digits of a step limit; an episode of as many steps takes years."""


def run(options: argparse.Namespace) -> int:
    """Roll out the remaining episodes, print a table, and write ``evaluation.json``."""
    # options that a protocol decides have no default in the parser; here they get their value
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
    tasks = spread(chosen, task_ids(chosen, options.tasks), options.tasks_per_axis)
    controls = _known_controls(options, tasks)
    names = {task: chosen.tasks[task].name for task in tasks}
    chosen_starts = starts(chosen, tasks, options.states, per_task=options.episodes_per_task)
    part = _prepare(options, options.suite, names, chosen_starts)
    # before the first episode: a control of other conditions would be found after hours
    part.check(controls)
    record = _evaluate(options, part, out)
    if options.suite in PERTURBED:
        write_table(out, [record], controls)
    return 0


def _known_controls(options: argparse.Namespace, tasks: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Read the evaluations of ``--control``, by suite."""
    if options.control is None:
        return {}
    if options.suite not in PERTURBED:
        raise ConfigError(
            f"--control is {options.control}, but suite {options.suite!r} is not perturbed; add "
            "--perturbation, or leave it out"
        )
    return read_controls(Path(options.control), bases_of(options.suite, tasks))


def _run_perturbed(options: argparse.Namespace) -> None:
    """Evaluate perturbed suites and their control, each in a separate folder, and compare."""
    out = Path(options.out)
    planned = plan_perturbed(
        options.suite,
        options.perturbation,
        tasks=options.tasks,
        tasks_per_axis=options.tasks_per_axis,
        states=options.states,
        episodes=options.episodes_per_task,
    )
    control = plan_control(planned)
    bases = [part.suite for part in control]
    controls = {} if options.control is None else read_controls(Path(options.control), bases)
    # all are prepared before the first is played, so that a fault in the last one shows now
    parts = [
        _prepare(options, part.suite, part.task_names, part.starts)
        for part in [*([] if controls else control), *planned]
    ]
    for part in parts:
        part.check(controls)
    records: dict[str, dict[str, Any]] = {}
    for part in parts:
        logger.info("%s: %d episodes", part.suite, len(part.starts))
        records[part.suite] = _evaluate(options, part, out / part.suite)
    write_table(
        out,
        [records[part.suite] for part in planned],
        controls or {suite: records[suite] for suite in bases},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One suite, with the settings that are known before its first episode."""

    suite: str
    names: Mapping[int, str]
    starts: Sequence[Start]
    folder: Path
    processor: Processor
    env: EnvironmentConfig
    simulated: EnvConfig
    device: str
    given: Mapping[str, Any]
    """Conditions of the evaluation."""

    def check(self, controls: Mapping[str, Mapping[str, Any]]) -> None:
        """Check that the controls are comparable with it."""
        for control in controls.values():
            chosen_starts = [(start.task_id, start.init_state_id) for start in self.starts]
            check_control(self.given, chosen_starts, control)


def _prepare(
    options: argparse.Namespace, name: str, names: Mapping[int, str], chosen_starts: Sequence[Start]
) -> _Part:
    """Determine and check the conditions of an evaluation, without weights and simulators."""
    folder = find_policy(options.policy)
    env = EnvironmentConfig(
        suite=name,
        step_limit=_step_limit(options.step_limit),
        render_size=options.render_size,
        num_workers=options.num_workers,
        num_slots=options.num_slots,
    )
    config = EvaluationConfig(
        episodes_per_task=options.episodes_per_task, temperature=options.temperature
    )
    chosen = suite(name)
    chosen.require_simulator()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unnorm_key = find_unnorm_key(folder, options.unnorm_key, chosen)
    _require_valid(folder, unnorm_key)
    processor = load_processor(folder, unnorm_key)
    for task in names:  # a small tokenizer may lack words of a perturbed instruction
        processor.prompt(chosen.task(task).instruction)
    simulated = replace(
        env_config(env, processor), fixtures=fixtures_of(options.fixtures, chosen, options.states)
    )
    given = conditions(
        simulated, names, states=options.states, temperature=config.temperature, seed=options.seed
    ) | {
        "policy": {
            "path": options.policy,
            "fingerprint": _fingerprint(folder),
            "unnorm_key": unnorm_key,
        },
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    return _Part(
        suite=name,
        names=names,
        starts=chosen_starts,
        folder=folder,
        processor=processor,
        env=env,
        simulated=simulated,
        device=device,
        given=given,
    )


def _evaluate(options: argparse.Namespace, part: _Part, out: Path) -> dict[str, Any]:
    """Roll out the starts that ``out`` lacks, and write the record."""
    # the policy has one core; simulators have the others
    torch.set_num_threads(1)
    began = time.perf_counter()
    unnorm_key = part.given["policy"]["unnorm_key"]
    policy = partial(_load, part.folder, options.dtype, unnorm_key, part.device)
    header = {**part.given, "starts": [[s.task_id, s.init_state_id] for s in part.starts]}
    # before the folder is locked, which leaves a file: it may be somebody else's
    require_evaluation(out, header)
    if unplayed(read_played(out, part.starts), len(part.starts)):
        policy()  # before the folder is created, so that a loading error leaves no folder behind
    with ExitStack() as stack:
        stack.enter_context(folder_lock(out))
        episode_log = EpisodeLog(out, header)
        # again under the lock: another process may have added some since
        found = read_played(out, part.starts)
        if found:
            logger.info("%d episodes are in %s already; the others follow", len(found), out)
        if remaining := unplayed(found, len(part.starts)):
            simulators = stack.enter_context(
                open_simulators(part.env, part.simulated, part.processor.shape)
            )
            with bar("episodes", len(remaining)) as advance:
                lines = play_remaining(
                    part.starts,
                    policy(),
                    simulators,
                    part.processor.codec,
                    episode_log,
                    found,
                    temperature=options.temperature,
                    seed=options.seed,
                    show=EvaluationProgress(len(part.starts), found, advance).show,
                )
        else:
            # nothing is left to play: only the table and the record are made again
            lines = last_of_each(found)
        _show(lines, part.names)
        time_spent = {"wall_s": time.perf_counter() - began, "episodes_found": len(found)}
        record = evaluation_record(lines, part.given, part.names) | {"time": time_spent}
        if options.protocol is not None:
            record["published"] = compare_with_published(
                suite(part.suite),
                count_entries(lines, part.names),
                part.processor.shape,
                part.simulated,
                len(part.names),
            )
            logger.info("\n%s\n", published_table(options.suite, record["published"]))
        _write(out / RESULT, record)
    return record


@cache
def _require_valid(folder: Path, unnorm_key: str | None) -> None:
    """Check the policy once for all suites: its weights are read."""
    require_valid(folder, unnorm_key)


@cache
def _fingerprint(folder: Path) -> str:
    return fingerprint(folder)


@cache
def _load(folder: Path, dtype: str, unnorm_key: str | None, device: str) -> TrainablePolicy:
    """Load the policy once for all suites."""
    policy = load_policy(folder, DTYPES[dtype], unnorm_key)
    torch.nn.Module.to(policy.model, device)
    return policy


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
    with recording(file):
        atomic_write(file, json.dumps(record, indent=1))
    logger.info("written to %s", file)


def parse_number(text: str) -> int | str:
    """Return the number that a text is in plain digits, and any other text as it is."""
    # Python takes digits of every script, and no number of thousands of them
    is_number = text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS
    return int(text) if is_number else text


def _step_limit(text: str) -> StepLimit:
    """Parse ``--step-limit``.

    Raises:
        ConfigError: it is not a known name or a number of steps.
    """
    limit = parse_number(text)
    if isinstance(limit, int) or limit in ("published", "simplevla"):
        return limit
    raise ConfigError(f"--step-limit is {text!r}; write published, simplevla, or a number of steps")
