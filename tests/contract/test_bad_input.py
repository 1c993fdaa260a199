"""Whatever is wrong is said before anything starts: value, reason and remedy, and exit code 2."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from verl_vla.cli.main import EXIT_USAGE, main
from verl_vla.core.files import PROJECT_FOLDER

BASE = PROJECT_FOLDER / "bases" / "mini"


def refused(words: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a training command that must be refused, and return what it said."""
    code = main(["train", *words, f"out='{out}'"])
    assert code == EXIT_USAGE
    assert not out.exists(), "a run folder was made for a recipe that cannot be"
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sampling.grup_size=4"], "did you mean 'sampling.group_size'?"),
        (["environment.suite=minni"], "did you mean 'mini'?"),
        (["environment.tasks=[0,17]"], "has 17, but suite 'mini' has tasks 0 to 6"),
        (["sampling.group_size=1"], "group_size is 1; GRPO compares episodes within a group"),
        (["environment.render_size=64"], "the policy sees images of 112 px; render at least"),
        (["environment.step_limit=soon"], "environment.step_limit is 'soon'"),
        (["environment.step_limit=0"], "step_limit is 0"),
        (["reward=binry"], "did you mean 'binary'?"),
        (["reward_args.alpha=1"], "reward 'binary' has no argument 'alpha'"),
        (["policy.path=nowhere"], "policy.path is 'nowhere', but there is no config.json"),
        (["policy.unnorm_key=bridge"], "bridge"),
        (["evaluation.episodes_per_task=51"], "has 50 held_out init states; set at most that"),
        (["loss.clip.high=1.5"], "loss.clip.high is 1.5"),
        (["seed=one"], "seed is 'one'; it must be int"),
        (["sampling"], "'sampling' is no key=value"),
    ],
)
def test_a_wrong_knob_is_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(["recipe=quickstart", *words], tmp_path / "run", capsys)


def test_an_unknown_recipe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["recipe=quikstart"], tmp_path / "run", capsys)
    assert "did you mean 'quickstart'?" in said


def test_a_checkpoint_without_statistics_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(BASE, folder)
    (folder / "dataset_statistics.json").unlink()
    said = refused(["recipe=quickstart", f"policy.path='{folder}'"], tmp_path / "run", capsys)
    assert "dataset_statistics.json" in said
    assert str(folder) in said


def test_missing_assets_are_refused_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VERL_VLA_LIBERO_ASSETS", str(tmp_path / "nothing"))
    said = refused(["recipe=libero_spatial_tiny"], tmp_path / "run", capsys)
    assert "VERL_VLA_LIBERO_ASSETS" in said
    assert "nothing" in said


def test_words_that_a_policy_does_not_know_are_refused_before_the_first_episode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = shutil.copytree(PROJECT_FOLDER / "bases" / "libero_spatial", tmp_path / "policy")
    tokenizer = json.loads((policy / "tokenizer.json").read_text())
    pieces = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {  # it cannot spell "lift", a word of the perturbed sentences
        piece: index for piece, index in pieces.items() if piece not in ("lift", "l")
    }
    (policy / "tokenizer.json").write_text(json.dumps(tokenizer))
    command = shlex.split(f"eval --policy {policy} --suite libero_spatial --tasks 0 2")
    perturbed = shlex.split(
        "--perturbation swap language --states official --episodes-per-task 1 --out"
    )
    assert main([*command, *perturbed, str(tmp_path / "out")]) == EXIT_USAGE
    assert "'lift the black bowl" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_verb_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == EXIT_USAGE
    assert "did you mean 'train'?" in capsys.readouterr().err
