"""Benchmark of an episode with and without a video for a reward, in one process.

Every setting plays the same steps of the same start, and they take turns. Resets are not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from verl_vla.config.choices import SUITES
from verl_vla.diagnostics.benchmarks.env import moves_of_chunks
from verl_vla.diagnostics.benchmarks.measuring import (
    Record,
    Seconds,
    ratio,
    record,
    require_positive,
    require_scene,
    spread,
    take_turns,
    timed,
)
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.env import LiberoEnv
from verl_vla.envs.libero.suite import make_libero_env

NO_VIDEO = 0
"""Value of `EnvConfig.video_every` that makes no video."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add = parser.add_argument
    add("--suite", choices=SUITES, default="libero_spatial")
    add("--task", type=int, default=0, help="task id within the suite")
    add("--every", type=int, nargs="+", default=[4, 1], help="steps between two frames, each tried")
    add("--steps", type=int, help="steps of an episode; the published limit if not given")
    add("--render-size", type=int, default=256, help="height and width of an image, pixels")
    add("--image-size", type=int, default=224, help="height and width that our policy sees")
    add("--rounds", type=int, default=3, help="episodes of each setting that are measured")


def measure(options: argparse.Namespace) -> Record:
    """Time an episode without a video, which renders one image a chunk, and with each rate."""
    require_positive(options, "every", "render_size", "image_size", "rounds")
    chosen = require_scene(options.suite, options.task)
    steps = chosen.step_limit(options.steps or "published", options.task)
    config = EnvConfig(
        suite=options.suite,
        step_limit=steps,
        render_size=options.render_size,
        image_size=options.image_size,
    )
    # one simulator: another for each setting would take 2 GB of LIBERO's
    with closing(make_libero_env(config)) as env:
        ways = {
            _name(every): partial(_episode, env, options.task, every)
            for every in (NO_VIDEO, *options.every)
        }
        taken = take_turns(ways, rounds=options.rounds, warm_up=1)
    results: dict[str, Any] = {
        "suite": options.suite,
        "task": options.task,
        "steps": steps,
        "render_size": options.render_size,
        "rounds": options.rounds,
    }
    return record("video", options, results | compare(taken))


def compare(taken: Mapping[str, list[Seconds]]) -> dict[str, Any]:
    """Return the seconds of an episode of each setting, and how many times those without video."""
    without = taken[_name(NO_VIDEO)]
    results: dict[str, Any] = {}
    for name, seconds in taken.items():
        results[f"episode_{name}_processor_s"] = spread([s.processor for s in seconds], 2)
        results[f"episode_{name}_clock_s"] = spread([s.clock for s in seconds], 2)
        if seconds is not without:
            pairs = [s.processor for s in seconds], [s.processor for s in without]
            results[f"{name}_times_slower"] = ratio(*pairs)
    return results


def _name(every: int) -> str:
    return f"video_every_{every}" if every != NO_VIDEO else "no_video"


def _episode(env: LiberoEnv, task: int, every: int) -> Seconds:
    """Play one episode that is not solved; time all but its reset."""
    # only what is rendered depends on it
    env.config = replace(env.config, video_every=every)
    env.reset(task, 0)
    chunks = moves_of_chunks()

    def play() -> None:
        while env.step_chunk(next(chunks)).outcome is None:
            pass

    return timed(play)
