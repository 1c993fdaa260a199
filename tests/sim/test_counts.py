"""What an episode may cost, counted: seconds would depend on the machine.

These numbers may fall. One that rises is a step back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.assets import import_libero
from verl_vla.envs.libero.suite import make_libero_env

pytestmark = pytest.mark.sim

CHUNK, POLICY_STEPS = 8, 3


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the expensive parts run; they do what they always do."""
    import_libero()
    from verl_vla.envs.libero import controller, rendering, simulator  # noqa: PLC0415 -- after LIBERO

    seen: Counter[str] = Counter()

    def count(owner: Any, name: str, word: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            seen[word] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(simulator, "build_problem", "models built")
    count(rendering.Renderer, "__init__", "GL contexts")
    count(rendering.Renderer, "render", "images rendered")
    count(controller.ArmControl, "start", "control steps")
    count(controller, "read", "arm readings by Python")
    count(controller, "apply_torques", "calls of the inner loop")
    return seen


def test_an_episode_costs_what_it_shows_and_not_more(counts: Counter[str]) -> None:
    env = make_libero_env(EnvConfig(step_limit=CHUNK * POLICY_STEPS, render_size=64, image_size=56))
    still = np.zeros((CHUNK, 7), np.float32)
    settling = env.config.settle_steps
    for episode in range(1, 3):
        env.reset(0, 0)
        results = [env.step_chunk(still) for _ in range(POLICY_STEPS)]
        assert results[-1].outcome is not None
        steps = CHUNK * POLICY_STEPS + settling
        assert counts == {
            "models built": 1,
            "GL contexts": 1,
            "images rendered": episode * POLICY_STEPS,
            "control steps": episode * steps,
            "arm readings by Python": episode * (steps - 1),
            "calls of the inner loop": episode * 3 * steps,
        }
    env.close()


def test_the_inner_loop_is_compiled_once() -> None:
    """Arrays of another type or memory order would have it compiled again, which takes seconds."""
    env = make_libero_env(EnvConfig(step_limit=3 * CHUNK, render_size=64, image_size=56))
    from verl_vla.envs.libero import controller_kernels  # noqa: PLC0415 -- after LIBERO

    moves = np.random.default_rng(0).uniform(-1, 1, (CHUNK, 7)).astype(np.float32)
    for task in (0, 1):
        env.reset(task, 0)
        env.step_chunk(moves)
        env.restore(env.snapshot())
        env.step_chunk(moves)
    env.close()
    for compiled in (
        controller_kernels.command,
        controller_kernels.read,
        controller_kernels.apply_torques,
    ):
        assert len(compiled.signatures) == 1, compiled.signatures
