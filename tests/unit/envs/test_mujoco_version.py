"""A MuJoCo that does not simulate LIBERO is refused before anything starts."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from verl_vla.cli.main import EXIT_USAGE, main
from verl_vla.core.errors import ConfigError
from verl_vla.envs.libero import mujoco_version
from verl_vla.envs.libero.mujoco_version import known_difference, require_libero_physics

EVAL = ["eval", "--policy", "bases/mini", "--suite", "mini", "--out"]
TRAIN = ["train", "recipe=quickstart"]


def pretend(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    real = metadata.version

    def answer(name: str) -> str:
        return version if name == "mujoco" else real(name)

    monkeypatch.setattr(mujoco_version.metadata, "version", answer)


@pytest.mark.parametrize("version", ["2.3.7", "3.0.0", "3.3.0", "3.3.2"])
def test_versions_of_liberos_era_are_taken(version: str) -> None:
    assert known_difference(version) is None


@pytest.mark.parametrize("version", ["3.3.3", "3.3.7", "3.3.7.post1"])
def test_darker_floors_are_known(version: str) -> None:
    says = known_difference(version)
    assert says is not None
    assert "darker" in says
    assert "ramekin" not in says


@pytest.mark.parametrize("version", ["3.4.0", "3.5.0rc1", "3.8.1", "4.0.0"])
def test_other_contacts_are_known(version: str) -> None:
    says = known_difference(version)
    assert says is not None
    assert "ramekin" in says
    assert "darker" in says


def test_the_pinned_one_is_installed() -> None:
    require_libero_physics()
    assert metadata.version("mujoco") in mujoco_version.REMEDY


def test_what_is_no_version_is_refused() -> None:
    with pytest.raises(ConfigError, match="'newest'.*pip install mujoco==3.3.2"):
        known_difference("newest")


@pytest.mark.parametrize("command", [TRAIN, EVAL], ids=["train", "eval"])
def test_commands_refuse_before_anything_starts(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend(monkeypatch, "3.8.1")
    out = tmp_path / "run"
    last = f"out='{out}'" if command is TRAIN else str(out)
    assert main([*command, last]) == EXIT_USAGE
    said = capsys.readouterr().err
    assert "mujoco is 3.8.1" in said
    assert "pip install mujoco==3.3.2" in said
    assert not out.exists()


def test_doctor_calls_it_a_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, "3.4.0")
    assert main(["doctor", "--out", str(tmp_path), "--fix"]) == 1
    said = capsys.readouterr()
    assert "MuJoCo: pip install mujoco==3.3.2" in said.out + said.err
