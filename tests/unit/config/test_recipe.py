"""Recipes: files, overrides, and every way in which they can be wrong."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass

import pytest
import yaml

from verl_vla.config.compose import RECIPES_FOLDER, find_recipe, load_recipe, recipe_names
from verl_vla.config.grpo import GRPOOptimizerConfig, GRPOPolicyConfig, GRPOTrainerConfig, Recipe
from verl_vla.config.shared import EnvironmentConfig
from verl_vla.core.errors import ConfigError

TEXT = """\
out: runs/test
policy:
  path: some/checkpoint
environment:
  suite: mini
sampling:
  group_size: 4
"""
STAND_INS = {"out": "runs/test", "policy.path": "checkpoint"}
"""Options that a recipe may leave to the person at the command line."""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def load(file):
    return lambda *overrides: load_recipe([f"recipe={file}", *overrides])


def refusal(action, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        action(*arguments)
    return str(caught.value)


def test_a_recipe_holds_what_differs_and_dataclasses_the_rest(load):
    recipe = load()
    assert recipe == Recipe(
        out="runs/test",
        policy=GRPOPolicyConfig(path="some/checkpoint"),
        environment=EnvironmentConfig(suite="mini"),
        sampling=type(recipe.sampling)(group_size=4),
    )


def test_overrides_reach_keys_that_the_file_does_not_mention(load):
    recipe = load(
        "seed=3",
        "sampling.group_size=6",
        "optimizer.lr=1e-4",
        "optimizer.betas=[0.8,0.9]",
        "environment.tasks=[0,2]",
        "environment.step_limit=90",
        "loss.clip.low=0.1",
        "reward_args.scale=2",
        "verl.trainer.balance_batch=false",
    )
    assert recipe.seed == 3
    assert recipe.sampling.group_size == 6
    assert recipe.optimizer.lr == 1e-4
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.environment.tasks == (0, 2)
    assert recipe.environment.step_limit == 90
    assert recipe.loss.clip.low == 0.1
    assert recipe.reward_args == {"scale": 2}
    assert recipe.verl == {"trainer": {"balance_batch": False}}


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_hydras_plus_signs_are_allowed_and_not_needed(load, plus):
    assert load(f"{plus}seed=4").seed == 4


def test_the_order_of_recipe_and_overrides_does_not_matter(file):
    assert load_recipe(["seed=2", f"recipe={file}"]) == load_recipe([f"recipe={file}", "seed=2"])


def test_the_last_of_two_overrides_wins(load):
    assert load("seed=1", "seed=2").seed == 2


def test_off_is_a_word_in_a_file_too(load, file):
    """YAML reads it as false unless it is quoted."""
    assert load("cold_start.mode=off").cold_start.mode == "off"
    for written in ("off", "'off'"):
        file.write_text(f"{TEXT}cold_start: {{mode: {written}}}\n")
        assert load().cold_start.mode == "off"


def test_a_value_with_special_characters_can_be_quoted(load):
    assert load("out='runs/a=b ~c'").out == "runs/a=b ~c"


def test_a_recipe_can_build_on_another(file):
    child = file.with_name("child.yaml")
    child.write_text("defaults: [mine, _self_]\nsampling: {group_size: 8}\nseed: 5\n")
    recipe = load_recipe([f"recipe={child}"])
    assert (recipe.sampling.group_size, recipe.seed, recipe.policy.path) == (
        8,
        5,
        "some/checkpoint",
    )


def test_a_path_may_be_relative_and_the_name_hold_dots(file, monkeypatch):
    file.rename(file.with_name("mine.v2.yaml"))
    monkeypatch.chdir(file.parent)
    assert load_recipe(["recipe=mine.v2.yaml"]).out == "runs/test"


def test_loading_twice_gives_the_same(load):
    """Hydra keeps global state; a second recipe in one process must not meet the first one's."""
    assert load("seed=1") == load("seed=1")
    assert load() == load()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.grup_size=4", "unknown key 'sampling.grup_size'; did you mean 'sampling.group_"),
        ("sede=1", "unknown key 'sede'; did you mean 'seed'?"),
        ("sampling.group_size=1", "sampling.group_size is 1; GRPO compares episodes"),
        ("sampling.group_size=four", "sampling.group_size is 'four'; it must be int"),
        ("seed=1.5", "seed is 1.5; it must be int"),
        ("seed=-1", "seed is -1; set 0 or more"),
        ("optimizer.lr=nan", "optimizer.lr is nan"),
        ("optimizer.lr=0", "optimizer.lr is 0; set more than 0"),
        ("optimizer.clip_grad=0", "optimizer.clip_grad is 0; set more than 0"),
        ("optimizer.warmup_steps=-1", "optimizer.warmup_steps is -1; set 0 or more"),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay is -0.1; set 0 or more"),
        ("optimizer.betas=[0.9]", "optimizer.betas is [0.9]; AdamW takes two"),
        ("optimizer.betas=[0.9,1]", "optimizer.betas is [0.9, 1]; AdamW takes two"),
        ("optimizer.micro_batch_size=0", "optimizer.micro_batch_size is 0; set at least 1"),
        ("optimizer.num_mini_batches=0", "optimizer.num_mini_batches is 0; set at least 1"),
        (
            "optimizer.num_mini_batches=65",
            "optimizer.num_mini_batches is 65, but sampling.groups_per_step is 64, and a group is",
        ),
        ("loss.clip.high=1.5", "loss.clip.high is 1.5; a ratio is clipped between 0 and 2"),
        ("policy=x", "policy is 'x'; it is a section, set policy.KEY instead"),
        ("policy.dtype=float16", "policy.dtype is 'float16'; choose one of 'float32', 'bfloat16'"),
        (
            "policy={path: a, attention: flash_attention_2, dtype: float32}",
            "policy.attention is 'flash_attention_2', which computes in 16 bits, and policy.dtype",
        ),
        ("policy.lora_rank=0", "policy.lora_rank is 0; set at least 1"),
        ("policy.lora_targets=all", "policy.lora_targets is 'all'; choose one of 'language_model'"),
        (
            "policy.quantization=nf4",
            "policy.quantization is 'nf4', and weights in 4 bits cannot be trained; set",
        ),
        ("optimizer.name=sgd", "optimizer.name is 'sgd'; choose one of 'adamw', 'adamw_8bit'"),
        ("cluster.env_nodes=-1", "cluster.env_nodes is -1; set 0 or more"),
        (
            "cluster.env_nodes=2",
            "cluster.env_nodes is 2, but cluster.address names no Ray cluster; set it, e.g.",
        ),
        ("environment.step_limit=long", "environment.step_limit is 'long'; choose one of"),
        ("environment.num_slots=0", "environment.num_slots is 0; set at least 1"),
        ("environment.timeout_s=0", "environment.timeout_s is 0; set the seconds to wait"),
        ("trainer.total_training_steps=0", "trainer.total_training_steps is 0; set at least 1"),
        ("trainer.save_every=-1", "trainer.save_every is -1; set 0 for never"),
        ("trainer.keep_checkpoints=0", "trainer.keep_checkpoints is 0; keep at least 1, or set"),
        ("cluster.ranks_per_node=0", "cluster.ranks_per_node is 0; set at least 1"),
        ("cluster.device=tpu", "cluster.device is 'tpu'; choose one of 'auto', 'cuda', 'cpu'"),
        ("evaluation.episodes_per_task=0", "evaluation.episodes_per_task is 0; set at least 1"),
        ("cold_start.mode=no", "cold_start.mode is 'no'; choose one of 'stop', 'off'"),
        ("cold_start.threshold=15", "cold_start.threshold is 15; it is a share of episodes"),
        ("out=", "out is empty; name a folder for the run"),
        ("seed", "'seed' is no key=value; write e.g. seed=1"),
        ("~seed=1", "'~seed=1' is no key=value"),
        ("out=a=b", "'out=a=b' cannot be read"),
        ("environment.tasks=0,1", "use key=[value1,value2]"),
        ("hydra.verbose=true", "'hydra.verbose=true' is an option of Hydra"),
        ("seed=${nothing}", "cannot be composed"),
    ],
)
def test_a_wrong_override_is_refused_with_a_remedy(load, override, message):
    assert message in refusal(load, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.ranks_per_node=2", "runs on one rank, and the cluster has 2; set"),
        ("cluster.num_nodes=3", "runs on one rank, and the cluster has 3; set"),
        ("optimizer.name=deepspeed_cpu_adam", "keeps weights in host memory"),
    ],
)
def test_weights_in_4_bits_stay_on_one_device(load, override, message):
    words = ("policy.lora_rank=16", "policy.quantization=nf4")
    assert load(*words).policy.quantization == "nf4"
    assert message in refusal(load, *words, override)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "0 recipes were named; say which one with recipe=NAME. Known: "),
        (["seed=1"], "0 recipes were named"),
        (["recipe=a", "recipe=b"], "2 recipes were named"),
        (["recipe=nothing_like_it"], "recipe is 'nothing_like_it', which is unknown; Known: "),
        (["recipe=no/where.yaml"], "recipe is 'no/where.yaml', but there is no such file; check"),
        (["recipe="], "recipe is '', which is unknown"),
        (["recipe=old.yml"], "recipe is 'old.yml', but Hydra reads .yaml alone; rename the file"),
    ],
)
def test_just_one_recipe_that_exists_must_be_named(arguments, message):
    assert message in refusal(load_recipe, arguments)


