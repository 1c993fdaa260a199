"""Record demonstrations of scripted experts.

An ``--out`` that ends in .npz is a file for `sft --demos`. One that ends in .hdf5 is a file of one
task in LIBERO's layout. Any other is a folder of such files, one per task.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from verl_vla.core.errors import ConfigError
from verl_vla.core.text import format_seconds
from verl_vla.datasets.demonstrations import Demonstration, write
from verl_vla.datasets.libero_writer import LiberoEpisode, file_name, write_libero_file
from verl_vla.datasets.record import RecordingConfig, record
from verl_vla.datasets.record_libero import record_episodes
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.experts.choice import check_experts
from verl_vla.envs.libero.suite import LiberoSuite, libero_suite
from verl_vla.envs.libero.task import CAMERAS
from verl_vla.rl.setup import task_ids
from verl_vla.runs.terminal import bar

logger = logging.getLogger(__name__)

ARCHIVE, ONE_TASK = ".npz", ".hdf5"
ARCHIVE_ONLY = ("noise", "every", "height_error", "image_size")
"""Options of disturbances and of preprocessed images, which LIBERO's layout does not have."""
IMAGE_SIZE = 112
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
    out = Path(options.out)
    if out.suffix == ARCHIVE:
        _record_archive(out, chosen, tasks, options)
    else:
        _record_libero_files(out, chosen, tasks, options)
    logger.info("written to %s", out)
    return 0


def _record_archive(
    out: Path, chosen: LiberoSuite, tasks: Sequence[int], options: argparse.Namespace
) -> None:
    chosen.require_simulator()
    defaults = RecordingConfig()
    config = RecordingConfig(
        noise=defaults.noise if options.noise is None else options.noise,
        every=defaults.every if options.every is None else options.every,
        height_error_m=(
            defaults.height_error_m if options.height_error is None else options.height_error
        ),
    )
    image_size = IMAGE_SIZE if options.image_size is None else options.image_size
    env = EnvConfig(suite=chosen.name, render_size=options.render_size, image_size=image_size)
    # before the recording, which takes long
    out.parent.mkdir(parents=True, exist_ok=True)
    demonstrations = record(
        env,
        tasks,
        episodes=options.episodes_per_task,
        config=config,
        seed=options.seed,
        workers=options.num_workers,
    )
    shown = _show(demonstrations, chosen, options.episodes_per_task * len(tasks))
    write(
        out,
        shown,
        suite=chosen.name,
        horizon=config.horizon,
        render_size=options.render_size,
    )


def _record_libero_files(
    out: Path, chosen: LiberoSuite, tasks: Sequence[int], options: argparse.Namespace
) -> None:
    given = [name for name in ARCHIVE_ONLY if vars(options)[name] is not None]
    if given:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} is of {ARCHIVE} files and means nothing in LIBERO's "
            f"layout; leave it out, or let --out end in {ARCHIVE}"
        )
    if out.suffix == ONE_TASK and len(tasks) > 1:
        raise ConfigError(
            f"--out is {out}, one file, for {len(tasks)} tasks, of which each has a file of its "
            "own; name a folder, or choose one with --tasks"
        )
    chosen.require_simulator()
    env = EnvConfig(
        suite=chosen.name,
        render_size=options.render_size,
        cameras=CAMERAS,
        max_simulators=MAX_SIMULATORS,
    )
    folder = out.parent if out.suffix == ONE_TASK else out
    folder.mkdir(parents=True, exist_ok=True)
    episodes = record_episodes(
        env,
        tasks,
        episodes=options.episodes_per_task,
        seed=options.seed,
        workers=options.num_workers,
    )
    shown = _show(episodes, chosen, options.episodes_per_task * len(tasks))
    # episodes come task by task, so a file is complete before the next one begins
    for task_id, of_task in groupby(shown, key=lambda episode: episode.task_id):
        name = out.name if out.suffix == ONE_TASK else file_name(chosen.task(task_id).name)
        write_libero_file(folder / name, of_task)


Recorded = TypeVar("Recorded", Demonstration, LiberoEpisode)


def _show(episodes: Iterator[Recorded], chosen: LiberoSuite, total: int) -> Iterator[Recorded]:
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
