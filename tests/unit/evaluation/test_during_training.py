"""Which evaluations a training run makes, and what they cost it."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from one_chunk_world import STARTS, NotingPolicy, OneChunkSimulators

from verl_vla.config.compose import load_recipe
from verl_vla.config.grpo import (
    GRPOEvaluationConfig,
    GRPOPolicyConfig,
    GRPOTrainerConfig,
    Recipe,
    SamplingConfig,
)
from verl_vla.config.shared import EnvironmentConfig
from verl_vla.core.errors import ConfigError
from verl_vla.evaluation.during_training import (
    EvaluationKind,
    evaluation_kinds,
    num_evaluations,
    num_training_episodes,
)
from verl_vla.evaluation.evaluate import evaluate
from verl_vla.runs.metrics import METRICS, check_declared

GREEDY = EvaluationKind(temperature=0.0, suffix="")
SAMPLED = EvaluationKind(temperature=1.6, suffix="_sampled")


def recipe_with(evaluation: GRPOEvaluationConfig, **trainer: object) -> Recipe:
    return Recipe(
        out="run",
        policy=GRPOPolicyConfig(path="p"),
        environment=EnvironmentConfig(suite="mini"),
        sampling=SamplingConfig(groups_per_step=10, group_size=5, temperature=1.6),
        trainer=GRPOTrainerConfig(**{"total_training_steps": 20, "eval_every": 5} | trainer),
        evaluation=evaluation,
    )


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({}, 5),  # after 0, 5, 10, 15, 20
        ({"eval_before": False}, 4),
        ({"eval_every": 6}, 5),  # after 0, 6, 12, 18 and the last
        ({"eval_every": 100}, 2),
        ({"eval_every": 0}, 1),
        ({"eval_every": 0, "eval_before": False}, 0),
    ],
)
def test_evaluations_are_counted(options: dict[str, object], number: int) -> None:
    assert num_evaluations(recipe_with(GRPOEvaluationConfig(), **options).trainer) == number


@pytest.mark.parametrize(
    ("num_starts", "kinds", "said"),
    [
        # 5 evaluations of both kinds against 20 x 50 training episodes
        (
            9,
            (GREEDY, SAMPLED),
            "greedy and sampled at temperature 1.6; 5 evaluations of 9 episodes",
        ),
        (10, (GREEDY,), "greedy alone; 5 evaluations of 10 episodes each way make 100, not less"),
    ],
)
def test_both_are_made_where_they_cost_less_than_a_tenth(
    num_starts: int,
    kinds: tuple[EvaluationKind, ...],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="verl_vla.evaluation.during_training")
    recipe = recipe_with(GRPOEvaluationConfig())
    assert num_training_episodes(recipe) == 1000
    assert evaluation_kinds(recipe, num_starts) == kinds
    (message,) = (record.getMessage() for record in caplog.records)
    assert said in message
    assert "10% of the 1000 in training (evaluation.also_sampled)" in message


def test_a_recipe_that_says_which_is_obeyed_whatever_it_costs() -> None:
    always, never = (GRPOEvaluationConfig(also_sampled=word) for word in ("always", "never"))
    assert evaluation_kinds(recipe_with(always), 10_000) == (GREEDY, SAMPLED)
    assert evaluation_kinds(recipe_with(never), 1) == (GREEDY,)


def test_a_sampled_curve_needs_no_second_evaluation(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="verl_vla.evaluation.during_training")
    hot = recipe_with(GRPOEvaluationConfig(temperature=0.6))
    assert evaluation_kinds(hot, 1) == (EvaluationKind(temperature=0.6, suffix=""),)
    assert caplog.messages == ["evaluations: temperature 0.6 alone, since that is sampled"]
    asked = recipe_with(GRPOEvaluationConfig(temperature=0.6, also_sampled="always"))
    assert [kind.temperature for kind in evaluation_kinds(asked, 1)] == [0.6, 1.6]


def test_the_same_evaluation_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="is 1.6, as in training, so both evaluations would be"):
        recipe_with(GRPOEvaluationConfig(temperature=1.6, also_sampled="always"))


@pytest.mark.parametrize(
    ("words", "num_starts", "temperatures"),
    [
        (["recipe=quickstart"], 100, [0.0]),
        (["recipe=quickstart_libero_spatial"], 102, [0.6]),
        # 60 evaluations of 10 starts a task against 235 x 512 episodes
        (["recipe=libero"], 100, [0.0, 1.6]),
        (["recipe=libero", "suite=90"], 900, [0.0]),
        (["recipe=libero", "profile=lora_24gb"], 100, [0.0]),
    ],
)
def test_what_the_recipes_come_to(
    words: list[str], num_starts: int, temperatures: list[float]
) -> None:
    kinds = evaluation_kinds(load_recipe(words), num_starts)
    assert [kind.temperature for kind in kinds] == temperatures


def test_both_kinds_play_the_same_starts_at_every_evaluation() -> None:
    """The first and a later evaluation of a run, each greedy and sampled."""
    played = []
    noises = []
    for kind in (GREEDY, SAMPLED) * 2:
        policy, simulators = NotingPolicy(), OneChunkSimulators()
        evaluate(STARTS, policy, simulators, temperature=kind.temperature, seed=3)
        assert policy.temperatures == {kind.temperature}
        played.append(sorted((s.episode_id, s.task_id, s.init_state_id) for s in simulators.specs))
        noises.append(sorted(tuple(noise.tolist()) for noise in policy.noises))
    assert played[0] == [(i, s.task_id, s.init_state_id) for i, s in enumerate(STARTS)]
    assert all(other == played[0] for other in played)
    assert noises[1] == noises[3], "a sampled episode has the same noise each time"


def test_the_second_evaluation_has_names_of_its_own() -> None:
    result = evaluate(STARTS, NotingPolicy(), OneChunkSimulators(), temperature=1.6, seed=3)
    values = result.as_metrics({0: "lift", 4: "push"}, SAMPLED.suffix)
    check_declared(values)
    assert values.keys() == {name for name in METRICS if name.endswith("_sampled")}
    assert (values["val/success_rate_sampled"], values["val/episodes_sampled"]) == (0.5, 4.0)
    assert (SAMPLED.label, GREEDY.label) == (", temperature 1.6", "")
    assert replace(GREEDY, temperature=0.6).label == "", "the line of the curve stays as it is"
