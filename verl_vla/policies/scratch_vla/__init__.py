"""Scratch VLA: a causal language model, one or two SigLIP towers, and untrained action tokens."""

from verl_vla.policies.scratch_vla.configuration import ScratchVLAConfig
from verl_vla.policies.scratch_vla.modelling import ScratchVLAModel, register_auto_classes
from verl_vla.policies.scratch_vla.policy import ScratchVLAPolicy
from verl_vla.policies.scratch_vla.processor import ScratchVLAProcessor

__all__ = [
    "ScratchVLAConfig",
    "ScratchVLAModel",
    "ScratchVLAPolicy",
    "ScratchVLAProcessor",
    "register_auto_classes",
]

register_auto_classes()
