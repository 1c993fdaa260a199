"""Recipes and words that no computer could follow: refused at once, within time and memory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from verl_vla.cli.arguments import COMMANDS, parse
from verl_vla.cli.main import EXIT_USAGE, main
from verl_vla.cli.options import BOUNDS
from verl_vla.config.choices import MOST_SEED
from verl_vla.config.compose import RECIPES_FOLDER, compose_recipe, load_recipe
from verl_vla.config.grpo import Recipe
from verl_vla.config.plain_values import LONGEST
from verl_vla.config.schema import parse as parse_values
from verl_vla.core.errors import ConfigError
from verl_vla.core.yaml_files import DEEPEST, MOST_VALUES, parse_yaml
from verl_vla.rewards.benchmark.entries import read_rewards

QUICKSTART = "defaults: [quickstart, _self_]\n"


def bomb(doublings: int) -> str:
    """A billion values in a few lines, each of which repeats the one before."""
    lines = [
        "a0: &a0 [1, 1]",
        *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, doublings)),
    ]
    return "\n".join(lines) + "\n"


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


FILES = {
    "alias bomb": (bomb(30), f"it stands for more than {MOST_VALUES:,} values"),
    "alias bomb in a reward's arguments": (
        QUICKSTART + "reward_args:\n  " + bomb(30).replace("\n", "\n  "),
        f"it stands for more than {MOST_VALUES:,} values",
    ),
    "alias of itself": ("seed: &x [*x]\n", "stands before the end of its anchor"),
    "deep lists": (f"seed: {nested(200)}\n", f"more than {DEEPEST} deep"),
    "deep lists by aliases": (
        "\n".join(["a0: &a0 []", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 99))]),
        f"more than {DEEPEST} deep",
    ),
    "a long number": (f"{QUICKSTART}seed: {'9' * 5000}\n", "4300 digits"),
    "a long hexadecimal number": (
        f"{QUICKSTART}seed: 0x{'f' * 5000}\n",
        "seed is a whole number of 20000 bits",
    ),
    "a word": ("seed", "is 'seed', and no options; correct the file"),
    "a number": ("1", "is 1, and no options; correct the file"),
    "no default": ("defaults: [null]\n", "Unsupported type in defaults : NoneType"),
    "a default without a name": (
        "defaults: [{1: a}]\n",
        "has the group 1; write its name in quotes",
    ),
    "a file that builds on itself": ("defaults: [mine, _self_]\n", "recursion"),
    "bytes": (
        f"{QUICKSTART}reward_args: {{a: !!binary aGk=}}\n",
        "reward_args.a is b'hi', a bytes",
    ),
    "NUL": (f'{QUICKSTART}out: "a\\0b"\n', "out is 'a\\x00b', and no file or name can have a NUL"),
    "a long text": (
        f"{QUICKSTART}out: {'a' * (LONGEST + 1)}\n",
        "out is a text of 10,001 characters; set one of at most 10,000",
    ),
}


@pytest.mark.parametrize(("text", "message"), FILES.values(), ids=FILES)
@pytest.mark.filterwarnings("ignore:.*_self_.*:UserWarning")
def test_a_file_out_of_bounds_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe([f"recipe={file}"])
    assert message in str(caught.value)


def test_a_file_that_a_recipe_builds_on_is_read_within_bounds_too(tmp_path: Path) -> None:
    (tmp_path / "robot").mkdir()
    (tmp_path / "robot" / "panda.yaml").write_text("defaults: [arm]\n")
    (tmp_path / "robot" / "arm.yaml").write_text(bomb(30))
    file = tmp_path / "mine.yaml"
    file.write_text("defaults: [quickstart, override robot@_global_: panda, _self_]\n")
    with pytest.raises(ConfigError, match=r"robot/arm\.yaml: it stands for more than"):
        load_recipe([f"recipe={file}"])


def test_aliases_within_bounds_are_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"{QUICKSTART}reward_args: {{a: &a [1, 2], b: [*a, *a]}}\n")
    values = compose_recipe([f"recipe={file}"], RECIPES_FOLDER).values
    assert values["reward_args"] == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


@pytest.mark.parametrize("name", ["seed", "1", "suite", "a b,c'd"])
def test_a_recipe_may_have_any_name(tmp_path: Path, name: str) -> None:
    file = tmp_path / f"{name}.yaml"
    file.write_text(f"{QUICKSTART}seed: 3\n")
    assert load_recipe([f"recipe={file}", "trainer.save_every=7"]).seed == 3


WORDS = {
    f"seed={'9' * 5000}": "digits",
    f"environment.tasks={nested(200)}": f"brackets up to 200 deep; write at most {LONGEST:,}",
    f"environment.tasks={nested(DEEPEST)}": f"more than {DEEPEST} deep",
    "reward_args.a=inf": "reward_args.a is inf, which no check can compare; set a number",
    "reward_args.a=[0,nan]": "reward_args.a[1] is nan",
    "verl.a.b=-inf": "verl.a.b is -inf",
    "seed=2147483648": "seed is 2147483648; it should be less than or equal to 2147483647",
    "reward_args.a=99999999999999999999": "reward_args.a is a whole number of 67 bits",
    "sampling.group_size=1000000000": "a step has at most 1,000,000 episodes, so set less",
    "environment.render_size=1000000": "environment.render_size is 1000000; it should be less",
    "environment.num_workers=100000": "environment.num_workers is 100000; it should be less",
    "environment.num_slots=10000000": "environment.num_slots is 10000000; it should be less",
    "cluster.ranks_per_node=100000": "cluster.ranks_per_node is 100000; it should be less",
    "cold_start.episodes=10000000": "cold_start.episodes is 10000000; set 1 to 1,000,000",
    "reward_args.a=${reward_args.a}": "recipe 'quickstart' cannot be composed: ",
}


@pytest.mark.parametrize(("word", "message"), WORDS.items(), ids=[w[:40] for w in WORDS])
def test_a_word_out_of_bounds_is_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(["recipe=quickstart", word])
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_values_that_hold_each_other_are_refused() -> None:
    values: dict[str, Any] = {}
    values["reward_args"] = values
    with pytest.raises(ConfigError, match=f"more than {DEEPEST} deep; write it flatter"):
        parse_values(Recipe, values)


@pytest.mark.parametrize("value", ["[", "!!timestamp x", "2020-13-45", "*a", "9" * 5000, bomb(30)])
def test_an_argument_of_a_reward_that_is_no_yaml_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"--reward-args binary\.x="):
        read_rewards("binary", [f"binary.x={value}"])
    with pytest.raises(ConfigError, match=r"^here: "):
        parse_yaml(value, "here", "correct it")


def test_a_file_of_rewards_is_read_within_bounds(tmp_path: Path) -> None:
    file = tmp_path / "rewards.yaml"
    for text in (bomb(30), "[", "\xff", "a: !!timestamp x"):
        file.write_text(text, encoding="latin1")
        with pytest.raises(ConfigError, match=r"rewards\.yaml"):
            read_rewards(str(file), [])


def option_of(command: str, name: str) -> list[str]:
    """The command's required arguments, and an option that is to be set."""
    parser = argparse.ArgumentParser()
    COMMANDS[command](parser)
    words = ["x" for action in parser._get_positional_actions() if action.nargs is None]
    for action in parser._get_optional_actions():
        if action.required and action.dest != name:
            words += [action.option_strings[0], "1"]
    return [*words, f"--{name.replace('_', '-')}"]


