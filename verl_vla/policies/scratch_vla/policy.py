"""A scratch VLA behind the interface that rollouts and learners use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from verl_vla.policies.scratch_vla.configuration import read_config
from verl_vla.policies.scratch_vla.modelling import ScratchVLAModel
from verl_vla.policies.scratch_vla.processor import ScratchVLAProcessor
from verl_vla.policies.token_policy import TokenPolicy


class ScratchVLAPolicy(TokenPolicy[ScratchVLAModel]):
    """A scratch VLA and its processor."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        unnorm_key: str | None = None,
    ) -> ScratchVLAPolicy:
        """Load a checkpoint folder, without a hub and without code from the folder.

        Args:
            folder: folder of the checkpoint.
            dtype: dtype of the weights; logits are always float32.
            unnorm_key: key of the action statistics to use; see `load_statistics`.

        Raises:
            ConfigError: a file is missing or does not fit; names it.
        """
        processor = ScratchVLAProcessor.from_pretrained(folder, unnorm_key)
        model = ScratchVLAModel.from_pretrained(
            str(folder), config=read_config(folder), dtype=dtype, local_files_only=True
        )
        return cls(model, processor)

    def action_mass(
        self, images: Tensor, prompts: Sequence[Tensor], *, proprio: Tensor | None = None
    ) -> Tensor:
        """Return ones, [n, T], since the head has rows for action ids only."""
        return torch.ones(len(images), self.shape.num_tokens)
