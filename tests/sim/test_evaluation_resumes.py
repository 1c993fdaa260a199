"""An evaluation that is killed again and again ends as one that never was."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import imageio.v3 as imageio
import pytest

from verl_vla.cli import eval as eval_verb
from verl_vla.cli import replay as replay_verb
from verl_vla.cli.arguments import parse
from verl_vla.core.episode import Outcome
from verl_vla.core.errors import ConfigError
from verl_vla.core.files import folder_lock
from verl_vla.evaluation.compare import RESULT
from verl_vla.runs.episode_log import actions_of, read_episodes
from verl_vla.runs.replay import read_episode, replay
from verl_vla.runs.video import HOLD_FRAMES

pytestmark = pytest.mark.sim

EPISODES = 10
LIMIT_S = 300
# a fork has everything imported already; a fresh process would need ten seconds of a core for it
FORK = multiprocessing.get_context("fork")


def words(out: Path, *more: str) -> list[str]:
    return [
        *("--policy", "bases/mini", "--suite", "mini", "--tasks", "0"),
        *("--episodes-per-task", str(EPISODES), "--temperature", "0.8", "--seed", "3"),
        *("--num-slots", "4", "--num-workers", "1", "--out", str(out), *more),
    ]


def play(out: Path) -> None:
    process = FORK.Process(target=eval_verb.run, args=(parse("eval", words(out)),))
    process.start()
    process.join(LIMIT_S)
    assert process.exitcode == 0


def kill_after(out: Path, num_fresh: int) -> None:
    """Start it, and kill it without warning once so many more episodes have ended."""
    wanted = len(read_episodes(out)) + num_fresh
    process = FORK.Process(target=eval_verb.run, args=(parse("eval", words(out)),))
    process.start()
    deadline = time.monotonic() + LIMIT_S
    while len(read_episodes(out)) < wanted:
        assert process.is_alive()
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (out / RESULT).exists()


def result(out: Path) -> dict:
    record = json.loads((out / RESULT).read_text())
    assert record.pop("time")["wall_s"] > 0
    return record


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    play(out)
    return out


def test_three_kills_change_nothing(undisturbed: Path, tmp_path: Path) -> None:
    for num_fresh in (1, 2, 3):
        kill_after(tmp_path, num_fresh)
    play(tmp_path)
    assert result(tmp_path) == result(undisturbed)
    for out in (tmp_path, undisturbed):
        assert sorted(line["episode"] for line in read_episodes(out)) == list(range(EPISODES))
    outcomes = {line["outcome"] for line in read_episodes(tmp_path)}
    assert outcomes == {Outcome.SUCCESS, Outcome.TIMEOUT}, "equal outcomes would prove little"


def test_the_record_says_what_decides_whether_it_compares(undisturbed: Path) -> None:
    record = result(undisturbed)
    assert record["states"] == "held_out"
    assert record["sampling"] == "temperature 0.8"
    assert record["renderer"].startswith(("egl, ", "osmesa, "))
    assert record["assets"] is None
    assert set(record["simulation"]) == {"mujoco", "robosuite", "hf-libero"}
    assert record["versions"]["commit"]
    assert len(record["policy"]["fingerprint"]) == 16
    assert record["total"]["episodes"] == EPISODES == len(record["episodes"])


def test_every_action_is_kept(undisturbed: Path) -> None:
    for line in read_episodes(undisturbed):
        actions = actions_of(line)
        assert len(actions) == len(line["executed"]) == len(line["progress"]) - 1
        assert sum(line["executed"]) == line["steps"]


def test_another_evaluation_in_the_same_folder_is_refused(undisturbed: Path) -> None:
    with pytest.raises(ConfigError, match=r"step_limits.*48 -> 20.*choose another folder"):
        eval_verb.run(parse("eval", words(undisturbed, "--step-limit", "20")))


def test_two_evaluations_do_not_share_a_folder(undisturbed: Path) -> None:
    with folder_lock(undisturbed), pytest.raises(ConfigError, match=f"in use by.*{os.getpid()}"):
        eval_verb.run(parse("eval", words(undisturbed)))


def test_an_episode_is_filmed_as_it_was_played(undisturbed: Path, tmp_path: Path) -> None:
    lines = read_episodes(undisturbed)
    shortest = min(lines, key=lambda line: line["steps"])
    video = tmp_path / "video.mp4"
    words = [str(undisturbed), "--episode", str(shortest["episode"]), "--out", str(video)]
    assert replay_verb.run(parse("replay", words)) == 0
    assert len(imageio.imread(video)) == shortest["steps"] + 1 + HOLD_FRAMES


def test_an_episode_that_this_machine_plays_otherwise_is_not_filmed(undisturbed: Path) -> None:
    header, line = read_episode(undisturbed, read_episodes(undisturbed)[0]["episode"])
    with pytest.raises(ConfigError, match="simulates otherwise: compare the versions of mujoco"):
        replay(header, line | {"executed": line["executed"][:1]})


def test_an_episode_that_was_not_played_is_refused(undisturbed: Path) -> None:
    with pytest.raises(ConfigError, match="--episode is 99, but it was not played; the last that"):
        read_episode(undisturbed, 99)
