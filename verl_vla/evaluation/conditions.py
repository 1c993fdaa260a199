"""What decides whether two success rates compare, written beside each of them.

Rates over other starts, step limits, images or physics are other numbers, however alike they
look. `DECIDES` are the keys that must agree before two evaluations may be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from verl_vla.core.provenance import provenance
from verl_vla.envs.base import EnvConfig, Split, Suite
from verl_vla.envs.libero.assets import describe_assets, find_assets
from verl_vla.envs.libero.gl import renderer_name
from verl_vla.envs.libero.suite import LiberoSuite
from verl_vla.envs.registry import suite

DECIDES = (
    "suite",
    "states",
    "step_limits",
    "settle_steps",
    "render_size",
    "renderer",
    "assets",
    "sampling",
    "simulation",
)
"""Two policies may see images of different sizes, sample by different seeds, compute in different
types and come from different commits; those are told, and do not forbid a comparison."""


def played_in(env: EnvConfig, task_names: Mapping[int, str]) -> dict[str, Any]:
    """What an episode needs to be played again, as JSON.

    Args:
        env: of every simulator.
        task_names: of the tasks that are played, by task id.
    """
    chosen = suite(env.suite)
    return {
        "suite": chosen.name,
        "step_limits": {
            name: chosen.step_limit(env.step_limit, task) for task, name in task_names.items()
        },
        "settle_steps": env.settle_steps,
        "render_size": env.render_size,
        "image_size": env.image_size,
    }


def sampling_of(temperature: float) -> str:
    """Say how actions are chosen at a temperature.

    >>> sampling_of(0.0), sampling_of(0.6)
    ('greedy', 'temperature 0.6')
    """
    return f"temperature {temperature:g}" if temperature else "greedy"


def conditions(
    env: EnvConfig,
    task_names: Mapping[int, str],
    *,
    states: Split,
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    """The conditions of an evaluation, as JSON; makes a GL context to ask its name.

    Args:
        env: of every simulator.
        task_names: of the tasks that are played, by task id.
        states: which recorded starts.
        temperature: 0 is greedy play.
        seed: of the noise of sampled play.
    """
    chosen = suite(env.suite)
    return played_in(env, task_names) | {
        "states": states,
        **_rendered_with(chosen),
        "sampling": sampling_of(temperature),
        "seed": seed if temperature else None,
        "simulation": dict(chosen.versions),
        "versions": provenance(),
    }


def _rendered_with(chosen: Suite) -> dict[str, Any]:
    """What LIBERO's images are rendered with; of a suite of one's own, its versions say it."""
    if not isinstance(chosen, LiberoSuite):
        return {"renderer": None, "assets": None}
    assets = describe_assets(find_assets()) if chosen.needs_assets else None
    return {"renderer": _renderer(), "assets": assets}


@cache
def _renderer() -> str:
    return renderer_name()
