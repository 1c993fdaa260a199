"""The distribution of action bins: one categorical per action token, independent given the image.

Sampling and scoring use the same logits at the same temperature, so a bin's log-probability at the
rollout is the one that the update starts from. All logits are float32 [n, T, C]; they are those of
the action ids only, as in SimpleVLA-RL (``dp_rob.py``), so nothing has to be masked with -inf. A
logit that is -inf anyway, or so low that it overflows to -inf, counts as `LEAST_LOGIT`: 0 x -inf
would make the entropy and the gradient NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verl_vla.core.errors import ConfigError

LEAST_LOGIT = -1e4
"""Lowest logit relative to the largest one, after the temperature. Its probability is 0 in float64
too (which underflows at exp(-745)), so no bin that can be sampled is changed."""


def sample(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Sample one bin per token by inverting the cumulative distribution at ``noise``.

    The arithmetic is in float64, so that a float32 rounding error cannot select a bin of
    probability zero, and row by row, so that a row's bins do not depend on its batch.

    Args:
        logits: [n, T, C] float32.
        noise: [n, T] float64 in [0, 1).
        temperature: 0 takes the most likely bin and ignores ``noise``.

    Returns:
        [n, T] int64, on the device of ``logits``.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probability = _scale(logits.detach().double(), temperature).softmax(-1)
    cumulative = probability.cumsum(-1)
    # times the last value, which is 1 up to a rounding error only
    target = noise.to(logits.device).unsqueeze(-1) * cumulative[..., -1:]
    # right=True: a noise of exactly 0 must not select a bin of probability 0 before the first other
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def log_prob(logits: Tensor, action_tokens: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities of ``action_tokens``.

    Args:
        logits: [n, T, C] float32.
        action_tokens: [n, T] int64.
        temperature: above 0.

    Returns:
        [n, T] float32, nats.
    """
    log_probs = _scale(logits, temperature).log_softmax(-1)
    return log_probs.gather(-1, action_tokens.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """Return the entropy of every token's distribution.

    Args:
        logits: [n, T, C] float32.
        temperature: above 0.

    Returns:
        [n, T] float32, nats, 0 .. log C.
    """
    log_probs = _scale(logits, temperature).log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def _scale(logits: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature; shift the largest logit to 0 and clamp at `LEAST_LOGIT`."""
    if not temperature > 0:
        raise ConfigError(
            f"temperature is {temperature}; a categorical distribution needs one above 0 "
            "(0 only chooses, greedily, and gives no probabilities)"
        )
    # shifted first: a low temperature cannot overflow then, and softmax does not notice
    scaled = (logits - logits.detach().amax(-1, keepdim=True)) / temperature
    return scaled.clamp(min=LEAST_LOGIT)
