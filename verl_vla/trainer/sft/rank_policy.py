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

from verl_vla.core.episode import Observation
from verl_vla.core.tables import ActionChunk
from verl_vla.policies.base import PolicyShape, observed_proprio
from verl_vla.trainer.engine.engine import VLAEngine
from verl_vla.trainer.grpo.cluster_policy import padded_rows


class RankPolicy:
    """A `verl_vla.policies.base.Policy` for the first rank."""

    def __init__(self, engine: VLAEngine) -> None:
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
        request = (images, prompts, noise, temperature, observed_proprio(observations))
        # wakes the other ranks in `serve`; all of them then enter the model together
        _broadcast(request)
        action_tokens, log_probs = _answer(self._engine, *request)
        return ActionChunk(
            action_tokens=action_tokens,
            log_probs=log_probs,
            prompt_ids=prompts,
            actions=processor.codec.to_simulator(action_tokens),
        )

    def dismiss(self) -> None:
        """Let the other ranks return from `serve`."""
        _broadcast(None)


def serve(engine: VLAEngine) -> None:
    """Answer the first rank's questions on another rank until it dismisses."""
    while (request := _broadcast(None)) is not None:
        _answer(engine, *request)


def _broadcast(value: Any) -> Any:
    """Return the first rank's value on every rank."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _answer(
    engine: VLAEngine,
    images: Tensor,
    prompts: Sequence[Tensor],
    noise: Tensor,
    temperature: float,
    proprio: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sample bins [n, T] and their log-probs [n, T] (zeros if greedy) for the whole batch."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # as many rows on every rank, since FSDP's forward is a collective; rank r takes r, r + n, ...
    rows = padded_rows(len(images), num_ranks)[rank::num_ranks]
    ids, mask = engine.processor.collate([prompts[row] for row in rows])
    answer = engine.sample_actions(ids, mask, images[rows], noise[rows], temperature, proprio[rows])
    parts: list[Any] = [None] * num_ranks
    torch.distributed.all_gather_object(parts, answer)
    # undoes the striding: row i of all ranks, then row i + 1
    action_tokens, log_probs = (
        torch.stack(both, dim=1).flatten(0, 1) for both in zip(*parts, strict=True)
    )
    # without the rows that only filled up the ranks
    return action_tokens[: len(images)], log_probs[: len(images)]
