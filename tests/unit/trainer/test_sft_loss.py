"""The loss of fine-tuning: what is asked for where a neighbouring bin is nearly as right."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from verl_vla.policies.action_codec import ActionCodec
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.trainer.sft.loss import smoothed_nll, soft_targets

STILL, GRIPPER = 4, 6
NUM_WORDS = 10
"""Entries of the vocabulary that are no bins: words and the stop token."""


@pytest.fixture
def codec() -> ActionCodec:
    low, high = np.full(7, -1.0), np.full(7, 1.0)
    low[STILL] = high[STILL] = 0.25
    mask = np.arange(7) != GRIPPER
    statistics = ActionStatistics(q01=low, q99=high, mask=mask, key="mini")
    return ActionCodec(num_bins=256, chunk_length=2, action_dim=7, statistics=statistics)


def test_targets_spread_over_neighbouring_motions_only(codec: ActionCodec) -> None:
    action_tokens = torch.full((2, 14), 100)
    action_tokens[1, 0] = 0
    soft = soft_targets(action_tokens, codec, 4.0)
    assert torch.allclose(soft.sum(-1), torch.ones(2, 14))
    assert torch.equal(soft.argmax(-1), action_tokens)
    moving = soft[0, 0]
    assert moving[104] / moving[100] == pytest.approx(math.exp(-0.5), rel=1e-4)
    assert moving[96] == moving[104]
    for token in (STILL, GRIPPER, 7 + STILL, 7 + GRIPPER):
        assert soft[0, token].max() == 1.0


def test_little_smoothing_is_none(codec: ActionCodec) -> None:
    action_tokens = torch.full((1, 14), 100)
    assert soft_targets(action_tokens, codec, 0.01).max(-1).values.min() == 1.0


def test_the_smoothed_loss_is_the_cross_entropy_over_the_whole_vocabulary(
    codec: ActionCodec,
) -> None:
    torch.manual_seed(0)
    of_all = torch.randn(3, 15, NUM_WORDS + 256, requires_grad=True)
    action_tokens = torch.randint(0, 256, (3, 14))
    stop = torch.full((3, 1), 2)
    labels = torch.cat([action_tokens + NUM_WORDS, stop], dim=1)
    nll = functional.cross_entropy(of_all.transpose(1, 2), labels, reduction="none")
    targets = soft_targets(action_tokens, codec, 3.0)
    found = smoothed_nll(nll, of_all[:, :-1, NUM_WORDS:], action_tokens, targets)
    wide = torch.cat([torch.zeros(3, 14, NUM_WORDS), targets], dim=-1)
    wanted = functional.cross_entropy(of_all[:, :-1].transpose(1, 2), wide.mT, reduction="none")
    assert torch.allclose(found[:, :-1], wanted, atol=1e-5)
    assert torch.equal(found[:, -1], nll[:, -1]), "the stop token is demonstrated, not its like"
    gradients = [
        torch.autograd.grad(loss.sum(), of_all, retain_graph=True)[0]
        for loss in (found[:, :-1], wanted)
    ]
    assert torch.allclose(*gradients, atol=1e-6)


def test_a_model_without_a_stop_token_has_none(codec: ActionCodec) -> None:
    logits = torch.zeros(1, 14, 256)
    action_tokens = torch.full((1, 14), 7)
    nll = torch.full((1, 14), math.log(256))
    found = smoothed_nll(nll, logits, action_tokens, soft_targets(action_tokens, codec, 2.0))
    assert torch.allclose(found, nll, atol=1e-5)
