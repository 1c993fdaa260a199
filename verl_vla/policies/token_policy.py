"""A model and its processor behind the interface that rollouts and learners use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from verl_vla.core.episode import Observation
from verl_vla.core.errors import ConfigError
from verl_vla.core.tables import ActionChunk
from verl_vla.policies import action_distribution
from verl_vla.policies.base import ActionSampler, PolicyShape, observed_proprio
from verl_vla.policies.processor import TokenProcessor

Model = TypeVar("Model", bound=PreTrainedModel)


class TokenPolicy(Generic[Model]):
    """Policy that samples and scores action tokens; see `policies.base.TrainablePolicy`.

    Args:
        model: model on any device, in any dtype.
        processor: processor of the same checkpoint.

    Raises:
        ConfigError: if the two have different sizes.
    """

    def __init__(self, model: Model, processor: TokenProcessor) -> None:
        if model.config.shape != processor.shape:
            raise ConfigError(
                f"the model has {model.config.shape}, the processor {processor.shape}; take both "
                "from one checkpoint"
            )
        self.model = model
        self.processor = processor

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder from which `from_pretrained` restores an equal policy."""
        self.model.save_pretrained(str(folder))
        self.processor.save_pretrained(folder)

    @property
    def shape(self) -> PolicyShape:
        """Sizes of the policy's inputs and outputs."""
        return self.processor.shape

    @torch.no_grad()
    def act(
        self, observations: Sequence[Observation], noise: Tensor, *, temperature: float
    ) -> ActionChunk:
        """Sample one chunk for each of the n observations; see `policies.base.Policy.act`.

        The batch changes the logits only by float32 rounding, so a bin depends on it only where
        ``noise`` is that close to the border between two bins.
        """
        images = torch.from_numpy(np.stack([o.image for o in observations]))
        prompts = [self.processor.prompt(o.instruction) for o in observations]
        proprio = observed_proprio(observations)
        sampler = ActionSampler(noise, temperature)
        output = self.model(**self._inputs(images, prompts, proprio), sampler=sampler)
        action_tokens = output.action_tokens.cpu()
        return ActionChunk(
            action_tokens=action_tokens,
            log_probs=sampler.log_prob(output.logits, output.action_tokens).cpu(),
            prompt_ids=prompts,
            actions=self.processor.codec.to_simulator(action_tokens),
        )

    def log_prob(
        self,
        images: Tensor,
        prompts: Sequence[Tensor],
        action_tokens: Tensor,
        *,
        temperature: float,
        proprio: Tensor | None = None,
    ) -> Tensor:
        """Return the log-probs of recorded bins; differentiable.

        Args:
            images: [n, V, H, W, 3] uint8.
            prompts: n tensors [L] int64.
            action_tokens: [n, T] int64.
            temperature: temperature that they were sampled at.
            proprio: [n, P] float32 as observed, for a policy that reads it.

        Returns:
            [n, T] float32, nats, on the model's device.
        """
        logits = self.logits(images, prompts, action_tokens, proprio=proprio)
        return action_distribution.log_prob(logits, action_tokens.to(logits.device), temperature)

    def logits(
        self,
        images: Tensor,
        prompts: Sequence[Tensor],
        action_tokens: Tensor | None = None,
        *,
        proprio: Tensor | None = None,
    ) -> Tensor:
        """Score every bin of every token, given the tokens before it; differentiable.

        Args:
            images: [n, V, H, W, 3] uint8.
            prompts: n tensors [L] int64.
            action_tokens: [n, T] int64; may be None where decoding is parallel.
            proprio: [n, P] float32 as observed, for a policy that reads it.

        Returns:
            [n, T, C] float32, on the model's device.
        """
        given = None if action_tokens is None else action_tokens.to(self.model.device)
        return self.model(**self._inputs(images, prompts, proprio), action_tokens=given).logits

    def _inputs(
        self, images: Tensor, prompts: Sequence[Tensor], proprio: Tensor | None
    ) -> dict[str, Tensor]:
        device = self.model.device
        ids, mask = self.processor.collate(prompts)
        seen = self.processor.model_inputs(images.to(device), proprio)
        return seen | {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
