"""The action tokens of a vocabulary that was not made for actions.

A language model's vocabulary is padded to a round number of rows, and training never changes the
padding: its rows are all equal. Bins on such rows could not be distinguished, so the action tokens
take the last rows that differ.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from verl_vla.core.errors import ConfigError, ContractError

PADDING_TOLERANCE = 1e-3
"""Largest difference of any value at which two rows count as equal. Qwen2.5's 292 padding rows
differ by 6e-5, its words by 1e-2 and more (measured on Qwen2.5-3B in "A VLA from scratch")."""


def find_first_action_id(rows: Tensor, num_bins: int) -> int:
    """Find the first of the last ``num_bins`` distinct rows of a vocabulary.

    Args:
        rows: [words, D], the embedding.
        num_bins: C, number of rows that are needed.

    Returns:
        The token id of bin 0; ids up to ``num_bins - 1`` above it are distinct rows too.

    Raises:
        ConfigError: there are not enough rows before the padding, or some of them are equal.
    """
    rows = rows.detach().float()
    # trailing rows like the last one are padding
    is_other = (rows - rows[-1]).abs().amax(-1) >= PADDING_TOLERANCE
    others = is_other.nonzero().flatten()
    num_words = int(others[-1]) + 1 if len(others) else 0
    if num_words == len(rows) - 1:
        num_words = len(rows)  # a last row that equals no other is a word, not padding
    first = num_words - num_bins
    if first < 0:
        raise ConfigError(
            f"the vocabulary has {num_words} rows before its padding, and {num_bins} are needed "
            "for actions; take a language model whose vocabulary is trained"
        )
    chosen = rows[first:num_words]
    # the largest difference of any value, as `PADDING_TOLERANCE` means it
    distance = torch.cdist(chosen, chosen, p=float("inf")).fill_diagonal_(torch.inf)
    if distance.min() < PADDING_TOLERANCE:
        # the index counts through the flattened [C, C] distances
        one, other = divmod(int(distance.argmin()), num_bins)
        raise ConfigError(
            f"rows {first + one} and {first + other} of the vocabulary are alike, so two actions "
            "could not be told apart; take a language model whose vocabulary is trained"
        )
    return first


class ActionTokens(nn.Module):
    """Embedding and head of the action tokens, as weights apart from the language model's."""

    def __init__(self, num_bins: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_bins, width)
        self.head = nn.Linear(width, num_bins, bias=False)


def embed_action_tokens(rows: Tensor, action_tokens: Tensor) -> Tensor:
    """Look up the embeddings of [..., t] bins in [C, D] rows.

    Raises:
        ContractError: a bin has no row; CUDA would silently read other memory.
    """
    if action_tokens.numel():
        low, high = int(action_tokens.min()), int(action_tokens.max())
        if low < 0 or high >= len(rows):
            raise ContractError(
                f"action tokens run from {low} to {high}; only 0..{len(rows) - 1} exist"
            )
    return functional.embedding(action_tokens, rows)


def score_action_tokens(rows: Tensor, hidden: Tensor) -> Tensor:
    """Compute the logits of all bins in float32, even under autocast.

    Args:
        rows: [C, D], the head.
        hidden: [..., D].

    Returns:
        [..., C] float32.
    """
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        return functional.linear(hidden.float(), rows.float())