def test_a_recipe_that_is_nearly_right_is_suggested(tmp_path, monkeypatch):
    monkeypatch.setattr("verl_vla.config.compose.RECIPES_FOLDER", tmp_path)
    (tmp_path / "libero_spatial.yaml").write_text(TEXT)
    assert recipe_names(tmp_path) == ["libero_spatial"]
    assert find_recipe("libero_spatial", tmp_path) == tmp_path / "libero_spatial.yaml"
    assert "did you mean 'libero_spatial'?" in refusal(load_recipe, ["recipe=libero_spacial"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "out is required and has no default; set it"),
        ("out: a\npolicy: {path: b}\n", "environment is required and has no default"),
        (TEXT + "optimiser: {lr: 1}\n", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        (TEXT.replace("some/checkpoint", "???"), "Missing mandatory value: path"),
        (TEXT + "  group_size: 5\n", "duplicate key"),
        ("out: [a\npolicy:\n", "cannot be composed: while parsing a flow sequence"),
        ("- a\n", "must be a DictConfig, got ListConfig"),
        ("defaults: [nothing, _self_]\n", "Could not load 'nothing'"),
        ("out: ${nothing}\n", "Interpolation key 'nothing' not found"),
    ],
)
def test_a_wrong_file_is_refused(file, text, message):
    file.write_text(text)
    assert message in refusal(load_recipe, [f"recipe={file}"])


