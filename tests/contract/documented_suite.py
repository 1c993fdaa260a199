"""The suite of docs/add-an-environment.md, with the sizes of RoboTwin, and a policy for it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from verl_vla.envs.robotwin import RoboTwin
from verl_vla.policies.normalization import ActionStatistics, NormalizationStats
from verl_vla.policies.openvla_oft import OpenVLAOFTPolicy
from verl_vla.policies.openvla_oft.tiny import TinySizes, build_tiny_policy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add-an-environment.md"
JOINTS = RoboTwin.action_dim


def write_documented_suite(folder: Path) -> str:
    """Write the page's code to a file of ``folder`` and name its class as a recipe does."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (folder / "two_arms.py").write_text(code)
    return f"{folder / 'two_arms.py'}:TwoArms"


def two_armed_policy(instructions: list[str], *, chunk_length: int = 25) -> OpenVLAOFTPolicy:
    """A policy as small as one can be, with chunks and proprio of RoboTwin's."""
    span = {"q01": -np.ones(JOINTS), "q99": np.ones(JOINTS), "mask": np.ones(JOINTS, dtype=bool)}
    return build_tiny_policy(
        instructions,
        ActionStatistics(**span, key="two_arms", normalization="bounds"),
        sizes=TinySizes(
            image_size=28,
            render_size=28,
            vision_width=24,
            vision_depth=1,
            vision_heads=2,
            llm_width=32,
            llm_depth=2,
            llm_heads=2,
            llm_mlp=64,
            chunk_length=chunk_length,
            action_dim=JOINTS,
            proprio_dim=JOINTS,
        ),
        proprio_stats=NormalizationStats(**span, key="two_arms", normalization="bounds"),
    )
