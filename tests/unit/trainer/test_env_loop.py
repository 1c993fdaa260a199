"""What one training step cost and brought."""

from __future__ import annotations

import math

from verl_vla.trainer.grpo.env_loop import StepStats


def test_rates_are_over_the_episodes_that_were_judged() -> None:
    account = StepStats(episodes=10, crashes=2, solved=4, score_sum=6.0)
    values = account.as_metrics()
    assert values["env/success_rate"] == 4 / 8
    assert values["critic/score/mean"] == 6 / 8


def test_a_step_in_which_every_simulator_crashed_has_no_success_rate() -> None:
    values = StepStats(episodes=3, crashes=3).as_metrics()
    assert math.isnan(values["env/success_rate"])
    assert math.isnan(values["critic/score/mean"])
    assert values["env/crashes"] == 3
