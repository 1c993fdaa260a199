"""Groups of a recipe, and where each option got its value."""

from __future__ import annotations

import pytest

from verl_vla.config.compose import (
    COMMAND_LINE,
    RECIPES_FOLDER,
    compose_recipe,
    group_options,
    leaves,
    load_recipe,
)
from verl_vla.core.errors import ConfigError

SUITES = ("spatial", "object", "goal", "10", "90")


def compose(*words: str):
    return compose_recipe(["recipe=libero", *words], RECIPES_FOLDER)


def test_a_recipe_says_what_it_takes_when_nothing_is_chosen():
    assert compose().choices == {"suite": "spatial", "reward": "binary", "profile": "8gpu"}


def test_a_choice_takes_another_file_of_a_group():
    composition = compose("suite=10", "reward=srpo", "profile=two_cores")
    assert composition.choices == {"suite": "10", "reward": "srpo", "profile": "two_cores"}
    assert composition.values["environment"]["suite"] == "libero_10"
    assert composition.values["reward_args"]["alpha"] == 0.8
    assert composition.values["out"] == "runs/libero_10_srpo"
    assert composition.values["cluster"]["device"] == "cpu"


def test_a_number_may_name_a_file_and_plus_signs_change_nothing():
    assert compose("+suite=90").choices == compose("suite=90").choices


def test_a_reward_that_is_no_file_of_the_group_is_the_knob():
    composition = compose("reward=oracle", "reward_args.weight=2")
    assert composition.values["reward"] == "oracle"
    assert composition.choices["reward"] == "binary"
    assert composition.origins["reward"] == COMMAND_LINE


def test_a_recipe_without_groups_keeps_its_plain_knobs():
    assert load_recipe(["recipe=quickstart", "reward=srpo"]).reward == "srpo"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("suite=spacial", "suite is 'spacial', which is unknown; did you mean 'spatial'?"),
        ("profile=9gpu", "profile is '9gpu', which is unknown; did you mean '8gpu'?"),
        ("profil=8gpu", "unknown key 'profil'"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused(word, message):
    with pytest.raises(ConfigError, match="^" + message.replace("?", r"\?")):
        load_recipe(["recipe=libero", word])


def test_every_knob_knows_who_had_the_last_word():
    origins = compose("reward=srpo", "seed=3", "optimizer={lr: 1e-4}").origins
    assert origins["environment.suite"] == "suite/spatial.yaml"
    assert origins["optimizer.num_mini_batches"] == "reward/srpo.yaml"
    assert origins["out"] == "libero.yaml"
    assert origins["optimizer.weight_decay"] == "reward/srpo.yaml"
    assert origins["environment.num_slots"] == "profile/8gpu.yaml"
    assert origins["optimizer.lr"] == origins["seed"] == COMMAND_LINE
    assert "defaults" not in origins
    assert "trainer.project" not in origins


def test_a_recipe_of_the_users_own_chooses_from_the_projects_groups(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("# mine\ndefaults: [libero, _self_]\nseed: 4\n")
    composition = compose_recipe([f"recipe={path}", "suite=goal"], RECIPES_FOLDER)
    assert composition.choices["suite"] == "goal"
    assert composition.values["seed"] == 4
    assert composition.origins["seed"] == "mine.yaml"
    assert composition.origins["environment.suite"] == "suite/goal.yaml"


def test_leaves_are_what_holds_no_other():
    assert dict(leaves({"a": {"b": 1, "c": {}}, "d": [2]})) == {"a.b": 1, "a.c": {}, "d": [2]}
    assert dict(leaves(3, "x")) == {"x": 3}


def test_the_groups_hold_what_the_recipe_promises():
    text = (RECIPES_FOLDER / "libero.yaml").read_text()
    for group in ("suite", "reward", "profile"):
        listed = next(line for line in text.splitlines() if line.startswith(f"# {group}:"))
        assert all(option in listed for option in group_options(group))
