"""Paths that no file can have, or that may not be looked at: refused, with code 2 and in short."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
import yaml
from report_world import make_run

from verl_vla.cli.main import EXIT_USAGE, main
from verl_vla.runs.run_dir import evaluation_file

WORDS = {
    "eval --policy": "eval --policy PATH --suite mini --out out",
    "eval --out": "eval --policy bases/mini --suite mini --out PATH",
    "eval --suite": "eval --policy bases/mini --suite PATH --out out",
    "compare A": "compare PATH PATH",
    "replay": "replay PATH --episode 1",
    "report": "report PATH",
    "dashboard": "dashboard PATH",
    "doctor --policy": "doctor --policy PATH",
    "doctor --json": "doctor --libero --json PATH",
    "check-suite --out": "check-suite --suite mini --out PATH",
    "demos --out": "demos --tasks 0 --episodes-per-task 1 --out PATH",
    "demos --suite": "demos --suite PATH --out out",
    "new-policy --language": "new-policy --language PATH --vision v --demos d --out out",
    "new-policy --demos": "new-policy --language l --vision v --demos PATH --out out",
    "new-policy --out": "new-policy --language l --vision v --demos d --out PATH",
    "convert SOURCE": "convert PATH out",
    "convert --base": "convert bases/mini out --base PATH",
    "reward-bench --rewards": "reward-bench --rewards PATH --out out",
    "reward-bench --out": "reward-bench --rewards binary --groups 14 --out PATH",
    "reward-bench --episodes-from": "reward-bench --rewards binary --out o --episodes-from PATH",
    "soak --policy": "soak --policy PATH --out out",
    "train recipe": "train recipe=PATH",
    "train out": "train recipe=quickstart out=PATH",
    "train policy": "train recipe=quickstart policy.path=PATH",
    "train suite": "train recipe=quickstart environment.suite=PATH.py:Suite",
    "train reward": "train recipe=quickstart reward=PATH.py:Reward",
    "sft demos": "sft recipe=sft_mini demos.folder=PATH",
    "sft out": "sft recipe=sft_mini out=PATH",
    "plan policy": "plan recipe=quickstart policy.path=PATH",
    "explain recipe": "explain recipe=PATH",
}
PATHS = {
    "a long name": "x" * 5000,
    "long folders": "ab/" * 2000,
    "a name that is too long for a file": "y" * 300,
    "a NUL": "a\0b",
}
MOST_SHOWN = 1500
"""Characters of a message that still can be read."""


def refusal(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> str:
    # whatever gets so far has accepted the path
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: pytest.fail("served"))
    assert main(words) == EXIT_USAGE
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert len(said) < MOST_SHOWN
    return said


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("command", WORDS.values(), ids=WORDS)
def test_a_path_that_no_file_can_have_is_refused(
    command: str,
    path: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    refusal([word.replace("PATH", path) for word in command.split()], capsys, monkeypatch)
    assert list(tmp_path.iterdir()) == []


def test_a_nul_in_a_recipe_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"defaults": ["quickstart"], "reward_args": {"x": ["a\0b"]}}))
    said = refusal(["train", f"recipe={recipe}"], capsys, monkeypatch)
    assert "reward_args.x[0] is 'a\\x00b'" in said


def test_a_folder_that_may_not_be_entered_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    # whoever runs as root may enter everything
    monkeypatch.setattr(Path, "stat", refuse)
    said = refusal(["report", str(tmp_path / "run")], capsys, monkeypatch)
    assert f"{tmp_path / 'run' / 'recipe.yaml'} cannot be read or written" in said
    assert "Permission denied" in said


def test_an_error_of_another_kind_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> bool:
        raise OSError(errno.EIO, "Input/output error", "disk")

    monkeypatch.setattr(Path, "is_file", fail)
    with pytest.raises(OSError, match="Input/output error"):
        main(["report", "run"])


@pytest.fixture
def evaluation(tmp_path: Path) -> str:
    make_run(tmp_path / "run")
    return str(evaluation_file(tmp_path / "run", 3))


@pytest.mark.parametrize("out", ["no/such/x.json", "."])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    out: str,
    evaluation: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = str(tmp_path / out)
    for words in (
        ["compare", evaluation, evaluation, "--out", place],
        ["soak", "--out", place],
        ["check-suite", "--suite", "mini", "--out", place],
    ):
        assert f"--out is {Path(place)}" in refusal(words, capsys, monkeypatch)
    assert main(["compare", evaluation, evaluation, "--out", str(tmp_path / "x.json")]) == 0
    assert "all tasks" in (tmp_path / "x.json").read_text()


@pytest.mark.parametrize("name", ["", "x.txt", "x"])
def test_a_video_is_a_file_of_a_kind_that_can_be_written(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("verl_vla.cli.replay.read_episode", lambda *_: ({"suite": "mini"}, {}))
    monkeypatch.setattr("verl_vla.cli.replay.replay", lambda *_: pytest.fail("replayed"))
    words = ["replay", str(tmp_path), "--episode", "1", "--out", str(tmp_path / name)]
    assert "name a file that ends in .mp4" in refusal(words, capsys, monkeypatch)


@pytest.mark.parametrize("limit", ["\N{SUPERSCRIPT TWO}", "\u0663", "1" * 5000, "-1", "1.0", ""])
@pytest.mark.parametrize(
    "command",
    ["eval --policy bases/mini --suite mini --out", "reward-bench --rewards binary --out"],
)
def test_a_step_limit_is_a_number_in_digits(
    command: str,
    limit: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [*command.split(), str(tmp_path / "out"), f"--step-limit={limit}"]
    assert re.match("error: (--)?step.limit (is|has) ", refusal(words, capsys, monkeypatch))
