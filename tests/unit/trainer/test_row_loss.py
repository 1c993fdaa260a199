"""The loss of a micro-batch of veRL's rows, by numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from verl.utils import tensordict_utils as tu

from verl_vla.config.grpo import KLConfig, LossConfig
from verl_vla.trainer.grpo.worker import row_loss

ACTION_DIM = 1
OLD = torch.tensor([[-1.0, -1.0], [-2.0, -2.0]])
MOVED = torch.tensor([[0.1, 0.0], [0.0, 9.0]])
"""By how much the current policy's log_probs differs; the last token never ran."""
ADVANTAGES = torch.tensor([[1.0], [-1.0]])
TOKENS = torch.tensor([[1, 1], [1, 0]])
"""Two trajectories of one policy step each, of two steps and of one."""
KL = math.expm1(-0.1) + 0.1
"""Of the one token that moved, the reference policy being the one that acted."""


def jagged(rows: torch.Tensor) -> torch.Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def loss_of(config: LossConfig, *, num_ranks: int = 1, **more: Any):
    rows = {
        "response_mask": jagged(TOKENS),
        "advantages": jagged(ADVANTAGES),
        "old_log_probs": jagged(OLD),
        "trajectory_steps": torch.tensor([[2], [1]]),
        "num_trajectories": torch.tensor([[2], [2]]),
    }
    data = tu.get_tensordict(rows | more)
    log_probs = (OLD + MOVED).requires_grad_()
    loss, metrics = row_loss(
        log_probs=log_probs,
        entropy=torch.ones_like(OLD),
        data=data,
        config=config,
        action_dim=ACTION_DIM,
        num_ranks=num_ranks,
    )
    return loss, metrics, torch.autograd.grad(loss, log_probs)[0]


CLIPPED = (-(math.exp(0.1) + 1) / 2 + 1) / 2
"""Token mean inside a trajectory, then the mean over both."""


def test_without_a_kl_term_no_starting_policy_is_looked_for():
    loss, metrics, _ = loss_of(LossConfig())
    assert float(loss.detach()) == pytest.approx(CLIPPED)
    assert metrics["loss_sum"] == pytest.approx(CLIPPED)
    assert metrics["num_tokens"] == metrics["entropy_sum"] == 3, "of the tokens that ran"
    assert "kl_sum" not in metrics


def test_the_kl_term_has_the_weights_of_the_loss():
    config = LossConfig(kl=KLConfig(coefficient=0.5))
    loss, metrics, gradient = loss_of(config, ref_log_prob=jagged(OLD))
    assert float(loss.detach()) == pytest.approx(CLIPPED + 0.5 * KL / 4)
    assert metrics["loss_sum"] == pytest.approx(CLIPPED)
    assert metrics["kl_sum"] == pytest.approx(KL, rel=1e-5)
    pull = 0.5 * (1 - math.exp(-0.1)) / 4
    assert float(gradient[0, 0]) == pytest.approx(-math.exp(0.1) / 4 + pull, rel=1e-5)
    assert float(gradient[1, 1]) == 0


def test_gradients_are_scaled_for_the_average_over_ranks():
    config = LossConfig(kl=KLConfig(coefficient=0.5))
    one, _, _ = loss_of(config, ref_log_prob=jagged(OLD))
    two, _, _ = loss_of(config, ref_log_prob=jagged(OLD), num_ranks=2)
    assert float(two.detach()) == pytest.approx(2 * float(one.detach()))


def test_every_row_is_divided_by_the_number_of_its_own_mini_batch():
    _, _, whole = loss_of(LossConfig())
    _, _, halves = loss_of(LossConfig(), num_trajectories=torch.tensor([[1], [4]]))
    assert halves[0].tolist() == pytest.approx((2 * whole[0]).tolist())
    assert halves[1].tolist() == pytest.approx((whole[1] / 2).tolist())


def test_a_kl_term_without_its_column_is_an_error():
    with pytest.raises(KeyError, match="ref_log_prob"):
        loss_of(LossConfig(kl=KLConfig(coefficient=0.5)))


def test_a_row_is_idle_where_no_term_of_the_loss_moves_it():
    nothing = jagged(torch.zeros(2, 1))
    _, plain, _ = loss_of(LossConfig(), advantages=nothing)
    held = LossConfig(kl=KLConfig(coefficient=0.5))
    _, with_kl, _ = loss_of(held, advantages=nothing, ref_log_prob=jagged(OLD))
    _, unseen, _ = loss_of(LossConfig(), response_mask=jagged(TOKENS * torch.tensor([[1], [0]])))
    hidden = jagged(TOKENS * torch.tensor([[1], [0]]))
    _, held_unseen, _ = loss_of(held, response_mask=hidden, ref_log_prob=jagged(OLD))
    assert (plain["num_rows_idle"], with_kl["num_rows_idle"]) == (2, 0)
    assert unseen["num_rows_idle"] == held_unseen["num_rows_idle"] == 1
