"""The policy as a rollout sees it, when every rank of a process group holds a part of the model.

The first rank plays; the others wait in `serve` and compute their share of each batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from verl.utils.device import get_device_id

from verl_vla.action_distribution import log_prob, sample
from verl_vla.policies.base import PolicyShape
from verl_vla.trainer.engine import OpenVLAOFTEngine
from verl_vla.types import ActionChunk, Observation


class RankPolicy:
    """A `verl_vla.policies.base.Policy` for the first rank."""

    def __init__(self, engine: OpenVLAOFTEngine) -> None:
        self._engine = engine

    @property
    def shape(self) -> PolicyShape:
        """Sizes of what goes in and what comes out."""
        return self._engine.processor.shape

    def act(
        self, observations: Sequence[Observation], noise: Tensor, *, temperature: float
    ) -> ActionChunk:
        """See `verl_vla.policies.base.Policy.act`."""
        processor = self._engine.processor
        prompts = [processor.prompt(o.instruction) for o in observations]
        images = torch.from_numpy(np.stack([o.image for o in observations]))
        request = (images, prompts, noise, temperature)
        _broadcast(request)
        bins, logp = _answer(self._engine, *request)
        return ActionChunk(
            bins=bins,
            logp=logp,
            prompt_ids=prompts,
            actions=processor.codec.to_simulator(bins),
        )

    def dismiss(self) -> None:
        """Let the other ranks return from `serve`."""
        _broadcast(None)


def serve(engine: OpenVLAOFTEngine) -> None:
    """Answer the first rank's questions on another rank until it dismisses."""
    while (request := _broadcast(None)) is not None:
        _answer(engine, *request)


def _broadcast(value: Any) -> Any:
    """What the first rank gives, on every rank."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _answer(
    engine: OpenVLAOFTEngine,
    images: Tensor,
    prompts: Sequence[Tensor],
    noise: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Choose bins [n, T] and their logp [n, T], zeros where play is greedy, for the whole batch."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = -(-len(images) // num_ranks)
    # every rank computes equally much; the last row fills what is left over
    rows = [min(row, len(images) - 1) for row in range(rank * share, (rank + 1) * share)]
    ids, mask = engine.processor.collate([prompts[row] for row in rows])
    device = get_device_id()
    with engine.eval_mode(), torch.no_grad():
        logits = engine.logits(ids.to(device), mask.to(device), images[rows].to(device))
        bins = sample(logits, noise[rows].to(device), temperature)
        logp = (
            log_prob(logits, bins, temperature)
            if temperature > 0
            else torch.zeros(bins.shape, dtype=torch.float32)
        )
    parts: list[Any] = [None] * num_ranks
    torch.distributed.all_gather_object(parts, (bins.cpu(), logp.cpu()))
    whole = [torch.cat([part[i] for part in parts])[: len(images)] for i in range(2)]
    return whole[0], whole[1]
