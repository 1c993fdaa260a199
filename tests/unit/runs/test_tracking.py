"""Trackers that could not log are refused before a run starts."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
from verl.utils.tracking import Tracking

from verl_vla.core.errors import ConfigError
from verl_vla.runs import tracking
from verl_vla.runs.tracking import TRACKERS, WITHOUT_LOGIN, require_trackers


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)


def answer(monkeypatch: pytest.MonkeyPatch, login: Any) -> list[dict[str, Any]]:
    """Let Weights & Biases answer without its network; return what it is asked."""
    asked: list[dict[str, Any]] = []

    def ask(**options: Any) -> Any:
        asked.append(options)
        if isinstance(login, Exception):
            raise login
        return login

    real = importlib.import_module
    stub = SimpleNamespace(login=ask)
    monkeypatch.setattr(
        tracking.importlib, "import_module", lambda name: stub if name == "wandb" else real(name)
    )
    return asked


def test_the_names_are_verls() -> None:
    assert sorted(TRACKERS) == sorted(Tracking.supported_backend)


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has 'wandbb', .*did you mean 'wandb'\?"):
        require_trackers(["tensorboard", "wandbb"])


def test_a_tracker_without_its_package_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has 'trackio', .*pip install trackio"):
        require_trackers(["trackio"])


@pytest.mark.parametrize(
    ("login", "message"),
    [
        (False, "there is no key for it; run `wandb login`, .*WANDB_MODE=offline"),
        (ValueError("API key must have\n 40"), r"its login failed \(API key must have 40\); run"),
    ],
)
def test_wandb_without_a_key_is_refused_and_not_asked_for_one(
    login: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answer(monkeypatch, login)
    with pytest.raises(ConfigError, match=message):
        require_trackers(["wandb"])
    assert asked == [{"prompt": False}]


@pytest.mark.parametrize("mode", WITHOUT_LOGIN)
def test_wandb_that_sends_nothing_needs_no_key(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, login=False)
    monkeypatch.setenv("WANDB_MODE", mode)
    require_trackers(["wandb"])
    assert asked == []


def test_a_key_and_other_trackers_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, login=True)
    require_trackers(["tensorboard", "console", "file", "wandb"])
    require_trackers([])
