"""Measure whether rewards rank failures as the simulator does.

Rolls out groups of episodes from training starts, or reads recorded ones, replays them for rewards
that require videos, lets every reward learn from one half of the starts and tests it on the other.
Does not need veRL or Ray.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from verl_vla.cli.eval import parse_number
from verl_vla.config.schema import parse
from verl_vla.config.shared import EnvironmentConfig
from verl_vla.core.episode import EpisodeSpec
from verl_vla.core.errors import ConfigError
from verl_vla.core.files import atomic_write, folder_lock, writing_to
from verl_vla.core.provenance import provenance
from verl_vla.core.success_rate import count
from verl_vla.core.tables import Trajectories
from verl_vla.envs.registry import suite
from verl_vla.policies.base import DTYPES
from verl_vla.policies.registry import load_policy, load_processor
from verl_vla.policies.weight_files import weight_files
from verl_vla.rewards import VideoNeed
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
    film_missing,
    folder_name,
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
    require_groups,
    table_as_json,
    verdicts,
    video_needs,
)
from verl_vla.rewards.encoders.base import track_batches
from verl_vla.rl.setup import (
    env_config,
    find_policy,
    find_unnorm_key,
    open_simulators,
    starts,
    task_ids,
)
from verl_vla.runs.console import bar, episodes_bar
from verl_vla.runs.terminal import track_encoding

logger = logging.getLogger(__name__)

RESULT_FILE = "reward_bench.json"
EPISODES_FOLDER = "episodes"
VIDEOS_FOLDER = "videos"
"""Folder of the same episodes with videos, in a folder for each `VideoNeed`."""
WEIGHTS = "weights"
"""Key of the digest of the policy's weights in ``played.json``."""
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
    "num_slots",
)
"""Options that decide the episodes; their defaults are in `PlayConfig`."""


def run(options: argparse.Namespace) -> int:
    """Roll out or read episodes, measure, print tables, and write JSON and plots."""
    began = time.perf_counter()
    torch.set_num_threads(1)
    specs = read_rewards(options.rewards, options.reward_args)
    config = BenchConfig(
        seed=options.seed,
        groups_per_update=options.groups_per_update,
        curve_groups=options.curve_groups,
    )
    entries = make_entries(specs, config.seed)
    for entry in entries:
        track_batches(entry.reward, track_encoding)
    out = Path(options.out)
    folder, played, record = _find_episodes(options, out)
    needs = video_needs([entry.reward for entry in entries])
    filmed = {need: _find_videos(out, played, record, need) for need in needs}
    result: dict[str, Any] = {
        "verdict_rule": VERDICT_RULE,
        "config": asdict(config),
        "rewards": {label: asdict(spec) for label, spec in specs.items()},
        "played": record,
        "versions": provenance(),
    }
    # the rule is written before the measurement, so that it cannot be fitted to the result
    _write(out, result)
    environment = _environment(played, options.num_workers)
    if options.episodes_from is None:
        _play(folder, played, environment)
    trajectories = read_rounds(folder, played.groups)
    require_groups(folder, trajectories, _groups(played))
    halves: dict[VideoNeed | None, tuple[Sample, Sample]] = {}
    halves[None] = _halves(trajectories, played, None)
    for need, videos in filmed.items():
        _film(folder, videos, played, environment, need)
        halves[need] = _halves(read_rounds(videos, played.groups), played, need)
    rows = measure(entries, halves, config)
    test = halves[None][1]
    result |= {
        "outcomes": _outcomes(trajectories, played),
        "test": describe(test),
        "table": table_as_json(rows, verdicts(rows)),
        "wall_s": time.perf_counter() - began,
    }
    _write(out, result)
    _show(out, rows, test, result)
    return 0


def _find_episodes(
    options: argparse.Namespace, out: Path
) -> tuple[Path, PlayConfig, dict[str, Any]]:
    """Return the folder of the episodes, their settings, and the record of these settings.

    Errors in the settings are found here, before any rollout.
    """
    values = {name: value for name, value in vars(options).items() if name in PLAY_OPTIONS}
    given = {name: value for name, value in values.items() if value is not None}
    if options.episodes_from is not None:
        if given:
            raise ConfigError(
                f"{', '.join(given)} would say what is played, but --episodes-from names what was; "
                "leave one of them out"
            )
        folder = Path(options.episodes_from)
        record = played_with(folder)
        values = {name: value for name, value in record.items() if name != WEIGHTS}
        return folder, parse(PlayConfig, values), record
    if "step_limit" in given:
        given["step_limit"] = parse_number(given["step_limit"])
    played = parse(PlayConfig, given | {"seed": options.seed})
    chosen = suite(played.suite)
    chosen.require_simulator()
    # for its errors: more groups than starts, or an unknown task
    _groups(played)
    policy = find_policy(played.policy)
    # what is used, where the options left it to the folder
    played = replace(played, unnorm_key=find_unnorm_key(policy, played.unnorm_key, chosen))
    processor = load_processor(policy, played.unnorm_key)
    simulated = env_config(_environment(played, options.num_workers), processor)
    # the size that is used, where the option left it to the policy
    played = replace(played, render_size=simulated.render_size)
    record = asdict(played) | {WEIGHTS: _digest(policy)}
    folder = out / EPISODES_FOLDER
    claim(folder, record)
    return folder, played, record