def test_a_file_that_is_no_text_is_refused(file):
    file.write_bytes(b"\xff\xfe\x00")
    assert "cannot be composed" in refusal(load_recipe, [f"recipe={file}"])


def test_a_value_left_open_can_be_given_at_the_command_line(file):
    file.write_text(TEXT.replace("some/checkpoint", "???"))
    assert load_recipe([f"recipe={file}", "policy.path=here"]).policy.path == "here"


def test_a_recipe_written_as_yaml_is_the_same_recipe(load, file):
    recipe = load("environment.tasks=[0,2]", "reward_args.deep.x=[1]", "optimizer.lr=1e-4")
    again = file.with_name("again.yaml")
    again.write_text(yaml.safe_dump(json.loads(json.dumps(recipe.as_dict()))))
    assert load_recipe([f"recipe={again}"]) == recipe


def test_nothing_can_write_to_a_recipe(load):
    def check(part, path):
        assert type(part).__dataclass_params__.frozen, path
        for f in fields(part):
            if is_dataclass(getattr(part, f.name)):
                check(getattr(part, f.name), f"{path}.{f.name}")

    check(load(), "recipe")


@pytest.mark.parametrize("config", [GRPOOptimizerConfig, GRPOTrainerConfig])
def test_the_defaults_pass_their_own_checks(config):
    config()


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_project_can_be_read(name):
    text = (RECIPES_FOLDER / f"{name}.yaml").read_text()
    assert text.startswith("#"), "its first line says what it is for"
    given = yaml.safe_load(text)
    open_keys = [key for key in STAND_INS if not _is_set(given, key)]
    load_recipe([f"recipe={name}", *(f"{key}={STAND_INS[key]}" for key in open_keys)])


def _is_set(given, key: str) -> bool:
    for part in key.split("."):
        if part not in given:
            return False
        given = given[part]
    return given != "???"


def test_a_recipe_of_the_users_own_builds_on_the_projects(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: [quickstart, profile/two_cores, _self_]\nseed: 4\n")
    recipe = load_recipe([f"recipe={path}"])
    assert recipe == load_recipe(["recipe=quickstart", "seed=4"])
