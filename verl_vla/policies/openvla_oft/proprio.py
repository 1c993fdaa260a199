"""Projection of proprio into one token after the image patches.

Source: openvla-oft, ``prismatic/models/projectors.py`` and `_process_proprio_features`; the names
of the weights are those of SimpleVLA-RL's ``openvla_oft/modeling_prismatic.py``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from verl_vla.core.errors import ContractError
from verl_vla.policies.openvla_oft.configuration import OpenVLAOFTConfig


class ProprioProjector(nn.Module):
    """Projection of proprio to the language model's width."""

    def __init__(self, config: OpenVLAOFTConfig) -> None:
        super().__init__()
        width = config.language.hidden_size
        self.fc1 = nn.Linear(config.proprio_dim, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, proprio: Tensor | None) -> Tensor:
        """Map [B, P], normalised, to one token [B, 1, D].

        Raises:
            ContractError: ``proprio`` is None.
        """
        if proprio is None:
            raise ContractError("the policy reads proprio, but none was given with the images")
        return self.fc2(functional.gelu(self.fc1(proprio)))[:, None]
