"""OpenVLA-OFT with discrete action tokens: the published checkpoints on stock transformers."""

from verl_vla.policies.openvla_oft.checkpoint import register_auto_classes
from verl_vla.policies.openvla_oft.configuration import OpenVLAOFTConfig, VisionTower
from verl_vla.policies.openvla_oft.modelling import OpenVLAOFTModel
from verl_vla.policies.openvla_oft.policy import OpenVLAOFTPolicy
from verl_vla.policies.openvla_oft.processor import OpenVLAOFTProcessor

__all__ = [
    "OpenVLAOFTConfig",
    "OpenVLAOFTModel",
    "OpenVLAOFTPolicy",
    "OpenVLAOFTProcessor",
    "VisionTower",
    "register_auto_classes",
]

register_auto_classes()
