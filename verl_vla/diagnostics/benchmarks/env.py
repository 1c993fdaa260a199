"""Benchmark of one simulator against LIBERO's stock environment, each in a separate process.

robosuite does not select its GL context before it renders or frees one, so it must not share a
process with another renderer.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from verl_vla.config.choices import SUITES
from verl_vla.core.errors import ConfigError
from verl_vla.core.signals import end_with_parent
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
from verl_vla.envs.libero.assets import asset_folder
from verl_vla.envs.libero.env import SETTLE_ACTION
from verl_vla.envs.libero.suite import make_libero_env

CHUNK = 8
"""Steps of a chunk in the published OpenVLA-OFT policies for LIBERO."""
NO_LIMIT = 1_000_000
"""Step limit that is never reached, since episodes of a benchmark must not end."""

Work = Mapping[str, Callable[[], object]]
"""Functions to time, by name."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add = parser.add_argument
    add("--suite", choices=SUITES, default="libero_spatial")
    add("--task", type=int, default=0, help="task id within the suite")
    add("--render-size", type=int, default=256, help="height and width of an image, pixels")
    add("--image-size", type=int, default=224, help="height and width that our policy sees")
    add("--pairs", type=int, default=10, help="chunks of each method; the methods alternate")
    add("--resets", type=int, default=5, help="resets of each method; the methods alternate")


def measure(options: argparse.Namespace) -> Record:
    """Time a chunk and a reset.

    Other projects: 8 steps of `OffScreenRenderEnv` with its two cameras, each rendered at every
    step, without preprocessing for a policy; and a reset that rebuilds the model, sets the init
    state and settles for 10 steps, whose images it cannot skip. Ours: `LiberoEnv.step_chunk`, with
    one view at the end, preprocessed for the policy; and `LiberoEnv.reset`, with a bitwise equal
    state, in two parts: the settled state, and the first image.
    """
    require_positive(options, "pairs", "resets", "render_size", "image_size")
    require_scene(options.suite, options.task)
    with _way(_stock, options) as stock, _way(_ours, options) as ours:
        # both alternate, so that a change of the machine's load meets both
        chunk = {"peer": partial(_ask, stock, "chunk"), "ours": partial(_ask, ours, "chunk")}
        chunks = take_turns(chunk, rounds=options.pairs, warm_up=2)
        reset = {"peer": partial(_ask, stock, "reset")}
        reset |= {part: partial(_ask, ours, part) for part in ("settle", "look")}
        resets = take_turns(reset, rounds=options.resets, warm_up=1)
    results: dict[str, Any] = {
        "suite": options.suite,
        "task": options.task,
        "render_size": options.render_size,
        "pairs": options.pairs,
        "resets": options.resets,
        **_compared("chunk", chunks["peer"], chunks["ours"]),
        **compare_resets(resets),
    }
    return record("env", options, results)


def compare_resets(taken: Mapping[str, list[Seconds]]) -> dict[str, Any]:
    """Compare the other reset with ours: to a settled state, and with the first image."""
    parts = zip(taken["settle"], taken["look"], strict=True)
    whole = [Seconds(a.clock + b.clock, a.processor + b.processor) for a, b in parts]
    return {
        **_compared("reset_to_settled_state", taken["peer"], taken["settle"]),
        **_compared("reset_and_first_image", taken["peer"], whole),
    }


def _compared(name: str, peer: list[Seconds], ours: list[Seconds]) -> dict[str, Any]:
    return {
        f"{name}_peer_processor_ms": spread([1000 * s.processor for s in peer], 1),
        f"{name}_ours_processor_ms": spread([1000 * s.processor for s in ours], 1),
        f"{name}_times_faster": ratio([s.processor for s in peer], [s.processor for s in ours]),
        f"{name}_times_faster_clock": ratio([s.clock for s in peer], [s.clock for s in ours]),
    }


def _ask(connection: Connection, name: str) -> Seconds:
    try:
        connection.send(name)
        return connection.recv()
    except (EOFError, OSError) as error:
        raise ConfigError(
            f"the process that measures {name!r} ended, and has written why above; correct that"
        ) from error


@contextmanager
def _way(
    make: Callable[[argparse.Namespace], Work], options: argparse.Namespace
) -> Generator[Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(make, options, theirs))
    process.start()
    # this end belongs to the child, whose end is then seen here
    theirs.close()
    try:
        yield ours
    finally:
        # the child reads the end of the pipe, and leaves
        ours.close()
        process.join()


def _serve(
    make: Callable[[argparse.Namespace], Work], options: argparse.Namespace, connection: Connection
) -> None:
    end_with_parent()
    work = make(options)
    while True:
        try:
            name: str = connection.recv()
        except EOFError:
            return
        connection.send(timed(work[name]))


def _ours(options: argparse.Namespace) -> Work:
    env = make_libero_env(
        EnvConfig(
            suite=options.suite,
            step_limit=NO_LIMIT,
            render_size=options.render_size,
            image_size=options.image_size,
        )
    )
    env.reset(options.task, 0)
    init_state = env.suite.load_init_states(options.task)[0]
    moves = moves_of_chunks()
    return {
        "chunk": lambda: env.step_chunk(next(moves)),
        "settle": lambda: env.settle(options.task, init_state),
        "look": env.observe,
    }


def _stock(options: argparse.Namespace) -> Work:
    # for its suite and assets alone; it simulates nothing
    ours = make_libero_env(EnvConfig(suite=options.suite))
    task = ours.suite.task(options.task)
    if not ours.suite.needs_assets:
        from verl_vla.envs.mini.problem import register_mini_problem  # noqa: PLC0415 -- imports LIBERO

        register_mini_problem()
    from libero.libero.envs import OffScreenRenderEnv  # noqa: PLC0415 -- after `make_libero_env`

    init_state = ours.suite.load_init_states(options.task)[0]
    moves = moves_of_chunks()
    with asset_folder(ours.assets):
        env = OffScreenRenderEnv(
            bddl_file_name=str(task.bddl_file),
            camera_heights=options.render_size,
            camera_widths=options.render_size,
            # robosuite would end an episode at its horizon
            ignore_done=True,
        )
        env.seed(0)

    def reset() -> None:
        # a stock reset builds the model again, from files
        with asset_folder(ours.assets):
            env.reset()
        env.set_init_state(init_state)
        for _ in range(ours.config.settle_steps):
            env.step(list(SETTLE_ACTION))

    def chunk() -> None:
        for action in next(moves):
            env.step(action)

    reset()
    return {"chunk": chunk, "reset": reset}


def moves_of_chunks() -> Generator[npt.NDArray[np.float32]]:
    """Yield chunks [8, 7] of small moves that stay above the table and solve no task."""
    rng = np.random.default_rng(0)
    while True:
        moves = np.clip(rng.normal(0.0, 0.3, (CHUNK, 7)), -1.0, 1.0).astype(np.float32)
        # an open gripper, which lifts nothing
        moves[:, 6] = -1.0
        yield moves
