"""``reward-bench --rewards A,B ...``: do rewards rank failures as the simulator does?

Plays groups of episodes from training starts, or reads recorded ones, lets every reward learn from
one half of the starts and judges it on the other. Needs neither veRL nor Ray.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from verl_vla.config.grpo import EnvironmentConfig
from verl_vla.core.episode import EpisodeSpec
from verl_vla.core.errors import ConfigError
from verl_vla.core.files import atomic_write, folder_lock, writing_to
from verl_vla.core.provenance import provenance
from verl_vla.core.schema import parse
from verl_vla.core.success_rate import count
from verl_vla.core.tables import Trajectories
from verl_vla.envs.libero.suite import SUITES
from verl_vla.envs.registry import suite
from verl_vla.policies.checkpoint import weight_files
from verl_vla.policies.registry import load_policy, load_processor
from verl_vla.rewards.benchmark import (
    VERDICT_RULE,
    BenchConfig,
    BenchRow,
    PlayConfig,
    Sample,
    choose_groups,
    claim,
    describe,
    draw_features,
    draw_progress,
    draw_reliability,
    halve,
    is_complete,
    make_entries,
    make_sample,
    measure,
    paper_table,
    play_missing,
    played_with,
    ranking_table,
    read_rewards,
    read_rounds,
    table_as_json,
    verdicts,
)
from verl_vla.rl.setup import env_config, find_policy, open_simulators, starts, task_ids

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RESULT_FILE = "reward_bench.json"
EPISODES_FOLDER = "episodes"
WEIGHTS = "weights"
"""Key of the digest of the policy's weights, in the record of the episodes."""
PLAY_OPTIONS = (
    "policy",
    "suite",
    "tasks",
    "groups",
    "group_size",
    "temperature",
    "step_limit",
    "render_size",
    "dtype",
    "unnorm_key",
    "slots",
)
"""Options that say what is played; their defaults stand in `PlayConfig`."""


def run(arguments: Sequence[str]) -> int:
    """Play or read, measure, print tables, and write JSON and images."""
    options = _parser().parse_args(arguments)
    began = time.perf_counter()
    torch.set_num_threads(1)
    specs = read_rewards(options.rewards, options.reward_args)
    config = BenchConfig(
        seed=options.seed,
        groups_per_update=options.groups_per_update,
        curve_groups=options.curve_groups,
    )
    entries = make_entries(specs, config.seed)
    out = Path(options.out)
    folder, played, record = _find_episodes(options, out)
    result: dict[str, Any] = {
        "verdict_rule": VERDICT_RULE,
        "config": asdict(config),
        "rewards": {label: asdict(spec) for label, spec in specs.items()},
        "played": record,
        "versions": provenance(),
    }
    # the rule stands in the result before there is anything to judge
    _write(out, result)
    if options.episodes is None:
        _play(folder, played, _environment(played, options.workers))
    trajectories = read_rounds(folder, played.groups)
    train, test = halve(make_sample(trajectories, suite=played.suite, split="train"))
    rows = measure(entries, train, test, config)
    result |= {
        "outcomes": _outcomes(trajectories, played),
        "test": describe(test),
        "table": table_as_json(rows, verdicts(rows)),
        "wall_s": time.perf_counter() - began,
    }
    _write(out, result)
    _show(out, rows, test, result)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m verl_vla reward-bench", description=__doc__)
    add = parser.add_argument
    add("--rewards", required=True, help="NAME,LABEL=NAME,... or a .yaml file of them")
    add("--reward-args", nargs="+", default=[], metavar="LABEL.KEY=VALUE", help="constructors'")
    add("--out", required=True, help="folder to write to; the same call again reads its episodes")
    add("--episodes", help="folder of episodes that were played before; plays none")
    add("--seed", type=int, default=0, help="of starts, noise, rewards and intervals")
    add("--groups-per-update", type=int, default=8, help="groups that a reward learns from at once")
    add("--curve-groups", type=int, default=16, help="groups whose progress is followed; 0: none")
    add("--workers", type=int, default=2, help="simulator processes")
    play = parser.add_argument_group("what is played").add_argument
    play("--policy", help="folder of a checkpoint")
    play("--suite", help=f"one of {', '.join(SUITES)}")
    play("--tasks", type=int, nargs="+", help="task ids; all if not given")
    play("--groups", type=int, help="in all, each from a training start of its own")
    play("--group-size", type=int, help="episodes of a group")
    play("--temperature", type=float, help="of the action tokens")
    play("--limit", dest="step_limit", help="step limit: published, simplevla, or a number")
    play("--render-size", type=int, help="camera image, px; the policy's own if not given")
    play("--dtype", choices=sorted(DTYPES))
    play("--unnorm-key", help="entry of dataset_statistics.json")
    play("--slots", type=int, help="episodes under way at the same time")
    return parser


