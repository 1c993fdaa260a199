"""Rewards that end the process, write where they may not, or answer with no numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from step_tables import episode_column, step_tables

from verl_vla.core.errors import ConfigError, RewardError
from verl_vla.core.plugins import PluginExit, import_file, without_exits
from verl_vla.rewards import RewardResult, load_reward, score
from verl_vla.rewards.scoring import MOST_NEGATIVE

MINE = """
import os
import sys
import numpy as np
from verl_vla.rewards import RewardResult

class Mine:
    requires = frozenset()
    def __init__(self):
        IN_INIT
    def __call__(self, batch):
        IN_CALL
        ones = np.ones(len(batch), dtype=np.float32)
        return RewardResult(score=ones, progress=ones, status=("ok",) * len(batch))
    def update(self, batch): return {}
    def state_dict(self): return {}
    def load_state_dict(self, state): pass
"""
EXITS = ["exit(0)", "sys.exit()", "os._exit(0)", "raise SystemExit(3)", "quit()"]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def plugin(*, at_import: str = "pass", in_init: str = "pass", in_call: str = "pass") -> str:
        file = tmp_path / "mine.py"
        source = MINE.replace("IN_INIT", in_init).replace("IN_CALL", in_call)
        file.write_text(f"import os, sys\n{at_import}\n{source}")
        return f"{file}:Mine"

    return plugin


class Plain:
    """A reward that is right."""

    requires: frozenset[str] = frozenset()
    answer: Any = None
    column: str | None = None
    """Column of the batch to write to."""

    def __call__(self, batch: Any) -> RewardResult:
        if self.column is not None:
            getattr(batch, self.column)[...] = 0
        ones = np.ones(len(batch), dtype=np.float32)
        answer = ones if self.answer is None else self.answer
        return RewardResult(score=answer, progress=ones, status=("ok",) * len(batch))

    def update(self, batch: Any) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def ask(reward: Any) -> None:
    episode, _ = episode_column([2, 1, 1])
    played = step_tables(
        [5, 5, 6],
        episode,
        image=torch.zeros(4, 1, 2, 2, 3, dtype=torch.uint8),
        action_tokens=torch.zeros(4, 2, dtype=torch.int64),
        log_probs=torch.zeros(4, 2),
        executed=torch.ones(4, dtype=torch.int64),
        prompt_ids=[torch.arange(3)] * 4,
    )
    score(reward, played, suite="mini", split="train", mirrored=False)


@pytest.mark.parametrize("way", EXITS)
def test_a_file_that_ends_the_process_is_named_with_its_line(
    write: Callable[..., str], way: str
) -> None:
    name = write(at_import=way)
    with pytest.raises(ConfigError, match=r"mine\.py cannot be imported: .*it called .*line 2\)"):
        load_reward(name, {})


@pytest.mark.parametrize("way", EXITS)
def test_a_constructor_that_ends_the_process_is_named(write: Callable[..., str], way: str) -> None:
    with pytest.raises(ConfigError, match=r"could not be made .*it called .*mine\.py, line 12\)"):
        load_reward(write(in_init=way), {})


@pytest.mark.parametrize("way", EXITS)
def test_a_reward_that_ends_the_process_is_refused_as_one_that_raises(
    write: Callable[..., str], way: str
) -> None:
    reward = load_reward(write(in_call=way), {})
    with pytest.raises(RewardError, match=r"Mine raised PluginExit.*mine\.py, line 14\); correct"):
        ask(reward)


def test_outside_of_a_plugin_a_process_can_end_as_ever() -> None:
    real = os._exit
    with pytest.raises(PluginExit), without_exits():
        os._exit(0)
    assert os._exit is real
    program = (
        "import os\n"
        "from verl_vla.core.plugins import without_exits\n"
        "with without_exits(): pass\n"
        "os._exit(5)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 5


def test_the_line_of_an_ordinary_error_is_told_too(
    write: Callable[..., str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"ZeroDivisionError.*mine\.py, line 2\)"):
        load_reward(write(at_import="1 / 0"), {})
    with pytest.raises(RewardError, match=r"KeyError.*mine\.py, line 14\)"):
        ask(load_reward(write(in_call="{}['a']"), {}))
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:")
    with pytest.raises(ConfigError, match=r"broken\.py cannot be imported: SyntaxError"):
        import_file(broken)


@pytest.mark.parametrize("requires", [["frames"], None, {1}, "frames", ("frames",), {"frames": 1}])
def test_inputs_that_are_no_set_of_names_are_refused(
    write: Callable[..., str], requires: Any
) -> None:
    name = write()
    file = Path(name.removesuffix(":Mine"))
    file.write_text(file.read_text().replace("requires = frozenset()", f"requires = {requires!r}"))
    with pytest.raises(ConfigError, match=r"has requires = .*set a frozenset of names"):
        load_reward(name, {})


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (np.array(["a", "b", "c"]), "scores of dtype <U1"),
        (np.array([1.0, None, 0.0], dtype=object), "scores of dtype object"),
        (np.array([1j, 0, 0]), "scores of dtype complex128"),
        (np.array([-3e38, 0, 0], dtype=np.float32), r"returned -3e\+38 for episode 0"),
    ],
)
def test_scores_that_are_no_numbers_are_refused(answer: Any, said: str) -> None:
    reward = Plain()
    reward.answer = answer
    with pytest.raises(RewardError, match=said):
        ask(reward)


def test_a_penalty_may_be_large() -> None:
    reward = Plain()
    reward.answer = np.array([-MOST_NEGATIVE, 0.0, 1.0], dtype=np.float32)
    ask(reward)


@pytest.mark.parametrize("column", ["success", "num_steps", "group_id", "episode_id"])
def test_a_reward_cannot_change_what_is_trained_on(column: str) -> None:
    reward = Plain()
    reward.column = column
    with pytest.raises(RewardError, match="read-only"):
        ask(reward)
