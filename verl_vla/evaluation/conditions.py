"""Conditions of a success rate, stored with every evaluation.

Rates with different starts, step limits, images or physics are not comparable. `DECIDES` are the
keys that must agree before two evaluations may be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from verl_vla.config.choices import Fixtures, Split
from verl_vla.core.errors import ConfigError
from verl_vla.core.provenance import provenance
from verl_vla.envs.base import EnvConfig, Suite
from verl_vla.envs.libero.assets import describe_assets, find_assets
from verl_vla.envs.libero.gl import renderer_name
from verl_vla.envs.libero.suite import LiberoSuite
from verl_vla.envs.registry import suite

DECIDES = (
    "suite",
    "states",
    "step_limits",
    "settle_steps",
    "fixtures",
    "render_size",
    "renderer",
    "assets",
    "sampling",
    "simulation",
)
"""Keys of conditions that must agree. Policies may differ in image size, seed, dtype and commit;
such differences are reported and do not prevent a comparison."""


def played_in(env: EnvConfig, task_names: Mapping[int, str]) -> dict[str, Any]:
    """Return the settings that a replay of an episode needs, as JSON.

    Args:
        env: configuration of the simulators.
        task_names: names of the tasks, by task id.
    """
    chosen = suite(env.suite)
    return {
        "suite": chosen.name,
        "step_limits": {
            name: chosen.step_limit(env.step_limit, task) for task, name in task_names.items()
        },
        "settle_steps": env.settle_steps,
        "fixtures": env.fixtures,
        "render_size": env.render_size,
        "image_size": env.image_size,
    }


def fixtures_of(wanted: Fixtures | None, chosen: Suite, states: Split) -> Fixtures:
    """Return where fixtures stand in an evaluation.

    All recorded init states are evaluated as openvla-oft does, unless something else is wanted.

    Raises:
        ConfigError: fixtures are to be redrawn where there are none, or for sampled starts.
    """
    has_fixtures = isinstance(chosen, LiberoSuite) and chosen.needs_assets
    if wanted == "redrawn" and not has_fixtures:
        raise ConfigError(
            f"--fixtures is redrawn, but suite {chosen.name!r} has none of LIBERO's fixtures; "
            "leave it out"
        )
    if wanted == "redrawn" and states == "sampled":
        raise ConfigError(
            "--fixtures is redrawn, but --states is sampled, and sampled starts belong to the "
            "first placement; set --states official or held_out, or leave --fixtures out"
        )
    if wanted is not None:
        return wanted
    return "redrawn" if has_fixtures and states == "official" else "first"


def sampling_of(temperature: float) -> str:
    """Describe the sampling of actions at a temperature.

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
    """Return the conditions of an evaluation, as JSON; a GL context is made to read its renderer.

    Args:
        env: configuration of the simulators.
        task_names: names of the tasks, by task id.
        states: split of the starts.
        temperature: sampling temperature; 0 is greedy.
        seed: seed of the sampling noise.
    """
    chosen = suite(env.suite)
    return played_in(env, task_names) | {
        "states": states,
        **_rendered_with(chosen),
        "sampling": sampling_of(temperature),
        # greedy episodes use no noise, so a seed would only seem to differ
        "seed": seed if temperature else None,
        "simulation": dict(chosen.versions),
        "versions": provenance(),
    }


def _rendered_with(chosen: Suite) -> dict[str, Any]:
    """Return renderer and assets of LIBERO's images; None for suites of users.

    The versions of such a suite must describe its images.
    """
    # a user's suite says by `Suite.versions` what its images depend on
    if not isinstance(chosen, LiberoSuite):
        return {"renderer": None, "assets": None}
    assets = describe_assets(find_assets()) if chosen.needs_assets else None
    return {"renderer": _renderer(), "assets": assets}


# a GL context takes a second, and the answer does not change
@cache
def _renderer() -> str:
    return renderer_name()
