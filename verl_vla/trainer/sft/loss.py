"""The loss of fine-tuning, with the demonstrated bins spread over their neighbours."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from verl_vla.policies.action_codec import ActionCodec


def soft_targets(action_tokens: Tensor, codec: ActionCodec, smoothing: float) -> Tensor:
    """Spread each bin of a value that moves over its neighbours.

    Args:
        action_tokens: [n, T] int64.
        codec: says which values move; the gripper and still values keep their one bin.
        smoothing: standard deviation, bins; above 0.

    Returns:
        [n, T, C] float32 probabilities.
    """
    hard = functional.one_hot(action_tokens, codec.num_bins).float()
    classes = torch.arange(codec.num_bins, device=action_tokens.device)
    distance = (classes - action_tokens[..., None]).float()
    # a Gaussian around the demonstrated bin, normalised over the bins that exist
    soft = torch.softmax(-(distance**2) / (2 * smoothing**2), dim=-1)
    statistics = codec.statistics
    moves = torch.from_numpy(statistics.mask & (statistics.q01 < statistics.q99))
    return torch.where(
        moves.repeat(codec.chunk_length)[:, None].to(action_tokens.device), soft, hard
    )


def smoothed_nll(nll: Tensor, logits: Tensor, action_tokens: Tensor, targets: Tensor) -> Tensor:
    """Turn the loss of the demonstrated bins into that of ``targets``.

    A token's cross-entropy is ``logsumexp(all logits) - targets . logits``. Only the second term
    depends on the targets, so the loss over the complete vocabulary need not be computed again.

    Args:
        nll: [n, N] of `ActionLogits`, with T action tokens first.
        logits: [n, T, C].
        action_tokens: [n, T], the demonstrated bins.
        targets: [n, T, C] probabilities.

    Returns:
        [n, N] nats; what follows the action tokens, such as a stop token, is as in ``nll``.
    """
    demonstrated = logits.gather(-1, action_tokens[..., None]).squeeze(-1)
    change = demonstrated - (targets * logits).sum(-1)
    return torch.cat([nll[:, : logits.shape[1]] + change, nll[:, logits.shape[1] :]], dim=1)
