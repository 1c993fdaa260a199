"""The reward of docs/add-a-reward.md, as written there."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add-a-reward.md"


def documented_code() -> str:
    """The reward of the page."""
    return _blocks()[0]


def documented_encoder() -> str:
    """The encoder of the page."""
    return _blocks()[1]


def _blocks() -> tuple[str, str]:
    reward, encoder = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return reward, encoder


def write_documented_reward(folder: Path) -> str:
    """Write it into ``folder``; return its name for a recipe."""
    file = folder / "brisk.py"
    file.write_text(documented_code())
    return f"{file}:BriskReward"
