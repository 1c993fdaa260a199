"""``explain``: every option, its value, who said so, and what it means."""

from __future__ import annotations

from verl_vla.cli import arguments
from verl_vla.cli.explain import explain, run
from verl_vla.config.compose import RECIPES_FOLDER, compose_recipe
from verl_vla.config.grpo import Recipe
from verl_vla.config.schema import meanings, parse


def explained(*words: str):
    composition = compose_recipe(words, RECIPES_FOLDER)
    recipe = parse(Recipe, composition.values)
    return {name: rest for name, *rest in explain(recipe, composition)}


def test_every_knob_has_a_meaning():
    assert not [name for name, meaning in meanings(Recipe) if not meaning]


def test_a_knob_is_named_once_with_value_and_origin():
    options = explained("recipe=quickstart", "seed=3", "reward_args={a: {b: 1}}")
    assert options["seed"][:2] == [3, "command line"]
    assert options["environment.num_workers"][:2] == [2, "profile/two_cores.yaml"]
    assert options["sampling.dynamic"][:2] == [True, "default"]
    assert options["reward_args.a.b"][:2] == [1, "command line"]
    assert options["verl"][:2] == [{}, "default"]


def test_an_interpolated_value_is_shown_as_it_ends_up():
    assert explained("recipe=libero")["out"][:2] == ["runs/libero_spatial_binary", "libero.yaml"]


def test_the_command_needs_no_policy_and_prints_what_can_be_typed(capsys):
    assert (
        run(
            arguments.parse(
                "explain",
                ["recipe=libero", "suite=goal", "environment.tasks=[0,2]", "trainer.loggers=[]"],
            )
        )
        == 0
    )
    said = capsys.readouterr().out
    assert said.startswith("profile=8gpu\nreward=binary\nsuite=goal\n")
    assert "\nenvironment.tasks = [0,2]    [command line]\n    Task ids within the suite" in said
    assert "\ntrainer.loggers = []    [command line]\n" in said
    assert "\npolicy.unnorm_key = null    [default]\n" in said
    assert "\noptimizer.num_mini_batches = 4    [libero.yaml]\n" in said
