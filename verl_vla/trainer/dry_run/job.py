"""What one dry run is asked for, and the process that does it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from verl_vla.config.grpo import Recipe
from verl_vla.config.schema import parse
from verl_vla.core.allocator import allocator_variables
from verl_vla.core.errors import ConfigError
from verl_vla.envs.base import Suite
from verl_vla.policies.normalization import ActionStatistics, NormalizationStats
from verl_vla.policies.openvla_oft import (
    OpenVLAOFTConfig,
    OpenVLAOFTModel,
    OpenVLAOFTProcessor,
)
from verl_vla.policies.openvla_oft.tiny import build_tokenizer
from verl_vla.policies.preprocessing import OPENVLA_IMAGE_STATISTICS
from verl_vla.trainer.dry_run.phases import Replay
from verl_vla.trainer.dry_run.shim import build_shim

PROGRAM = "verl_vla.trainer.dry_run.replay"
NOT_REPLAYED = ("deepspeed_cpu_adam",)
"""Optimizers that cannot run on tensors without data: it compiles its kernel at first use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One rank of a recipe, and the sizes of its batches."""

    recipe: Recipe
    policy_folder: Path
    """Folder of a checkpoint; its weights are not read and may be missing."""
    rollout_rows: int
    """Policy steps in a batch of the rollout."""
    micro_batches: Sequence[int]
    """Rows of every micro-batch of an optimizer step."""
    prompt_tokens: int
    """Length of the longest prompt of a batch."""

    def write(self, file: Path) -> None:
        """Write it to a file."""
        values: dict[str, Any] = {
            "recipe": self.recipe.as_dict(),
            "policy_folder": str(self.policy_folder),
            "rollout_rows": self.rollout_rows,
            "micro_batches": list(self.micro_batches),
            "prompt_tokens": self.prompt_tokens,
        }
        file.write_text(json.dumps(values))

    @classmethod
    def read(cls, file: Path) -> Job:
        """Read what `write` wrote."""
        values = json.loads(file.read_text())
        return cls(
            recipe=parse(Recipe, values.pop("recipe")),
            policy_folder=Path(values.pop("policy_folder")),
            **values,
        )


def replay(job: Job, device_bytes: int) -> Replay:
    """Run one rank of the job in a process of its own, with the allocator's settings of training.

    Args:
        job: what to run.
        device_bytes: bytes of the device that PyTorch's allocator can have.

    Raises:
        ConfigError: the dry run cannot be built here, or cannot run this recipe.
    """
    if job.recipe.optimizer.name in NOT_REPLAYED:
        raise ConfigError(
            f"optimizer.name is {job.recipe.optimizer.name}, which a dry run cannot execute; "
            "leave out --replay, or choose another optimizer"
        )
    library = build_shim()
    with TemporaryDirectory(prefix="verl_vla_dry_run_") as name:
        folder = Path(name)
        job.write(folder / "job.json")
        done = subprocess.run(
            [sys.executable, "-m", PROGRAM, str(folder / "job.json"), str(folder / "result.json")],
            env=_environment(library, device_bytes),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the dry run ended with {done.returncode}:\n{done.stderr}")
        return Replay.read(folder / "result.json")


def _environment(library: Path, device_bytes: int) -> dict[str, str]:
    return (
        dict(os.environ)
        | allocator_variables()
        | {
            "LD_PRELOAD": str(library),
            "VERL_VLA_FAKE_CUDA_BYTES": str(device_bytes),
            # veRL settles on a platform when it is imported
            "VERL_PLATFORM": "nvidia",
            "CUDA_VISIBLE_DEVICES": "0",
            # one Python thread issues everything
            "OMP_NUM_THREADS": "1",
        }
    )


def weightless_checkpoint(config: OpenVLAOFTConfig, suite: Suite, folder: Path) -> Path:
    """Write a checkpoint of a policy for ``suite`` without its weights, and return its folder."""
    shape, key = config.shape, suite.name
    # only the mask is checked against the suite; no action is ever decoded
    is_normalized = np.array([dim not in suite.gripper_dims for dim in range(shape.action_dim)])
    ones = np.ones(shape.action_dim)
    statistics = ActionStatistics(-ones, ones, is_normalized, key, config.normalization)
    ones = np.ones(shape.proprio_dim)
    proprio = NormalizationStats(-ones, ones, ones.astype(bool), key, config.normalization)
    named = deepcopy(config)
    named.architectures = [OpenVLAOFTModel.__name__]
    named.save_pretrained(folder)
    OpenVLAOFTProcessor(
        config,
        build_tokenizer([task.instruction for task in suite.tasks]),
        OPENVLA_IMAGE_STATISTICS,
        statistics,
        None,
        proprio if shape.proprio_dim else None,
    ).save_pretrained(folder)
    return folder
