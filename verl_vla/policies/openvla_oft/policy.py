"""OpenVLA-OFT behind the interface that a rollout and a learner know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from verl_vla import action_distribution
from verl_vla.errors import ConfigError
from verl_vla.policies.base import PolicyShape
from verl_vla.policies.openvla_oft.checkpoint import read_config, refuse_regression_head
from verl_vla.policies.openvla_oft.modelling import OpenVLAOFTModel
from verl_vla.policies.openvla_oft.processing import OpenVLAOFTProcessor
from verl_vla.types import ActionChunk, Observation


class OpenVLAOFTPolicy:
    """A model and its processor, which together choose action chunks and score them.

    Args:
        model: on any device, in any dtype.
        processor: of the same checkpoint.

    Raises:
        ConfigError: if the two have different sizes.
    """

    def __init__(self, model: OpenVLAOFTModel, processor: OpenVLAOFTProcessor) -> None:
        if model.config.shape != processor.shape:
            raise ConfigError(
                f"the model has {model.config.shape}, the processor {processor.shape}; take both "
                "from one checkpoint"
            )
        self.model = model
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        unnorm_key: str | None = None,
    ) -> OpenVLAOFTPolicy:
        """Load a checkpoint folder, without a hub and without code from the folder.

        Args:
            folder: of the checkpoint.
            dtype: of the weights; logits are float32 in any case.
            unnorm_key: which of its action statistics to use; see `load_statistics`.

        Raises:
            ConfigError: names the file that is missing or does not fit, or the regression head of
                a checkpoint that does not speak in action tokens.
        """
        refuse_regression_head(folder)
        processor = OpenVLAOFTProcessor.from_pretrained(folder, unnorm_key)
        config = read_config(folder)
        model = OpenVLAOFTModel.from_pretrained(
            str(folder), config=config, dtype=dtype, local_files_only=True
        )
        return cls(model, processor)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write everything that `from_pretrained` needs for equal results."""
        self.model.save_pretrained(str(folder))
        self.processor.save_pretrained(folder)

    @property
    def shape(self) -> PolicyShape:
        """Sizes of what goes in and what comes out."""
        return self.processor.shape

    @torch.no_grad()
    def act(
        self, observations: Sequence[Observation], noise: Tensor, *, temperature: float
    ) -> ActionChunk:
        """Choose one chunk for each of the n observations; see `policies.base.Policy.act`.

        A batch changes the logits by float32 rounding only, so a bin can differ from the one
        chosen alone only where ``noise`` falls that close to the border between two bins.
        """
        images = torch.from_numpy(np.stack([o.image for o in observations]))
        prompts = [self.processor.prompt(o.instruction) for o in observations]
        logits = self.logits(images, prompts)
        bins = action_distribution.sample(logits, noise, temperature)
        if temperature == 0:
            logp = torch.zeros_like(bins, dtype=torch.float32)
        else:
            logp = action_distribution.log_prob(logits, bins, temperature)
        bins = bins.cpu()
        return ActionChunk(
            bins=bins,
            logp=logp.cpu(),
            prompt_ids=prompts,
            actions=self.processor.codec.to_simulator(bins),
        )

    def log_prob(
        self, images: Tensor, prompts: Sequence[Tensor], bins: Tensor, *, temperature: float
    ) -> Tensor:
        """Score recorded bins; differentiable.

        Args:
            images: [n, V, H, W, 3] uint8.
            prompts: n tensors [L] int64.
            bins: [n, T] int64.
            temperature: the one that they were sampled at.

        Returns:
            [n, T] float32, nats, on the model's device.
        """
        logits = self.logits(images, prompts)
        return action_distribution.log_prob(logits, bins.to(logits.device), temperature)

    def logits(self, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
        """Score every bin; differentiable.

        Args:
            images: [n, V, H, W, 3] uint8.
            prompts: n tensors [L] int64.

        Returns:
            [n, T, C] float32, on the model's device.
        """
        return self.model.action_logits(*self._inputs(images, prompts))

    def action_mass(self, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
        """[n, T]: see `OpenVLAOFTModel.action_mass`; arguments as of `logits`."""
        return self.model.action_mass(*self._inputs(images, prompts))

    def _inputs(self, images: Tensor, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        device = self.model.device
        ids, mask = self.processor.collate(prompts)
        return self.processor.pixel_values(images.to(device)), ids.to(device), mask.to(device)
