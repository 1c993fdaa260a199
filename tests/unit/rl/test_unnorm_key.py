"""Which action statistics are used: chosen by the suite, and a mismatch is pointed out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from openvla_oft_folder import save_tiny_policy

from verl_vla.cli import doctor, plan
from verl_vla.cli.arguments import parse
from verl_vla.cli.main import EXIT_USAGE, main
from verl_vla.config.compose import load_recipe
from verl_vla.config.shared import EnvironmentConfig
from verl_vla.envs.registry import suite
from verl_vla.policies.registry import load_processor
from verl_vla.rl.setup import describe_other_data, env_config, find_unnorm_key
from verl_vla.trainer.grpo import run as grpo_run

STATISTICS = "dataset_statistics.json"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = [task.instruction for task in suite("mini").tasks]
    return save_tiny_policy(tmp_path_factory.mktemp("valid") / "policy", words)


@pytest.fixture
def folder(policy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(policy, tmp_path / "policy"))


def put_keys(folder: Path, keys: Sequence[str]) -> None:
    (entry,) = json.loads((folder / STATISTICS).read_text()).values()
    (folder / STATISTICS).write_text(json.dumps(dict.fromkeys(keys, entry)))


@pytest.mark.parametrize(
    ("keys", "name", "chosen"),
    [
        (["bridge", "mini"], "mini", "mini"),
        (["bridge", "libero_goal", "libero_10"], "libero_goal", "libero_goal"),
        (["bridge", "libero_goal_no_noops"], "libero_goal", "libero_goal_no_noops"),
        (["libero_goal", "libero_goal_no_noops"], "libero_goal", "libero_goal"),
        (["libero_goal_no_noops", "bridge"], "libero_goal_swap", "libero_goal_no_noops"),
        (["bridge", "libero_4_task_suites_no_noops"], "libero_10", "libero_4_task_suites_no_noops"),
        (["bridge", "libero_4_task_suites_no_noops"], "libero_90", None),
        (["bridge", "fractal"], "mini", None),
        (["bridge"], "mini", None),
    ],
)
def test_several_entries_are_chosen_from_by_the_suite(
    folder: Path,
    keys: list[str],
    name: str,
    chosen: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    put_keys(folder, keys)
    caplog.set_level("INFO", "verl_vla")
    assert find_unnorm_key(folder, None, suite(name)) == chosen
    said = [] if chosen is None else [f"statistics '{chosen}' of {len(keys)} in {folder}, by the"]
    assert [
        message[: len(line)] for message, line in zip(caplog.messages, said, strict=True)
    ] == said
    assert find_unnorm_key(folder, "bridge", suite(name)) == "bridge"


def test_a_damaged_folder_is_left_to_the_checks(folder: Path) -> None:
    (folder / STATISTICS).write_text("{")
    assert find_unnorm_key(folder, None, suite("mini")) is None


@pytest.mark.parametrize(
    ("key", "name", "is_other"),
    [
        ("bridge_orig", "mini", True),
        ("libero_goal_no_noops", "libero_spatial", True),
        ("libero_4_task_suites_no_noops", "mini", True),
        ("libero_4_task_suites_no_noops", "libero_spatial", False),
        ("libero_goal_no_noops", "libero_goal", False),
        ("libero_goal", "libero_goal_swap", False),
        ("actions", "mini", False),
    ],
)
def test_data_of_another_suite_or_robot_are_pointed_out(
    folder: Path, key: str, name: str, is_other: bool, caplog: pytest.LogCaptureFixture
) -> None:
    said = describe_other_data(key, suite(name))
    assert (said is not None) == is_other
    put_keys(folder, [key])
    env_config(EnvironmentConfig(suite=name), load_processor(folder))
    assert caplog.messages == ([said] if said else [])
    if said:
        assert repr(key) in said
        assert repr(name) in said


@pytest.mark.parametrize(
    ("keys", "row", "said"),
    [
        (["mini", "bridge"], "suite              ok", "'mini', as the action statistics 'mini'"),
        (["bridge"], "suite              warn", "those of 'bridge', and the suite is 'mini'"),
    ],
)
def test_doctor_has_a_row_for_it(
    folder: Path,
    keys: list[str],
    row: str,
    said: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_keys(folder, keys)
    caplog.set_level("INFO", "verl_vla")
    monkeypatch.setattr(doctor, "_action_mass", lambda _: torch.ones(1, 56))
    words = ["--policy", str(folder), "--suite", "mini"]
    assert doctor.run(parse("doctor", words)) == 0
    table = " ".join(caplog.text.split())
    assert " ".join(row.split()) in table
    assert said in table


def test_training_uses_the_entry_of_its_suite(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_keys(folder, ["bridge", "mini_no_noops"])
    monkeypatch.setattr(grpo_run, "open_simulators", lambda *_: nullcontext())
    words = ["recipe=quickstart", f"policy.path='{folder}'", f"out='{tmp_path / 'run'}'"]
    recipe = load_recipe([*words, "environment.render_size=32"])
    with grpo_run.open_run(recipe) as run:
        assert run.processor.codec.statistics.key == "mini_no_noops"
    assert plan.policy_config(recipe)[1] == str(folder)


def test_a_choice_that_cannot_be_made_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_keys(folder, ["bridge", "fractal"])
    words = ["--policy", str(folder), "--suite", "mini", "--out", str(tmp_path / "out")]
    assert main(["eval", *words]) == EXIT_USAGE
    assert "set unnorm_key to one of ['bridge', 'fractal']" in capsys.readouterr().err
