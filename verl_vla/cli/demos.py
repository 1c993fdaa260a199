"""``demos --out FILE ...``: record scripted demonstrations of the mini suite."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from verl_vla.build import task_ids
from verl_vla.demonstrations import Demonstration, write
from verl_vla.envs.libero import EnvConfig
from verl_vla.envs.suites import suite
from verl_vla.errors import ConfigError
from verl_vla.recording import RecordingConfig, record

logger = logging.getLogger(__name__)


def run(arguments: Sequence[str]) -> int:
    """Record, say how it goes, and write the file."""
    options = _parser().parse_args(arguments)
    chosen = suite(options.suite)
    if chosen.needs_assets:
        raise ConfigError(f"--suite is {chosen.name}, which has no scripted experts; take mini")
    tasks = task_ids(chosen, options.tasks)
    if options.episodes < 1 or options.workers < 1:
        raise ConfigError("--episodes and --workers must be at least 1")
    config = RecordingConfig(
        noise=options.noise, every=options.every, height_error_m=options.height_error
    )
    env = EnvConfig(
        suite=chosen.name, render_size=options.render_size, image_size=options.image_size
    )
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    demonstrations = record(
        env,
        tasks,
        episodes=options.episodes,
        config=config,
        seed=options.seed,
        workers=options.workers,
    )
    shown = _show(demonstrations, options.episodes * len(tasks))
    write(
        out,
        shown,
        suite=chosen.name,
        horizon=config.horizon,
        render_size=options.render_size,
    )
    logger.info("written to %s", out)
    return 0


def _parser() -> argparse.ArgumentParser:
    config = RecordingConfig()
    parser = argparse.ArgumentParser(prog="python -m verl_vla demos", description=__doc__)
    add = parser.add_argument
    add("--suite", default="mini", help="mini; the others have no scripted experts")
    add("--tasks", type=int, nargs="+", help="task ids; all if not given")
    add("--episodes", type=int, default=60, help="solved episodes per task")
    add("--noise", type=float, default=config.noise, help="of the executed translations")
    add("--every", type=int, default=config.every, help="steps between images")
    add(
        "--height-error",
        type=float,
        default=config.height_error_m,
        help="largest error of a careless operator, who takes objects to lie higher, metres",
    )
    add("--render-size", type=int, default=128, help="camera picture, pixels")
    add("--image-size", type=int, default=112, help="what the policy sees, pixels")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=2, help="simulator processes")
    add("--out", required=True, help="file to write, .npz")
    return parser


def _show(demonstrations: Iterator[Demonstration], total: int) -> Iterator[Demonstration]:
    began = time.perf_counter()
    task, steps = None, list[int]()
    for done, demonstration in enumerate(demonstrations, 1):
        if demonstration.task_id != task:
            task, steps = demonstration.task_id, []
        steps.append(demonstration.num_steps)
        if done % 20 == 0 or done == total:
            logger.info(
                "%4d/%d  %s: %d to %d steps  %.0f s",
                done,
                total,
                demonstration.instruction,
                min(steps),
                max(steps),
                time.perf_counter() - began,
            )
        yield demonstration
