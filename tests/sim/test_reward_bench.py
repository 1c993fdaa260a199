"""``reward-bench`` from the command line, on the real simulator, with a policy that is no good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from verl_vla.cli import reward_bench
from verl_vla.cli.main import EXIT_USAGE, main
from verl_vla.envs.registry import suite
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.policies.openvla_oft.tiny import TinySizes, build_tiny_policy

pytestmark = pytest.mark.sim

GROUPS, SIZE, LIMIT = 4, 3, 16
REWARDS = ["--rewards", "binary,knn_align", "--reward-args", "knn_align.encoder=pixels"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    statistics = ActionStatistics(q01=[-1.0] * 7, q99=[1.0] * 7, mask=[True] * 6 + [False])
    sizes = TinySizes(image_size=28, vision_width=12, llm_width=16, llm_depth=1, llm_mlp=16)
    instructions = [task.instruction for task in suite("mini").tasks]
    build_tiny_policy(instructions, statistics, sizes=sizes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def words(policy: Path) -> list[str]:
    """A small play of two tasks."""
    sizes = ["--groups", str(GROUPS), "--group-size", str(SIZE), "--step-limit", str(LIMIT)]
    return [
        *("reward-bench", "--policy", str(policy), "--suite", "mini", "--tasks", "0", "1"),
        *(
            *sizes,
            "--render-size",
            "32",
            "--num-slots",
            "4",
            "--num-workers",
            "1",
            "--seed",
            "3",
            *REWARDS,
        ),
    ]


@pytest.fixture(scope="module")
def out(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    assert main([*words, "--out", str(folder)]) == 0
    return folder


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "reward_bench.json").read_text())


def no_simulators(*_: object) -> None:
    raise AssertionError("a simulator was started")


def test_it_leaves_a_record_images_and_episodes(out: Path) -> None:
    found = result(out)
    assert {f.name for f in out.iterdir()} == {
        *("reward_bench.json", "episodes", "progress.png", "reliability.png", "features.png")
    }
    assert found["verdict_rule"]["ranks_failures"].endswith("> 0")
    assert (found["played"]["seed"], found["played"]["group_size"]) == (3, SIZE)
    assert {"commit", "mujoco"} <= found["versions"].keys()
    outcomes = found["outcomes"].values()
    assert sum(task["episodes"] + task["crashes"] for task in outcomes) == GROUPS * SIZE
    assert all(task["step_limit"] == LIMIT for task in outcomes)
    assert found["test"]["groups"] == GROUPS // 2
    assert found["test"]["failures"] + found["test"]["successes"] == GROUPS * SIZE // 2
    assert list(found["table"]) == [
        *("binary", "knn_align", "knn_align, shuffled", "clock", "random", "oracle")
    ]


def test_too_few_groups_are_no_evidence_whatever_they_say(out: Path) -> None:
    oracle = result(out)["table"]["oracle"]
    assert oracle["by_progress"]["spearman"]["value"] == pytest.approx(1.0)
    assert oracle["by_progress"]["spearman"]["ci95"] == [None, None]
    assert oracle["verdict"]["ranks_failures"] is None


def test_the_same_words_again_read_the_episodes_and_say_the_same(
    out: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = result(out)
    monkeypatch.setattr(reward_bench, "open_simulators", no_simulators)
    assert main([*words, "--out", str(out)]) == 0
    after = result(out)
    for label, row in before["table"].items():
        for numbers in (row, after["table"][label]):
            del numbers["seconds_per_episode"]
        assert row == after["table"][label]
    assert before["outcomes"] == after["outcomes"]


def test_recorded_episodes_are_read_from_where_they_are(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_bench, "open_simulators", no_simulators)
    call = ["reward-bench", "--episodes-from", str(out / "episodes"), "--rewards", "binary"]
    assert main([*call, "--seed", "3", "--out", str(tmp_path)]) == 0
    assert result(tmp_path)["played"] == result(out)["played"]
    mine, theirs = (result(folder)["table"]["random"] for folder in (tmp_path, out))
    assert mine["by_progress"] == theirs["by_progress"]
    assert mine["by_progress"]["spearman"]["value"] is not None
    assert not (tmp_path / "features.png").exists()


def test_a_reward_of_videos_gets_them_of_the_same_episodes(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of episodes that were recorded for other rewards, and at two rates."""
    rewards = ["--rewards", "a=srpo_released,b=srpo", "--reward-args", "a.encoder=pixels"]
    call = ["reward-bench", "--episodes-from", str(out / "episodes"), "--num-workers", "1"]
    call += [*rewards, "b.encoder=pixels", "b.video_every=3", "--seed", "3", "--out", str(tmp_path)]
    assert main(call) == 0
    table = result(tmp_path)["table"]
    assert {"a", "a, shuffled", "b", "b, shuffled"} <= table.keys()
    assert table["a"]["statuses"] and table["b"]["feature_bytes_per_episode"] > 0
    folders = {"every_1_frames_all": LIMIT + 1, "every_3_frames_64": 1 + 5 + 1}
    assert {folder.name for folder in (tmp_path / "videos").iterdir()} == folders.keys()
    played = np.load(out / "episodes" / "round_0000.npz")
    steps = played["Episodes.num_steps"]
    for name, longest in folders.items():
        filmed = np.load(tmp_path / "videos" / name / "round_0000.npz")
        assert np.array_equal(filmed["Episodes.episode_id"], played["Episodes.episode_id"])
        shapes = filmed["videos.shape"]
        assert (shapes[:, 1:] == (32, 32, 3)).all()
        assert (shapes[steps == LIMIT, 0] == longest).all() and (steps == LIMIT).any()
        assert not np.array_equal(filmed["videos"][:3072], filmed["videos"][-3072:])
    # again: the videos are there
    monkeypatch.setattr(reward_bench, "open_simulators", no_simulators)
    assert main(call) == 0
    assert result(tmp_path)["table"]["b"]["by_progress"] == table["b"]["by_progress"]


def test_a_stopped_play_goes_on_and_the_rule_stood_there_before(
    words: list[str], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as stopped:
        stopped.setattr(reward_bench, "open_simulators", no_simulators)
        with pytest.raises(AssertionError, match="a simulator was started"):
            main([*words, "--out", str(tmp_path)])
    assert result(tmp_path)["verdict_rule"] == result(out)["verdict_rule"]
    assert "table" not in result(tmp_path)
    assert main([*words, "--out", str(tmp_path)]) == 0
    first, second = (np.load(f / "episodes" / "round_0000.npz") for f in (out, tmp_path))
    assert set(first.files) == set(second.files)
    assert all(np.array_equal(first[name], second[name]) for name in first.files)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--seed", "4"], "holds other episodes (seed: 3 -> 4)"),
        (["--groups", "3"], "groups is 3 for 2 tasks"),
        (["--step-limit", "soon"], "step_limit"),
        (["--render-size", "20"], "render at least that large"),
        (["--num-workers", "0"], "--num-workers is 0"),
        (["--policy", "nowhere"], "there is no config.json"),
        (
            ["--episodes-from", "somewhere"],
            "would say what is played, but --episodes-from names what was",
        ),
        (["--rewards", "knn_aling"], "did you mean 'knn_align'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_played(
    changed: list[str],
    message: str,
    words: list[str],
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reward_bench, "open_simulators", no_simulators)
    call = words if "--rewards" not in changed else words[: -len(REWARDS)]
    assert main([*call, "--out", str(out), *changed]) == EXIT_USAGE
    assert message in capsys.readouterr().err
