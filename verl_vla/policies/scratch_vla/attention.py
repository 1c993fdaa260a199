"""Attention masks for a sequence of patches, prompt and action tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from verl_vla.core.errors import ContractError


def align_right(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Move padding from a prompt's end to its start; return ids and bool mask of words, [B, L]."""
    if attention_mask is None:
        return input_ids, torch.ones_like(input_ids, dtype=torch.bool)
    if bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise ContractError(
            "attention_mask has padding before a prompt's end; prompts are padded on the right"
        )
    lengths = attention_mask.sum(1, keepdim=True)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    ids = input_ids.gather(1, (positions + lengths) % input_ids.shape[1])
    return ids, positions >= input_ids.shape[1] - lengths


def pairwise_mask(
    is_token: Tensor, num_queries: int, *, causal: bool, dtype: torch.dtype
) -> Tensor:
    """Return the mask [B, 1, Q, S]: 0 where a position attends to another, else the dtype's least.

    A padding position still attends to the patches, since a row without any would become NaN.
    """
    batch, num_keys = is_token.shape
    sees = is_token[:, None, None, :].expand(batch, 1, num_queries, num_keys)
    if causal:
        positions = torch.arange(num_keys, device=is_token.device)
        sees = sees & (positions <= positions[-num_queries:, None])
    hidden = torch.zeros(sees.shape, dtype=dtype, device=is_token.device)
    return hidden.masked_fill(~sees, torch.finfo(dtype).min)
