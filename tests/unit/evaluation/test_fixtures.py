"""Where fixtures stand in an evaluation: the rule, and what contradicts it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from verl_vla.config.choices import Fixtures, Split
from verl_vla.core.errors import ConfigError
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.suite import libero_suite
from verl_vla.evaluation.compare import pair
from verl_vla.evaluation.conditions import DECIDES, fixtures_of, played_in
from verl_vla.runs.replay import env_of

GOAL, MINI = libero_suite("libero_goal"), libero_suite("mini")


@pytest.mark.parametrize(
    ("wanted", "states", "fixtures"),
    [
        (None, "official", "redrawn"),
        (None, "held_out", "first"),
        (None, "sampled", "first"),
        ("first", "official", "first"),
        ("redrawn", "held_out", "redrawn"),
    ],
)
def test_published_starts_have_published_fixtures(
    wanted: Fixtures | None, states: Split, fixtures: Fixtures
) -> None:
    assert fixtures_of(wanted, GOAL, states) == fixtures


def test_a_suite_without_fixtures_has_nothing_to_redraw() -> None:
    assert fixtures_of(None, MINI, "official") == "first"
    with pytest.raises(ConfigError, match="suite 'mini' has none of LIBERO's fixtures; leave it"):
        fixtures_of("redrawn", MINI, "official")


def test_sampled_starts_belong_to_the_first_placement() -> None:
    with pytest.raises(ConfigError, match="sampled starts belong to the first placement; set"):
        fixtures_of("redrawn", GOAL, "sampled")


def test_evaluations_of_other_fixtures_do_not_compare() -> None:
    assert "fixtures" in DECIDES
    first = dict.fromkeys(DECIDES) | {"fixtures": "first", "episodes": [], "tasks": []}
    with pytest.raises(ConfigError, match="do not compare: fixtures: 'first' -> 'redrawn'"):
        pair(first, first | {"fixtures": "redrawn"})


def test_a_replay_has_the_fixtures_of_its_episode() -> None:
    env = EnvConfig(suite="libero_goal", step_limit=7, fixtures="redrawn")
    header = played_in(env, {3: GOAL.tasks[3].name})
    assert env_of(header, 3) == env
    assert env_of(header | {"fixtures": "first"}, 3) == replace(env, fixtures="first")
