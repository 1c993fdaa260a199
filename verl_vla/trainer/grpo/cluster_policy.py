"""The policy as a rollout sees it, when the model lives in a group of Ray workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import ray
import torch
from tensordict import TensorDict
from torch import Tensor
from verl.protocol import DataProtoFuture
from verl.utils import tensordict_utils as tu

from verl_vla.core.episode import Observation
from verl_vla.core.tables import ActionChunk
from verl_vla.policies.action_codec import ActionCodec
from verl_vla.policies.base import PolicyShape, Processor, observed_proprio


class ClusterPolicy:
    """A `verl_vla.policies.base.Policy` whose forward pass runs on every rank at once.

    Prompts are made and bins are decoded here; the ranks see token ids and raw images.
    """

    def __init__(self, workers: Any, processor: Processor, *, num_ranks: int) -> None:
        self._workers = workers
        self._processor = processor
        self._num_ranks = num_ranks

    @property
    def shape(self) -> PolicyShape:
        """Sizes of what goes in and what comes out."""
        return self._processor.shape

    def act(
        self, observations: Sequence[Observation], noise: Tensor, *, temperature: float
    ) -> ActionChunk:
        """See `verl_vla.policies.base.Policy.act`."""
        return self.request(observations, noise, temperature=temperature).collect()

    def request(
        self, observations: Sequence[Observation], noise: Tensor, *, temperature: float
    ) -> PendingRanks:
        """See `verl_vla.policies.base.AsyncPolicy.request`; the ranks serve requests in order."""
        prompts = [self._processor.prompt(o.instruction) for o in observations]
        images = torch.from_numpy(np.stack([o.image for o in observations]))
        # veRL hands every rank the same number of rows, and refuses what does not divide
        rows = padded_rows(len(observations), self._num_ranks)
        input_ids, attention_mask = self._processor.collate([prompts[row] for row in rows])
        request = tu.get_tensordict(
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "images": images[rows],
                "proprio": observed_proprio(observations)[rows],
                "noise": noise[rows],
            },
            non_tensor_dict={"temperature": temperature},
        )
        answer: DataProtoFuture = self._workers.sample_actions(request)
        return PendingRanks(answer, prompts, self._processor.codec)


class PendingRanks:
    """Chunks that the ranks sample; see `verl_vla.policies.base.PendingChunk`."""

    def __init__(self, answer: DataProtoFuture, prompts: list[Tensor], codec: ActionCodec) -> None:
        self._answer = answer
        self._prompts = prompts
        self._codec = codec

    def is_ready(self, timeout_s: float) -> bool:
        """Wait at most ``timeout_s``; return True once every rank has answered."""
        ranks = self._answer.futures
        return len(ray.wait(ranks, num_returns=len(ranks), timeout=timeout_s)[0]) == len(ranks)

    def collect(self) -> ActionChunk:
        """Wait for every rank; decode bins to simulator commands."""
        # annotated as a DataProto, but it is what the ranks return
        answer = cast("TensorDict", self._answer.get())
        # without the answers to the repeated rows
        action_tokens = answer["action_tokens"][: len(self._prompts)]
        return ActionChunk(
            action_tokens=action_tokens,
            log_probs=answer["log_probs"][: len(self._prompts)],
            prompt_ids=self._prompts,
            actions=self._codec.to_simulator(action_tokens),
        )


def padded_rows(count: int, multiple: int) -> list[int]:
    """Row indices, the last one repeated until every rank gets as many as the others.

    >>> padded_rows(3, 2)
    [0, 1, 2, 2]
    """
    return [min(row, count - 1) for row in range(-(-count // multiple) * multiple)]
