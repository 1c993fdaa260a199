"""OpenVLA-OFT behind the interface that rollouts and learners use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from verl_vla.policies.openvla_oft.checkpoint import read_config, refuse_regression_head
from verl_vla.policies.openvla_oft.modelling import OpenVLAOFTModel
from verl_vla.policies.openvla_oft.processor import OpenVLAOFTProcessor
from verl_vla.policies.token_policy import TokenPolicy


class OpenVLAOFTPolicy(TokenPolicy[OpenVLAOFTModel]):
    """An OpenVLA-OFT model and its processor."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        unnorm_key: str | None = None,
    ) -> OpenVLAOFTPolicy:
        """Load a checkpoint folder, without a hub and without code from the folder.

        Args:
            folder: folder of the checkpoint.
            dtype: dtype of the weights; logits are always float32.
            unnorm_key: key of the action statistics to use; see `load_statistics`.

        Raises:
            ConfigError: a file is missing or does not fit, or the checkpoint has a regression head
                instead of action tokens.
        """
        # first: it reads names only, and the weights may be gigabytes
        refuse_regression_head(folder)
        processor = OpenVLAOFTProcessor.from_pretrained(folder, unnorm_key)
        config = read_config(folder)
        model = OpenVLAOFTModel.from_pretrained(
            str(folder), config=config, dtype=dtype, local_files_only=True
        )
        return cls(model, processor)

    def action_mass(
        self, images: Tensor, prompts: Sequence[Tensor], *, proprio: Tensor | None = None
    ) -> Tensor:
        """Return [n, T], see `OpenVLAOFTModel.action_mass`; the arguments are those of `logits`."""
        return self.model.action_mass(**self._inputs(images, prompts, proprio))