def _find_episodes(
    options: argparse.Namespace, out: Path
) -> tuple[Path, PlayConfig, dict[str, Any]]:
    """The folder of the episodes, how they are played, and the record of that.

    Everything that can be wrong with them is found here.
    """
    values = {name: value for name, value in vars(options).items() if name in PLAY_OPTIONS}
    given = {name: value for name, value in values.items() if value is not None}
    if options.episodes is not None:
        if given:
            raise ConfigError(
                f"{', '.join(given)} would say what is played, but --episodes names what was; "
                "leave one of them out"
            )
        folder = Path(options.episodes)
        record = played_with(folder)
        values = {name: value for name, value in record.items() if name != WEIGHTS}
        return folder, parse(PlayConfig, values), record
    limit = given.get("step_limit")
    if limit is not None and limit.isdigit():
        given["step_limit"] = int(limit)
    played = parse(PlayConfig, given | {"seed": options.seed})
    chosen = suite(played.suite)
    chosen.require_simulator()
    _groups(played)
    policy = find_policy(played.policy)
    processor = load_processor(policy, played.unnorm_key)
    simulated = env_config(_environment(played, options.workers), processor)
    played = replace(played, render_size=simulated.render_size)
    record = asdict(played) | {WEIGHTS: _digest(policy)}
    folder = out / EPISODES_FOLDER
    claim(folder, record)
    return folder, played, record


def _environment(played: PlayConfig, workers: int) -> EnvironmentConfig:
    return EnvironmentConfig(
        suite=played.suite,
        step_limit=played.step_limit,
        render_size=played.render_size,
        num_workers=workers,
        num_slots=played.slots,
    )


def _play(folder: Path, played: PlayConfig, env: EnvironmentConfig) -> None:
    """Play what is missing; where nothing is, neither policy nor simulator is loaded."""
    if is_complete(folder, played.groups):
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = load_policy(find_policy(played.policy), DTYPES[played.dtype], played.unnorm_key)
    torch.nn.Module.to(policy.model, device)
    simulated = replace(env_config(env, policy.processor), render_final=True)
    with folder_lock(folder), open_simulators(env, simulated, policy.shape) as simulators:
        play_missing(
            folder,
            _groups(played),
            policy,
            simulators,
            temperature=played.temperature,
            seed=played.seed,
        )


def _groups(played: PlayConfig) -> list[list[EpisodeSpec]]:
    chosen = suite(played.suite)
    training = starts(chosen, task_ids(chosen, played.tasks), "train")
    return choose_groups(
        training, groups=played.groups, group_size=played.group_size, seed=played.seed
    )


def _digest(folder: Path) -> str:
    """SHA-256 of a policy's weights: what is in a folder of the same name may have changed."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _outcomes(trajectories: Trajectories, played: PlayConfig) -> dict[str, Any]:
    """Counts and step limits of all that was played, by task."""
    chosen = suite(played.suite)
    return {
        chosen.tasks[task].name: count(trajectories, [task]).as_json()
        | {"step_limit": chosen.step_limit(played.step_limit, task)}
        for task in task_ids(chosen, played.tasks)
    }


def _write(out: Path, result: dict[str, Any]) -> None:
    """Write the result, whole or not at all."""
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / RESULT_FILE, json.dumps(result, indent=1, allow_nan=False))


def _show(out: Path, rows: Sequence[BenchRow], test: Sample, result: dict[str, Any]) -> None:
    success, truth = test.batch.success, test.truth
    draw_progress(out / "progress.png", rows, success)
    draw_reliability(out / "reliability.png", rows, truth, success)
    draw_features(out / "features.png", rows, truth, success)
    for name, rate in result["outcomes"].items():
        logger.info(
            "%-40s %3d of %3d solved, %d crashed, step limit %d",
            name,
            rate["successes"],
            rate["episodes"],
            rate["crashes"],
            rate["step_limit"],
        )
    found = result["test"]
    logger.info(
        "test split: %d groups, %d failures, of which %d near-misses and %d far misses\n",
        found["groups"],
        found["failures"],
        found["near_misses"],
        found["far misses"],
    )
    logger.info("%s\n", ranking_table(rows, verdicts(rows)))
    logger.info("%s\n", paper_table(rows))
    logger.info("written to %s, in %.0f s", out / RESULT_FILE, result["wall_s"])
