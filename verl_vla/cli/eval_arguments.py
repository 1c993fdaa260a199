"""The options of ``eval``."""

from __future__ import annotations

import argparse
from typing import get_args

import torch

from verl_vla.core.errors import ConfigError
from verl_vla.envs.base import Split, StepLimit
from verl_vla.envs.libero.suite import SUITES
from verl_vla.evaluation.perturbed import ALL_BASES, PERTURBATIONS
from verl_vla.evaluation.published import PROTOCOLS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parser(description: str | None) -> argparse.ArgumentParser:
    """Everything that may stand behind ``eval``."""
    made = argparse.ArgumentParser(prog="python -m verl_vla eval", description=description)
    add = made.add_argument
    add("--policy", required=True, help="folder of a checkpoint")
    add(
        "--suite",
        required=True,
        help=f"{', '.join(SUITES)}, a perturbed one such as libero_plus, "
        f"path/to/file.py:ClassName, or {ALL_BASES} with --perturbation plus",
    )
    add(
        "--tasks",
        type=int,
        nargs="+",
        help="task ids, with --perturbation of --suite; all if not given",
    )
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
        help="held_out (default); official: all recorded starts; sampled: new ones",
    )
    add("--sampling", help="greedy (default), or a temperature")
    add("--limit", help="step limit: published (default), simplevla, or a number")
    add("--render-size", type=int, help="camera image, px; the policy's own if not given")
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
    add("--control", help="earlier eval of the unperturbed suite; evaluated too if not given")
    add("--tasks-per-axis", type=int, help="at most so many perturbed tasks of each axis")
    add("--out", required=True, help="folder to write to")
    return made


def temperature(sampling: str) -> float:
    """What ``--sampling`` means; 0 is greedy.

    Raises:
        ConfigError: it means nothing.
    """
    if sampling == "greedy":
        return 0.0
    try:
        return float(sampling)
    except ValueError as error:
        raise ConfigError(
            f"--sampling is {sampling!r}; write greedy, or a temperature such as 1.0"
        ) from error


def step_limit(limit: str) -> StepLimit:
    """What ``--limit`` means.

    Raises:
        ConfigError: it means nothing.
    """
    if limit.isdigit():
        return int(limit)
    if limit not in ("published", "simplevla"):
        raise ConfigError(f"--limit is {limit!r}; write published, simplevla, or a number of steps")
    return limit
