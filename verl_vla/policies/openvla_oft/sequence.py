"""Positions in the sequence of OpenVLA-OFT: ends of prompts, and the tokens after them."""

from __future__ import annotations

import torch
from torch import Tensor

from verl_vla.core.errors import ContractError


def read(hidden: Tensor, first: int | Tensor, num: int) -> Tensor:
    """Select ``num`` neighbouring positions of [B, S, D], from ``first`` on."""
    if isinstance(first, int):
        return hidden[:, first : first + num]
    # [B, num]: prompts of different lengths end at different positions
    positions = first[:, None] + torch.arange(num, device=hidden.device)
    return hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def prompt_lengths(attention_mask: Tensor | None) -> Tensor | None:
    """Count the ids of every prompt, [B]; None where no prompt is padded."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    if bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise ContractError(
            "attention_mask has padding before a prompt's end; prompts are padded on the right"
        )
    return attention_mask.sum(1)


def move_padding_last(
    embeddings: Tensor, lengths: Tensor | None, num_ids: int
) -> tuple[Tensor, Tensor | None]:
    """Move the padding between a short prompt and its action slots to the end.

    Args:
        embeddings: [B, L + T + 1, D] padded prompts, action slots, stop.
        lengths: [B] number of ids of every prompt, or None where no prompt is padded.
        num_ids: L.

    Returns:
        ``embeddings`` with all padding at the end, and the mask [B, L + T] bool of all positions
        except the first, false at padding; the mask is None where there is no padding.
    """
    if lengths is None:
        return embeddings, None
    positions = torch.arange(embeddings.shape[1], device=embeddings.device)
    # from the end of a prompt to the first slot
    padding = (positions >= lengths[:, None]) & (positions < num_ids)
    # stable: words and slots keep their order, and so does the padding behind them
    order = padding.int().argsort(dim=1, stable=True)
    moved = embeddings.gather(1, order.unsqueeze(-1).expand_as(embeddings))
    return moved, ~padding.gather(1, order)[:, 1:]
