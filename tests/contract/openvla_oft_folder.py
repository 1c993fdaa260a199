"""The smallest folder of an OpenVLA-OFT policy, untrained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from verl_vla.policies.normalization import ActionStatistics
from verl_vla.policies.openvla_oft.tiny import TinySizes, build_tiny_policy

SIZES = TinySizes(image_size=28, vision_width=12, llm_width=16, llm_depth=1, llm_mlp=16)
KEY = "mini"


def save_tiny_policy(folder: Path, instructions: Sequence[str] = ("lift it",)) -> Path:
    """Save a policy whose statistics map -1 to 1 onto themselves."""
    statistics = ActionStatistics(
        q01=-np.ones(7), q99=np.ones(7), mask=np.array([True] * 6 + [False]), key=KEY
    )
    build_tiny_policy(instructions, statistics, sizes=SIZES).save_pretrained(folder)
    return folder