def _find_videos(out: Path, played: PlayConfig, record: Mapping[str, Any], need: VideoNeed) -> Path:
    """Return the folder of the episodes with videos, after a check that they can be replayed."""
    suite(played.suite).require_simulator()
    find_policy(played.policy)
    folder = out / VIDEOS_FOLDER / folder_name(need)
    claim(folder, {**record, **asdict(need)})
    return folder


def _environment(played: PlayConfig, workers: int) -> EnvironmentConfig:
    return EnvironmentConfig(
        suite=played.suite,
        step_limit=played.step_limit,
        render_size=played.render_size,
        num_workers=workers,
        num_slots=played.num_slots,
    )


def _play(folder: Path, played: PlayConfig, env: EnvironmentConfig) -> None:
    """Roll out the missing rounds; without any, load no policy and start no simulator."""
    if is_complete(folder, played.groups):
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = load_policy(find_policy(played.policy), DTYPES[played.dtype], played.unnorm_key)
    torch.nn.Module.to(policy.model, device)
    # rewards see the image after the last step, in which a success can be seen
    simulated = replace(env_config(env, policy.processor), render_final=True)
    num_episodes = played.groups * played.group_size
    with (
        folder_lock(folder),
        open_simulators(env, simulated, policy.shape) as simulators,
        episodes_bar("episodes", num_episodes) as ended,
    ):
        play_missing(
            folder,
            _groups(played),
            policy,
            simulators,
            temperature=played.temperature,
            seed=played.seed,
            ended=ended,
        )


def _film(
    episodes: Path, folder: Path, played: PlayConfig, env: EnvironmentConfig, need: VideoNeed
) -> None:
    """Replay the rounds whose videos are missing; without any, start no simulator."""
    if is_complete(folder, played.groups):
        return
    processor = load_processor(find_policy(played.policy), played.unnorm_key)
    simulated = replace(env_config(env, processor), video_every=need.every)
    with (
        folder_lock(folder),
        open_simulators(env, simulated, processor.shape) as simulators,
        bar("videos", played.groups * played.group_size) as advance,
    ):
        film_missing(
            episodes,
            folder,
            played.groups,
            processor.codec,
            simulators,
            max_frames=need.max_frames,
            ended=None if advance is None else partial(advance, ""),
        )


def _halves(
    trajectories: Trajectories, played: PlayConfig, need: VideoNeed | None
) -> tuple[Sample, Sample]:
    """Split episodes into those that rewards learn from and those that they are judged on."""
    return halve(
        make_sample(
            trajectories,
            suite=played.suite,
            split="train",
            mirrored=suite(played.suite).images_are_mirrored,
            need=need,
        )
    )


def _groups(played: PlayConfig) -> list[list[EpisodeSpec]]:
    chosen = suite(played.suite)
    training = starts(chosen, task_ids(chosen, played.tasks), "train")
    return choose_groups(
        training, groups=played.groups, group_size=played.group_size, seed=played.seed
    )


def _digest(folder: Path) -> str:
    """Return the SHA-256 of a policy's weights, since the contents of a folder may change."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with file.open("rb") as stream:
            # in blocks, since weights take gigabytes
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _outcomes(trajectories: Trajectories, played: PlayConfig) -> dict[str, Any]:
    """Return success counts and step limits of all episodes, by task."""
    chosen = suite(played.suite)
    return {
        chosen.tasks[task].name: count(trajectories, [task]).as_json()
        | {"step_limit": chosen.step_limit(played.step_limit, task)}
        for task in task_ids(chosen, played.tasks)
    }


def _write(out: Path, result: dict[str, Any]) -> None:
    """Write the result atomically."""
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        # allow_nan=False: Python would write NaN, which is no JSON
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
        found["far_misses"],
    )
    logger.info("%s\n", ranking_table(rows, verdicts(rows)))
    logger.info("%s\n", paper_table(rows))
    logger.info("written to %s, in %.0f s", out / RESULT_FILE, result["wall_s"])
