"""``new-policy --language DIR --vision DIR --demos DIR --out DIR``: put a scratch VLA together."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from verl_vla.cli.eval_arguments import DTYPES
from verl_vla.core.errors import ConfigError
from verl_vla.datasets.action_targets import measure_statistics
from verl_vla.datasets.demonstrations import DemonstrationFile
from verl_vla.datasets.libero_reader import read_actions
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.policies.scratch_vla.assembly import assemble
from verl_vla.policies.scratch_vla.configuration import ACTION_ROWS, DECODINGS
from verl_vla.trainer.sft.fit import action_statistics

logger = logging.getLogger(__name__)

LORA_RANK = 32
"""Source: openvla-oft, ``vla-scripts/finetune.py``."""


def run(arguments: Sequence[str]) -> int:
    """Assemble, say what came out, and write a checkpoint folder."""
    options = _parser().parse_args(arguments)
    if Path(options.out).exists():
        raise ConfigError(f"--out is {options.out}, which is there already; name a new folder")
    statistics = _measure(Path(options.demos))
    policy = assemble(
        options.language,
        options.vision,
        statistics,
        dtype=DTYPES[options.dtype],
        seed=options.seed,
        decoding=options.decoding,
        action_rows=options.action_rows,
        lora_rank=options.lora_rank,
        num_views=options.views,
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


def _measure(demos: Path) -> ActionStatistics:
    """The ranges of all actions in a folder of LIBERO's files, or in an .npz of `demos`."""
    if demos.is_dir():
        return measure_statistics(read_actions(demos), key=demos.name)
    with DemonstrationFile(demos) as file:
        return action_statistics(list(file), key=file.suite)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m verl_vla new-policy", description=__doc__)
    add = parser.add_argument
    add("--language", required=True, help="folder of a causal language model")
    add("--vision", required=True, nargs="+", help="folders of one or two SigLIP models")
    add("--demos", required=True, help="what `demos` wrote, or LIBERO's folder: gives the ranges")
    add("--decoding", choices=DECODINGS, default=DECODINGS[0])
    add("--action-rows", choices=ACTION_ROWS, default=ACTION_ROWS[0])
    add("--lora-rank", type=int, default=LORA_RANK, help="0 trains the language model itself")
    add("--views", type=int, default=1, help="cameras, 1 or 2")
    add("--chunk-length", type=int, default=8, help="actions of one policy step")
    add("--dtype", choices=sorted(DTYPES), default="bfloat16")
    add("--seed", type=int, default=0, help="of projector and adapters")
    add("--out", required=True, help="checkpoint folder to write")
    return parser
