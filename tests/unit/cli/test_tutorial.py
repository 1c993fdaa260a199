"""docs/tutorial.md: its commands are understood, and its reward scores."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from planted_world import make_batch

from verl_vla.cli.arguments import COMMANDS, parse
from verl_vla.cli.main import main
from verl_vla.config.compose import load_recipe
from verl_vla.rewards import complete, judge, load_reward

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "tutorial.md"
TEXT = PAGE.read_text()
MAX_REWARD_LINES = 20


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """The lines of the bash blocks, each joined where it continues and cut at a pipe."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line.split(" | ")[0], comments=True) for line in lines]


def test_every_line_is_a_command_or_a_script() -> None:
    for program, *words in commands():
        if program.startswith("./"):
            assert (ROOT / program).is_file()
        elif program != "source":
            assert program == "verl-vla"
            assert words[0] in COMMANDS


@pytest.mark.parametrize("words", [w[1:] for w in commands() if w[0] == "verl-vla"], ids=" ".join)
def test_a_command_is_understood(words: list[str]) -> None:
    options = vars(parse(words[0], words[1:]))
    # only doctor does without a recipe
    if "overrides" in options and (words[0] != "doctor" or options["overrides"]):
        load_recipe(options["overrides"])


def test_the_launcher_gets_options_of_its_recipe() -> None:
    (words,) = (words for words in commands() if words[0].endswith("train_8gpu.sh"))
    load_recipe(["recipe=libero", "profile=8gpu", *words[1:]])


def test_the_reward_of_the_page_ranks_failures_by_what_they_changed(tmp_path: Path) -> None:
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= MAX_REWARD_LINES
    (tmp_path / "stirred.py").write_text(code)
    reward = load_reward(f"{tmp_path / 'stirred.py'}:StirredReward", {"alpha": 0.2})
    still = np.zeros((3, 1, 8, 8, 3), np.uint8)
    half, whole = still.copy(), still.copy()
    half[-1, :, :4], whole[-1] = 255, 255
    batch = make_batch([1, 0.5, 0.5, 0.5], frames=(still, still, half, whole))
    result = judge(reward, complete(reward, batch))
    np.testing.assert_allclose(result.score, [1.0, 0.0, 0.1, 0.2], atol=1e-6)
    np.testing.assert_allclose(result.progress, [0.0, 0.0, 0.5, 1.0], atol=1e-6)


def test_explain_says_what_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = (words for words in commands() if words[1:2] == ["explain"])
    assert main(words[1:]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "yaml" in line]
    shown = next(block for block in blocks("text") if "[libero.yaml]" in block)
    assert shown.splitlines() == said


def test_every_page_that_it_names_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)", TEXT)
    assert links and all((PAGE.parent / link).is_file() for link in links)
    assert set(re.findall(r"^```(\w*)$", TEXT, re.MULTILINE)) == {"", "bash", "python", "text"}
