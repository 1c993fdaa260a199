"""What an episode may cost, counted: seconds would depend on the machine.

These numbers may fall. One that rises is a step back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from verl_vla.envs.assets import import_libero
from verl_vla.envs.libero import EnvConfig, make_env

pytestmark = pytest.mark.sim

CHUNK, DECISIONS = 8, 3


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the expensive parts run; they do what they always do."""
    import_libero()
    from verl_vla.envs import control, rendering, simulator  # noqa: PLC0415 -- after LIBERO

    seen: Counter[str] = Counter()

    def count(owner: Any, name: str, word: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            seen[word] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(simulator, "_build", "models built")
    count(rendering.Renderer, "__init__", "GL contexts")
    count(rendering.Renderer, "draw", "pictures drawn")
    count(control.ArmControl, "start", "control steps")
    count(control.ArmControl, "_read", "arm readings")
    return seen


def test_an_episode_costs_what_it_shows_and_not_more(counts: Counter[str]) -> None:
    env = make_env(EnvConfig(step_limit=CHUNK * DECISIONS, render_size=64, image_size=56))
    still = np.zeros((CHUNK, 7), np.float32)
    settling = env.config.settle_steps
    for episode in range(1, 3):
        env.reset(0, 0)
        results = [env.step_chunk(still) for _ in range(DECISIONS)]
        assert results[-1].outcome is not None
        steps = CHUNK * DECISIONS + settling
        assert counts == {
            "models built": 1,
            "GL contexts": 1,
            "pictures drawn": episode * DECISIONS,
            "control steps": episode * steps,
            "arm readings": episode * (25 * steps - 1),
        }
    env.close()
