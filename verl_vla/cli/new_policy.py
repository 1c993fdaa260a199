"""Assemble a scratch VLA."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from verl_vla.core.errors import ConfigError
from verl_vla.datasets.action_targets import measure_statistics
from verl_vla.datasets.libero_reader import read_actions
from verl_vla.policies.base import DTYPES
from verl_vla.policies.scratch_vla.assembly import assemble

logger = logging.getLogger(__name__)

LORA_RANK = 32
"""Default rank of the adapters: openvla-oft, ``vla-scripts/finetune.py``."""


def run(options: argparse.Namespace) -> int:
    """Assemble the policy, print its size, and write a checkpoint folder."""
    # before models are loaded; a folder of the user's is never overwritten
    if Path(options.out).exists():
        raise ConfigError(f"--out is {options.out}, which is there already; name a new folder")
    demos = Path(options.demos)
    statistics = measure_statistics(read_actions(demos), key=demos.name)
    policy = assemble(
        options.language,
        options.vision,
        statistics,
        dtype=DTYPES[options.dtype],
        seed=options.seed,
        decoding=options.decoding,
        action_rows=options.action_rows,
        lora_rank=options.lora_rank,
        num_views=options.num_views,
        chunk_length=options.chunk_length,
        action_dim=len(statistics.mask),
    )
    policy.save_pretrained(options.out)
    weights = list(policy.model.parameters())
    logger.info(
        "%.2f M parameters, %.2f M of them trained; action ids from %d on; written to %s",
        sum(weight.numel() for weight in weights) / 1e6,
        sum(weight.numel() for weight in weights if weight.requires_grad) / 1e6,
        policy.model.config.first_action_id,
        options.out,
    )
    return 0
