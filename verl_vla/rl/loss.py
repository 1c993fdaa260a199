"""The clipped policy-gradient loss over action tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verl_vla.config.grpo import ClipRange


@dataclass(frozen=True, slots=True, kw_only=True)
class LossParts:
    """The loss of one micro-batch, and sums over its executed tokens.

    Sums and counts, not means: they add up exactly over micro-batches and ranks.
    """

    loss: Tensor
    """Scalar; carries the gradient."""
    num_tokens: Tensor
    """Executed tokens."""
    num_clipped_low: Tensor
    """Executed tokens whose gradient the lower bound stopped."""
    num_clipped_high: Tensor
    """Executed tokens whose gradient the upper bound stopped."""
    ratio_sum: Tensor
    """Sum of the probability ratios of executed tokens."""
    ratio_deviation: Tensor
    """Largest distance of one of these ratios from 1."""


def executed_mask(executed: Tensor, *, chunk_length: int, action_dim: int) -> Tensor:
    """Return [N, T] bool, true for tokens of actions that the simulator executed.

    An episode that succeeds inside a chunk never runs the rest of it; those tokens had no
    effect and must carry no gradient.

    >>> executed_mask(torch.tensor([1, 2]), chunk_length=2, action_dim=2).int()
    tensor([[1, 1, 0, 0],
            [1, 1, 1, 1]], dtype=torch.int32)
    """
    ran = torch.arange(chunk_length, device=executed.device) < executed[:, None]
    # [N, K] -> [N, K * A]: the tokens of a chunk are time-major
    return ran.repeat_interleave(action_dim, dim=1)


def trajectory_weight(
    executed_steps: Tensor, *, action_dim: int, num_trajectories: Tensor | int
) -> Tensor:
    """Return [N] float32, the weight in the loss of each token of a policy step.

    The loss is the token mean inside a trajectory, then the mean over trajectories, so a long
    failure counts as much as a short success. With one weight per token the sum over any split
    into micro-batches gives the same number.

    Args:
        executed_steps: [N], steps of the complete trajectory that each policy step belongs to.
        action_dim: A, tokens per step.
        num_trajectories: trajectories of the optimizer step that learns from a policy step, [N],
            or one number for all.
    """
    return 1.0 / (executed_steps.float() * action_dim * num_trajectories)


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantage: Tensor,
    mask: Tensor,
    weight: Tensor,
    clip: ClipRange,
) -> LossParts:
    """Sum the clipped token losses, each times the weight of its row (PPO, arXiv:1707.06347, 7).

    Args:
        log_probs: [N, T] nats, current policy, carries the gradient.
        old_log_probs: [N, T] nats, the policy that acted.
        advantage: [N], one value per policy step.
        mask: [N, T] bool, from `executed_mask`.
        weight: [N], from `trajectory_weight`.
        clip: bounds on the ratio; there is no second bound for negative advantages (dual clip).
    """
    # masked before exp(): a token that never ran could make it infinite, and inf * 0 is NaN
    log_ratio = torch.where(mask, log_probs - old_log_probs, torch.zeros_like(log_probs))
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - clip.low, 1 + clip.high)
    # [N] -> [N, 1]: every token of a policy step has the advantage of its episode
    gain = advantage[:, None]
    token_loss = -torch.minimum(ratio * gain, bounded * gain)
    loss = (token_loss * mask * weight[:, None]).sum()
    with torch.no_grad():
        # only under these signs is the minimum the clipped side, which has no gradient
        stopped_low = (ratio < 1 - clip.low) & (gain < 0) & mask
        stopped_high = (ratio > 1 + clip.high) & (gain > 0) & mask
        return LossParts(
            loss=loss,
            num_tokens=mask.sum(),
            num_clipped_low=stopped_low.sum(),
            num_clipped_high=stopped_high.sum(),
            ratio_sum=(ratio * mask).sum(),
            # no mask: a token that never ran has the ratio 1 here
            ratio_deviation=(ratio - 1).abs().max(),
        )


def divergence(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Estimate KL(current || reference policy) at each position from its sampled action token.

    ``r - 1 - log r`` with ``r`` the reference policy's probability over the current one's: unbiased
    if the tokens were sampled by the current policy, never negative, and of low variance (GRPO,
    arXiv:2402.03300, equation 4; "k3" in Schulman, "Approximating KL divergence", 2020).

    Args:
        log_probs: [N, T] nats, current policy, carries the gradient.
        ref_log_probs: [N, T] nats, reference policy, at the same temperature.
        mask: [N, T] bool, from `executed_mask`.

    Returns:
        [N, T] nats, 0 where nothing was executed.
    """
    # masked before expm1(), as in `policy_loss`
    log_ratio = torch.where(mask, ref_log_probs - log_probs, torch.zeros_like(log_probs))
    # expm1() keeps the digits that exp() - 1 loses near 0, where both policies are still alike
    return log_ratio.expm1() - log_ratio
