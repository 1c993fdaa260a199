"""veRL's own configuration, read once a process: composing it takes half a second."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
from hydra import compose
from omegaconf import DictConfig

from verl_vla.trainer.grpo import verl_config


@cache
def _composed(name: str) -> DictConfig:
    return compose(name)


def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verl_config, "compose", lambda name: deepcopy(_composed(name)))
