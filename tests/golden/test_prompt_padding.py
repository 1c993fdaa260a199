"""Tokens that an update computes for nothing, since prompts of a micro-batch differ in length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from verl_vla.envs.registry import suite
from verl_vla.policies.checkpoint import read_tokenizer
from verl_vla.policies.preprocessing import prompt_ids

METADATA = Path(__file__).parents[2] / ".." / "shared" / "golden" / "checkpoint_metadata"
IMAGE_TOKENS, ACTION_TOKENS, STOP = 256, 56, 1
"""Positions of a row beside its prompt; one view of 224 px in patches of 14."""
MOST = 0.02
"""Largest share of padding that is not worth sorting rows for."""
MICRO_BATCHES = 4000


@pytest.mark.skipif(not METADATA.is_dir(), reason=f"the published tokenizer: no {METADATA}")
@pytest.mark.parametrize("micro_batch_size", [4, 8])
@pytest.mark.parametrize("name", ["spatial", "object", "goal", "10", "90"])
def test_prompts_of_any_tasks_of_a_suite_are_padded_by_less_than_two_percent(
    name: str, micro_batch_size: int
) -> None:
    tokenizer = read_tokenizer(METADATA)
    tasks = suite(f"libero_{name}").tasks
    lengths = np.array([len(prompt_ids(tokenizer, task.instruction)) for task in tasks])
    rows = np.random.default_rng(0).choice(lengths, (MICRO_BATCHES, micro_batch_size))
    padded = rows.max(axis=1, keepdims=True)
    computed = (padded + IMAGE_TOKENS + ACTION_TOKENS + STOP).sum() * micro_batch_size
    assert (padded - rows).sum() / computed < MOST
