"""``demos --out PLACE ...``: record demonstrations of scripted experts.

A PLACE that ends in .npz is one file as `sft --demos` reads it; one in .hdf5 is one task in
LIBERO's own layout, and any other is a folder of such files, one a task.
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
from verl_vla.envs.experts.choice import SUITES_WITH_EXPERTS, check_experts
from verl_vla.envs.libero.suite import LiberoSuite, libero_suite
from verl_vla.envs.libero.task import CAMERAS
from verl_vla.rl.setup import task_ids

logger = logging.getLogger(__name__)

ARCHIVE, ONE_TASK = ".npz", ".hdf5"
ARCHIVE_ONLY = ("noise", "every", "height_error", "image_size")
"""Options of images that a policy sees between disturbances; LIBERO's layout has neither."""
IMAGE_SIZE = 112
MAX_SIMULATORS = 2
"""Recording goes task by task; only what replaces a failed attempt reaches back to another."""
REPORTS = 20
"""Lines of progress, about."""


def run(arguments: Sequence[str]) -> int:
    """Record, say how it goes, and write the file or files."""
    options = _parser().parse_args(arguments)
    chosen = libero_suite(options.suite)
    check_experts(chosen.name)
    tasks = task_ids(chosen, options.tasks)
    if options.episodes < 1 or options.workers < 1:
        raise ConfigError("--episodes and --workers must be at least 1")
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
    out.parent.mkdir(parents=True, exist_ok=True)
    demonstrations = record(
        env,
        tasks,
        episodes=options.episodes,
        config=config,
        seed=options.seed,
        workers=options.workers,
    )
    shown = _show(demonstrations, chosen, options.episodes * len(tasks))
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
            "own; name a folder, or choose one with --task"
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
        env, tasks, episodes=options.episodes, seed=options.seed, workers=options.workers
    )
    shown = _show(episodes, chosen, options.episodes * len(tasks))
    for task_id, of_task in groupby(shown, key=lambda episode: episode.task_id):
        name = out.name if out.suffix == ONE_TASK else file_name(chosen.task(task_id).name)
        write_libero_file(folder / name, of_task)


def _parser() -> argparse.ArgumentParser:
    config = RecordingConfig()
    parser = argparse.ArgumentParser(prog="python -m verl_vla demos", description=__doc__)
    add = parser.add_argument
    add("--suite", default="mini", help=", ".join(SUITES_WITH_EXPERTS))
    add("--tasks", "--task", type=int, nargs="+", help="task ids; all if not given")
    add("--episodes", type=int, default=60, help="solved episodes per task")
    add("--render-size", type=int, default=128, help="camera image, pixels")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=2, help="simulator processes")
    add("--out", required=True, help="file to write, .npz or .hdf5, or a folder")
    add = parser.add_argument_group(f"{ARCHIVE} files only").add_argument
    add("--noise", type=float, help=f"of the executed translations; {config.noise}")
    add("--every", type=int, help=f"steps between images; {config.every}")
    add(
        "--height-error",
        type=float,
        help="largest error of a biased expert, who takes objects to lie higher, metres; "
        f"{config.height_error_m}",
    )
    add("--image-size", type=int, help=f"what the policy sees, pixels; {IMAGE_SIZE}")
    return parser


Recorded = TypeVar("Recorded", Demonstration, LiberoEpisode)


def _show(episodes: Iterator[Recorded], chosen: LiberoSuite, total: int) -> Iterator[Recorded]:
    began = time.perf_counter()
    task, steps = None, list[int]()
    for done, episode in enumerate(episodes, 1):
        if episode.task_id != task:
            task, steps = episode.task_id, []
        steps.append(episode.num_steps)
        if done % max(1, total // REPORTS) == 0 or done == total:
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
