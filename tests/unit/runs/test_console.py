"""The lines at the console."""

from __future__ import annotations

import logging

import pytest

from verl_vla.core.episode import Outcome
from verl_vla.core.success_rate import SuccessRate
from verl_vla.core.text import format_seconds
from verl_vla.runs.console import EVALUATION_LINES_EVERY_S, EvaluationProgress, Progress
from verl_vla.runs.metrics import METRICS, check_declared

VALUES = {
    "env/success_rate": 0.25,
    "env/episodes": 64.0,
    "sampling/groups_kept": 4,
    "sampling/groups_played": 8,
    "sampling/rounds": 2,
    "actor/entropy": 1.234,
    "actor/pg_clipfrac_low": 0.001,
    "actor/pg_clipfrac_high": 0.0125,
    "actor/ratio_first": 1.00004,
    "timing_s/step": 12.34,
}


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="verl_vla.runs.console")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_step_is_one_line_of_its_most_telling_numbers(lines):
    shown = Progress(total_steps=100)
    shown.show_step(20, VALUES)
    assert lines() == [
        "step  20/100  success  25.0% of 64  groups 4/8 in 2 rounds  "
        "entropy 1.23  clip 0.1/1.2%  ratio 1.0000  12.3 s  left 16m27s"
    ]


def test_it_shows_declared_metrics_alone():
    check_declared(VALUES)
    assert set(VALUES) <= set(METRICS)


def test_one_round_is_not_rounds(lines):
    Progress(total_steps=1).show_step(1, VALUES | {"sampling/rounds": 1})
    assert "in 1 round  " in lines()[0]


def test_a_missing_number_is_not_hidden():
    with pytest.raises(KeyError, match="actor/entropy"):
        Progress(total_steps=1).show_step(1, {k: v for k, v in VALUES.items() if "ent" not in k})


def test_the_time_left_follows_the_steps_slowly(lines):
    shown = Progress(total_steps=12)
    for step, seconds in ((1, 10), (2, 10), (3, 30)):
        shown.show_step(step, VALUES | {"timing_s/step": seconds})
    left = [line.rsplit("left ", 1)[1] for line in lines()]
    # eleven steps of 10 s, ten of 10 s, then nine of 16 s: 0.7 of the past and 0.3 of 30 s
    assert left == ["1m50s", "1m40s", "2m24s"]


def test_nothing_is_left_after_the_last_step(lines):
    shown = Progress(total_steps=3)
    shown.show_step(3, VALUES)
    assert lines()[0].endswith("left 0s")


def test_an_evaluation_comes_with_its_counts_and_interval(lines):
    shown = Progress(total_steps=10)
    shown.show_evaluation(4, SuccessRate(successes=8, episodes=10, crashes=0))
    shown.show_evaluation(5, SuccessRate(successes=8, episodes=10, crashes=2))
    assert lines() == [
        "held-out after step 4: 80.0% of 10 episodes (95% interval 49.0-94.3%)",
        "held-out after step 5: 80.0% of 10 episodes (95% interval 49.0-94.3%), 2 crashed",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (61, "1m01s"),
        (3599.4, "59m59s"),
        (3599.9, "1h00m"),
        (90061, "25h01m"),
    ],
)
def test_seconds_become_what_one_would_say(seconds, text):
    assert format_seconds(seconds) == text


def test_an_evaluation_says_how_far_it_is_and_what_is_left(lines, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("verl_vla.runs.console.time.perf_counter", lambda: now[0])
    found = [{"outcome": Outcome.SUCCESS}] * 2
    progress = EvaluationProgress(8, found)
    progress.show({"outcome": Outcome.CRASH})
    assert lines() == []
    now[0] += EVALUATION_LINES_EVERY_S
    for _ in range(2):
        progress.show({"outcome": Outcome.TIMEOUT})
    assert lines() == ["3/8 played  success  66.7%  simulators lost 1  10s  left 50s"]
    for _ in range(4):
        progress.show({"outcome": Outcome.SUCCESS})
    assert lines()[1:] == ["8/8 played  success  75.0%  simulators lost 1  10s  left 0s"]