NUMBERS = [
    (command, action.dest, action.type)
    for command, add_arguments in COMMANDS.items()
    for parser in [argparse.ArgumentParser()]
    for _ in [add_arguments(parser)]
    for action in parser._actions
    if action.type in (int, float)
]


@pytest.mark.parametrize(
    ("command", "name", "kind"), NUMBERS, ids=[f"{command} {name}" for command, name, _ in NUMBERS]
)
def test_every_number_of_every_command_has_bounds(
    command: str, name: str, kind: type[int] | type[float]
) -> None:
    wrong = ["nan", "inf", "-inf"] if kind is float else [str(2**31), str(-(2**31))]
    if name in BOUNDS:
        wrong += [str(BOUNDS[name].least - 1), str(BOUNDS[name].most + 1)]
    for value in wrong:
        words = option_of(command, name)
        with pytest.raises(ConfigError, match=rf"^--{words[-1][2:]} is {value}"):
            parse(command, [*words[:-1], f"{words[-1]}={value}"])


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "--policy", "x", "--suite", "mini", "--out", "y", "--seed", "-1"],
        ["eval", "--policy", "x", "--suite", "mini", "--out", "y", "--temperature", "nan"],
        ["demos", "--out", "x", "--num-workers", "100000"],
        ["demos", "--out", "x", "--render-size", "1000000"],
        ["reward-bench", "--rewards", "binary", "--out", "x", "--step-limit", "²"],
        ["bench", "images", "--batch", "99999999999"],
        ["bench", "images", "--keep", "no/such/folder/x.json"],
        ["bench", "rollout", "--processes", "100000"],
        ["report", "a" * 300],
        ["report", "a" * 5000],
        ["eval", "--policy", "a" * 300, "--suite", "mini", "--out", "x"],
        ["train", "recipe=quickstart", f"out={'a' * 300}"],
        ["train", "recipe=quickstart", f"reward={'a' * 300}.py:X"],
        ["train", f"recipe={'a' * 300}.yaml"],
    ],
    ids=lambda words: " ".join(words)[:60],
)
def test_words_out_of_bounds_end_a_command_with_one_message(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == EXIT_USAGE
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert len(said) < 1000


def test_the_largest_seed_is_one_that_is_taken() -> None:
    assert load_recipe(["recipe=quickstart", f"seed={MOST_SEED}"]).seed == MOST_SEED
