"""The extras of pyproject.toml, by name."""

from __future__ import annotations

EXTRAS = ("gpu", "qlora", "deepspeed", "tracking", "vllm", "dev")
