"""Evaluations under another MuJoCo or other assets do not compare."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest

from verl_vla.core.episode import Outcome
from verl_vla.core.errors import ConfigError
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.suite import libero_suite
from verl_vla.evaluation.compare import pair
from verl_vla.evaluation.conditions import DECIDES, conditions
from verl_vla.runs.run_dir import evaluation_record

pytestmark = pytest.mark.sim

STAND_IN = "turbosquid_objects/wine_rack/visual/wine_rack_vis.msh"


def evaluation(suite: str, **changed: Any) -> dict[str, Any]:
    """An evaluation of one episode, with what this machine says of the suite."""
    name = libero_suite(suite).tasks[0].name
    given = conditions(
        EnvConfig(suite=suite), {0: name}, states="held_out", temperature=0.0, seed=0
    )
    line = {
        "episode": 0,
        "task": 0,
        "init_state": 4,
        "outcome": int(Outcome.SUCCESS),
        "steps": 9,
        "crash": None,
    }
    return evaluation_record([line], given | changed, {0: name})


@pytest.mark.parametrize("suite", ["libero_spatial", "mini"])
def test_another_mujoco_is_refused_by_its_version(suite: str) -> None:
    here = evaluation(suite)
    assert set(DECIDES) <= here.keys()
    assert here["simulation"]["mujoco"] == metadata.version("mujoco")
    before = evaluation(suite, simulation=here["simulation"] | {"mujoco": "3.8.1"})
    with pytest.raises(ConfigError, match=r"do not compare: simulation\.mujoco: '3\.8\.1' -> '3"):
        pair(before, here)


def test_other_assets_are_refused() -> None:
    here = evaluation("libero_spatial")
    assert here["assets"]["differing"] == {}
    with_stand_in = here["assets"] | {"differing": {STAND_IN: "0" * 64}}
    with pytest.raises(ConfigError, match=r"do not compare: assets\.differing.*wine_rack"):
        pair(evaluation("libero_spatial", assets=with_stand_in), here)
    # what versions with stand-ins wrote
    before = {"fingerprint": "2f1c55aa01b0c3d4", "standins": [STAND_IN]}
    with pytest.raises(ConfigError, match=r"do not compare: assets"):
        pair(evaluation("libero_spatial", assets=before), here)


def test_equal_worlds_compare() -> None:
    here = evaluation("libero_spatial")
    assert pair(here, evaluation("libero_spatial"))["all tasks"].both == 1
