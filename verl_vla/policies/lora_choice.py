"""What a recipe can say of low-rank adapters, apart from what makes them, which imports slowly."""

from __future__ import annotations

from typing import Literal

LoraTargets = Literal["language_model", "all-linear"]
"""Where a policy gets its adapters; see `verl_vla.policies.token_model.TokenModel.add_adapters`."""

LORA_ALPHA = 16
"""Over a rank of 32. Source: openvla-oft, ``vla-scripts/finetune.py``, ``min(lora_rank, 16)``."""
