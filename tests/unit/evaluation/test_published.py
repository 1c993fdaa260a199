"""The published protocol: what it plays, and what its table says of made-up results."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from verl_vla.cli.main import EXIT_USAGE, main
from verl_vla.config.choices import Fixtures
from verl_vla.core.errors import ConfigError
from verl_vla.core.success_rate import SuccessRate
from verl_vla.envs.base import EnvConfig
from verl_vla.envs.libero.suite import libero_suite
from verl_vla.evaluation.published import (
    ALLOWED,
    DEFAULTS,
    RATES_FILE,
    compare_with_published,
    complete,
    published,
    published_table,
)
from verl_vla.policies.base import PolicyShape

SPATIAL = libero_suite("libero_spatial")
ONE_CAMERA = PolicyShape(num_views=1, image_size=224, chunk_length=8, action_dim=7, num_bins=256)
TWO_CAMERAS = PolicyShape(
    num_views=2, image_size=224, chunk_length=8, action_dim=7, num_bins=256, proprio_dim=8
)


def rate(successes: int, episodes: int = 500, crashes: int = 0) -> SuccessRate:
    return SuccessRate(successes=successes, episodes=episodes, crashes=crashes)


def compared(
    ours: SuccessRate, shape: PolicyShape = ONE_CAMERA, num_tasks: int = 10, **changed: Any
) -> dict[str, Any]:
    env = replace(EnvConfig(suite="libero_spatial", fixtures="redrawn"), **changed)
    return compare_with_published(SPATIAL, ours, shape, env, num_tasks)


def row(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in found["rows"] if row["name"] == name)


def asked(**given: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(DEFAULTS)
    return nothing | {"suite": "libero_spatial", "protocol": "published"} | given


def test_the_file_of_rates_is_complete() -> None:
    found = published()
    assert set(found.suites) == {"libero_spatial", "libero_object", "libero_goal", "libero_10"}
    works = {row.source for row in found.rows}
    assert works == set(found.sources) == {"openvla_oft", "simplevla_rl", "srpo"}
    assert all("arXiv " in source for source in found.sources.values())
    assert len({row.name for row in found.rows}) == len(found.rows)
    for published_row in found.rows:
        assert published_row.episodes in (496, 500)
        assert published_row.limit in ALLOWED["step_limit"]


@pytest.mark.parametrize("published_row", published().rows, ids=lambda row: row.name)
def test_the_rates_of_a_row_have_its_mean(published_row: Any) -> None:
    """The works round both, so a mistyped rate shows as a mean that is off by more."""
    mean = sum(published_row.rates.values()) / len(published_row.rates)
    assert mean == pytest.approx(published_row.mean, abs=0.0501)
    for suite, percent in published_row.rates.items():
        counted = published_row.rate(suite)
        assert 100 * counted.rate == pytest.approx(percent, abs=0.101)  # of 496 episodes


def test_a_row_has_nothing_that_the_table_does_not_know() -> None:
    stored = yaml.safe_load(RATES_FILE.read_text())
    for stored_row in stored["rows"]:
        assert len(stored_row["rates"]) == len(stored["suites"])
        assert all(0 <= percent <= 100 for percent in stored_row["rates"])
        assert stored_row["fixtures"] in (*get_args(Fixtures), None)
        assert stored_row["actions"] in ("tokens", "regression")


def test_without_a_protocol_the_defaults_hold() -> None:
    assert complete(asked(protocol=None)) == DEFAULTS
    chosen = complete(asked(protocol=None, suite="mini", states="sampled", render_size=64))
    assert chosen == DEFAULTS | {"states": "sampled", "render_size": 64}


def test_the_protocol_is_that_of_the_published_evaluations() -> None:
    assert complete(asked()) == {
        "states": "official",
        "temperature": 0.0,
        "step_limit": "published",
        "render_size": 256,
    }
    assert complete(asked(step_limit="simplevla", states="official"))["step_limit"] == "simplevla"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"states": "held_out"}, "--states is held_out, .* have official; leave it out"),
        ({"temperature": 1.0}, "--temperature is 1.0, .* have 0.0; leave it out"),
        (
            {"step_limit": "100"},
            "--step-limit is 100, .* have published or simplevla; leave it out",
        ),
        ({"render_size": 128}, "--render-size is 128, .* have 256; leave it out"),
        ({"suite": "mini"}, "no published rates of 'mini' .* libero_10, or write --states"),
        ({"suite": "libero_90"}, "no published rates of 'libero_90'"),
        ({"suite": "my/suite.py:Suite"}, "no published rates of 'my/suite.py:Suite'"),
    ],
)
def test_what_contradicts_the_protocol_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        complete(asked(**given))


def test_the_command_refuses_before_it_reads_a_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "--policy", "nowhere", "--out", str(tmp_path / "out")]
    code = main([*words, "--suite", "mini", "--protocol", "published"])
    assert code == EXIT_USAGE
    assert "no published rates of 'mini'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_intervals_that_share_a_point_overlap() -> None:
    found = compared(rate(456))  # 91.2%
    assert row(found, "OpenVLA-OFT, tokens")["overlaps"]
    assert row(found, "SimpleVLA-RL, SFT on all demos")["overlaps"]
    assert not row(found, "OpenVLA-OFT")["overlaps"]
    assert not row(found, "SimpleVLA-RL, SFT on one demo a task")["overlaps"]
    low, high = row(found, "OpenVLA-OFT")["ci95"]
    assert (low, high) == rate(488).ci95
    edge = next(n for n in range(500) if rate(n).ci95[1] >= low)
    assert row(compared(rate(edge)), "OpenVLA-OFT")["overlaps"]
    assert not row(compared(rate(edge - 1)), "OpenVLA-OFT")["overlaps"]


def test_what_differs_is_named() -> None:
    found = compared(rate(456), fixtures="first")
    fixtures = "fixtures: redrawn, here first; they are up to 2 cm apart"
    assert row(found, "OpenVLA-OFT")["differs"] == [
        "cameras: 2, here 1",
        "proprioception: yes, here no",
        "actions: regression, here tokens",
        fixtures,
    ]
    assert row(found, "OpenVLA-OFT, tokens")["differs"] == [fixtures]
    trained_on_them = "its RL trained on the init states of the evaluation"
    longer = row(found, "SRPO, SFT on one demo a task, RL")["differs"]
    assert longer == ["step limit: 512, here 220", trained_on_them]


def test_what_differs_depends_on_what_was_played() -> None:
    found = compared(rate(456), TWO_CAMERAS, step_limit="simplevla", fixtures="first")
    first = row(found, "OpenVLA-OFT")["differs"]
    assert first[:2] == ["actions: regression, here tokens", "step limit: 220, here 512"]
    others = row(found, "SimpleVLA-RL, SFT on all demos")["differs"]
    assert others == ["cameras: 1, here 2", "proprioception: no, here yes"]


def test_the_rows_of_each_placement_of_fixtures_have_no_letter_for_it() -> None:
    redrawn, first = (compared(rate(456), fixtures=name) for name in ("redrawn", "first"))
    assert row(redrawn, "OpenVLA-OFT, tokens")["differs"] == []
    name = "SimpleVLA-RL, SFT on all demos"
    steps = "step limit: 512, here 220"
    assert row(first, name)["differs"] == [steps]
    fixtures = "fixtures: first, here redrawn; they are up to 2 cm apart"
    assert row(redrawn, name)["differs"] == [steps, fixtures]


def test_the_table_says_it_in_a_line_a_policy() -> None:
    found = compared(rate(456), fixtures="first")
    lines = published_table("libero_spatial", found).splitlines()
    assert lines[0].split()[:2] == ["libero_spatial", "rate"]
    assert lines[1].split() == ["this", "policy", "91.2%", "88.4-93.4%", "500"]
    (tokens,) = (line for line in lines if line.startswith("OpenVLA-OFT, tokens"))
    percents = ["91.3%", "88.4-93.4%", "500", "90.2%"]
    assert tokens.split() == ["OpenVLA-OFT,", "tokens", *percents, "yes", "d"]
    assert re.search(r"97\.1% +NO  a b c d$", lines[2])
    assert "a  cameras: 2, here 1" in lines
    assert lines[-1].startswith("Published rows: one policy a suite, greedy")


def test_a_part_of_the_protocol_says_that_it_is_one() -> None:
    whole = compared(rate(498, 499, crashes=1))
    assert whole["left_out"] == []
    part = compared(rate(1, 4), num_tasks=2)
    assert part["left_out"] == ["2 of 10 tasks", "2 of 50 init states a task"]
    last = published_table("libero_spatial", part).splitlines()[-1]
    assert last.startswith("Not the whole protocol: 2 of 10 tasks, 2 of 50 init states a task")


def test_where_every_simulator_was_lost_nothing_is_claimed() -> None:
    found = compared(rate(0, 0, crashes=500))
    assert {row["overlaps"] for row in found["rows"]} == {None}
    line = published_table("libero_spatial", found).splitlines()[1]
    assert line.split() == ["this", "policy", "-", "0.0-100.0%", "0"]
