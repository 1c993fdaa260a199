"""Benchmark of the driver: what it does in a training step while no GPU works.

Simulators and policy are made up: in one round they answer as fast as they are asked, which shows
what the driver can do, and in another one at a given rate, which shows what it leaves for the time
after the last policy step. The rollout loop, the reward, TransferQueue, dynamic sampling, the
advantage and the cut into mini-batches are real.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from verl_vla.config.compose import load_recipe
from verl_vla.core.errors import ConfigError
from verl_vla.diagnostics.benchmarks.measuring import Record, record, require_positive

PROGRAM = "verl_vla.trainer.grpo.driver_benchmark"
"""Module that measures in a process of its own, since only `verl_vla.trainer` may import Ray."""
OF_THE_ROUND = (
    "groups",
    "group_size",
    "policy_steps",
    "image_size",
    "num_views",
    "num_slots",
    "answers_per_s",
)
ANSWERS_PER_S = 1000
"""Nine times what 8 A100 sample: 32,768 policy steps in 4 min 55 s, by ``plan``."""
SIZES = (*OF_THE_ROUND, "num_ranks", "num_mini_batches")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark; the defaults are a round of SimpleVLA-RL's recipe."""
    add = parser.add_argument
    add("--groups", type=int, default=64, help="groups of the round")
    add("--group-size", type=int, default=8, help="episodes of a group")
    add("--policy-steps", type=int, default=64, help="policy steps of every episode")
    add("--image-size", type=int, default=224, help="height and width of a policy's image, pixels")
    add("--num-views", type=int, default=1, help="images of a policy step")
    add("--num-slots", type=int, default=256, help="episodes that run at the same time")
    add("--answers-per-s", type=int, default=ANSWERS_PER_S, help="policy steps per second")
    add("--num-ranks", type=int, default=8, help="ranks that the mini-batches are cut for")
    add("--num-mini-batches", type=int, default=4, help="optimizer steps of the training step")


def measure(options: argparse.Namespace) -> Record:
    """Play two rounds and carry their rows to the update.

    Raises:
        ConfigError: the sizes make no training step, or the process that measures failed, for
            example for want of memory.
    """
    require_positive(options, *SIZES)
    sizes = {name: getattr(options, name) for name in SIZES}
    recipe = [
        "recipe=libero",
        "suite=spatial",
        f"sampling.groups_per_step={options.groups}",
        f"sampling.group_size={options.group_size}",
        f"optimizer.num_mini_batches={options.num_mini_batches}",
        f"cluster.ranks_per_node={options.num_ranks}",
    ]
    # refused here rather than by the process, which first starts Ray
    load_recipe(recipe)
    played = {name: sizes[name] for name in OF_THE_ROUND} | {"recipe": recipe}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        done = subprocess.run(
            [sys.executable, "-m", PROGRAM, json.dumps(played), str(file)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ConfigError(
                f"the process that measures ended with {done.returncode}; its last output:\n"
                f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        found: dict[str, float] = json.loads(file.read_text())
    return record("driver", options, sizes | found)
