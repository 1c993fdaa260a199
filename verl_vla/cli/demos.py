"""Record demonstrations of scripted experts, in LIBERO's layout.

An ``--out`` that ends in .hdf5 is a file of one task. Any other is a folder of such files, one per
task; those that are there already are kept, so that the same command resumes a recording.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from verl_vla.core.errors import ConfigError
from verl_vla.core.files import writing_to
from verl_vla.core.text import format_seconds
from verl_vla.datasets.demo_file import check_recording
from verl_vla.datasets.expert_episode import RecordingConfig
from verl_vla.datasets.libero_writer import LiberoEpisode, file_name, write_libero_file
from verl_vla.datasets.record import record
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.experts.choice import check_experts
from verl_vla.envs.libero.suite import LiberoSuite, libero_suite
from verl_vla.rl.setup import task_ids
from verl_vla.runs.terminal import bar

logger = logging.getLogger(__name__)

ONE_TASK = ".hdf5"
MAX_SIMULATORS = 2
"""Simulators kept per process. Recording is task by task; only a replacement of a failed attempt
needs an earlier task."""
REPORTS = 20
"""Approximate number of progress lines."""


def run(options: argparse.Namespace) -> int:
    """Record with progress lines, and write the file or files."""
    chosen = libero_suite(options.suite)
    check_experts(chosen.name)
    tasks = task_ids(chosen, options.tasks)
    if options.episodes_per_task < 1 or options.num_workers < 1:
        raise ConfigError("--episodes-per-task and --num-workers must be at least 1")
    config = RecordingConfig(
        noise=options.noise, every=options.every, height_error_m=options.height_error
    )
    out = Path(options.out)
    if out.suffix == ONE_TASK and len(tasks) > 1:
        raise ConfigError(
            f"--out is {out}, one file, for {len(tasks)} tasks, of which each has a file of its "
            "own; name a folder, or choose one with --tasks"
        )
    chosen.require_simulator()
    files = {
        task: out if out.suffix == ONE_TASK else out / file_name(chosen.task(task).name)
        for task in tasks
    }
    _record(files, chosen, config, options)
    logger.info("written to %s", out)
    return 0


def _record(
    files: dict[int, Path],
    chosen: LiberoSuite,
    config: RecordingConfig,
    options: argparse.Namespace,
) -> None:
    env = EnvConfig(
        suite=chosen.name,
        render_size=options.render_size,
        cameras=tuple(options.cameras),
        max_simulators=MAX_SIMULATORS,
    )
    recording = asdict(config) | {
        "seed": options.seed,
        "episodes": options.episodes_per_task,
        "render_size": options.render_size,
        "cameras": list(options.cameras),
    }
    kept = [task for task, path in files.items() if path.exists()]
    for task in kept:
        check_recording(files[task], recording)
    if kept:
        logger.info("recorded already: %d of %d files", len(kept), len(files))
    tasks = [task for task in files if task not in kept]
    for path in files.values():
        with writing_to(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
    episodes = record(
        env,
        tasks,
        episodes=options.episodes_per_task,
        config=config,
        seed=options.seed,
        workers=options.num_workers,
    )
    shown = _show(episodes, chosen, options.episodes_per_task * len(tasks))
    # episodes come task by task, so a file is complete before the next one begins
    for task_id, of_task in groupby(shown, key=lambda episode: episode.task_id):
        write_libero_file(files[task_id], of_task, recording)


def _show(
    episodes: Iterator[LiberoEpisode], chosen: LiberoSuite, total: int
) -> Iterator[LiberoEpisode]:
    began = time.perf_counter()
    task, steps = None, list[int]()
    with bar("demonstrations", total) as advance:
        for done, episode in enumerate(episodes, 1):
            # steps are compared within a task; other tasks have other lengths
            if episode.task_id != task:
                task, steps = episode.task_id, []
            steps.append(episode.num_steps)
            if advance is not None:
                advance(f"task {task}: {min(steps)} to {max(steps)} steps")
            elif done % max(1, total // REPORTS) == 0 or done == total:
                spent = time.perf_counter() - began
                logger.info(
                    "%4d/%d  %s: %d to %d steps  %s  left %s",
                    done,
                    total,
                    chosen.task(episode.task_id).instruction,
                    min(steps),
                    max(steps),
                    format_seconds(spent),
                    format_seconds(spent / done * (total - done)),
                )
            yield episode
