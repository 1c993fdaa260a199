"""What a benchmark says beside its number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl_vla.cli import bench
from verl_vla.cli.arguments import parse
from verl_vla.core.errors import ConfigError

SMALL = ["images", "--render-size", "32", "--image-size", "28", "--batch", "2", "--rounds", "3"]


def test_the_images_are_counted_and_the_conditions_stand_beside(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bench.run(parse("bench", SMALL)) == 0
    *table, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    low, high = record["images_per_core_second_range"]
    assert 0 < low <= record["images_per_core_second"] <= high
    assert (record["render_size"], record["image_size"], record["threads"]) == (32, 28, 1)
    assert {"simplejpeg", "scipy"} <= record["versions"].keys()
    assert {"python", "machine", "commit", "load_average_at_end"} <= record["conditions"].keys()
    assert [line.split()[0] for line in table] == list(record)


@pytest.mark.parametrize("option", ["--batch", "--rounds", "--render-size", "--image-size"])
def test_nothing_to_measure_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} is 0; set at least 1"):
        bench.run(parse("bench", [*SMALL, option, "0"]))


def test_a_part_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.run(parse("bench", []))
    assert "PART" in capsys.readouterr().err


MADE_UP = {
    "driver": "groups",
    "images": "render-size",
    "gpu": "batch",
    "step": "pairs",
}
"""Benchmarks without suite and policy, and an option of each."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was started: nothing may be."""
    begun: list[str] = []
    monkeypatch.setattr(
        "verl_vla.envs.pool.env_pool.EnvPool.__init__", lambda *_, **__: begun.append("pool")
    )
    monkeypatch.setattr(
        "multiprocessing.process.BaseProcess.start", lambda _: begun.append("process")
    )
    monkeypatch.setattr("subprocess.run", lambda *_, **__: begun.append("command"))
    return begun


def refused(words: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        bench.run(parse("bench", words))
    return str(caught.value)


@pytest.mark.parametrize("part", ["env", "video", "memory", "pool", "rollout"])
def test_missing_assets_are_refused_before_anything_starts(
    part: str, started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VERL_VLA_LIBERO_ASSETS", str(tmp_path / "nothing"))
    assert "VERL_VLA_LIBERO_ASSETS=" in refused([part, "--suite", "libero_spatial"])
    assert not started


@pytest.mark.parametrize("part", ["env", "video", "pool", "rollout"])
def test_a_task_that_does_not_exist_is_refused(part: str, started: list[str]) -> None:
    assert "task 99 is not in mini" in refused([part, "--suite", "mini", "--task", "99"])
    assert not started


@pytest.mark.parametrize("part", ["pool", "rollout", "update"])
def test_a_policy_that_cannot_play_is_refused(
    part: str, started: list[str], tmp_path: Path
) -> None:
    assert "there is no config.json in" in refused([part, "--policy", str(tmp_path)])
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refused([part, "--policy", str(tmp_path)])
    assert not started


@pytest.mark.parametrize("part", list(MADE_UP))
def test_sizes_out_of_bounds_are_refused(part: str, started: list[str]) -> None:
    assert "; set at least 1" in refused([part, f"--{MADE_UP[part]}", "0"])
    assert "; set at most" in refused([part, f"--{MADE_UP[part]}", "9999999999"])
    assert not started


def test_a_device_that_is_absent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--device is cuda, but torch finds none" in refused(["gpu"])


def test_a_page_without_its_files_is_refused(tmp_path: Path) -> None:
    assert "benchmarks.md is absent" in refused(["page", "--docs", str(tmp_path)])
    (tmp_path / "benchmarks.md").write_text("")
    (tmp_path / "benchmarks").mkdir()
    for content, said in (("{", "it is no JSON"), ("[]", "it is []"), ("{}", "command is missing")):
        (tmp_path / "benchmarks" / "x.json").write_text(content)
        assert said in refused(["page", "--docs", str(tmp_path)])


def test_a_commit_that_is_none_is_refused() -> None:
    assert "git worktree add" in refused(["step", "--against", "no-such-commit"])
