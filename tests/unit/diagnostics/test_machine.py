"""``doctor``: what it finds on this machine and on worse ones."""

from __future__ import annotations

import os
import socket
from collections import namedtuple

import pytest

from verl_vla.cli.arguments import parse
from verl_vla.cli.doctor import EXIT_FAULT, run
from verl_vla.cli.plan import policy_config
from verl_vla.config.compose import load_recipe
from verl_vla.core.errors import ConfigError
from verl_vla.diagnostics import machine
from verl_vla.diagnostics.machine import Check, examine_machine
from verl_vla.diagnostics.planning.gpus import GPUS
from verl_vla.diagnostics.planning.plan import Plan, make_plan
from verl_vla.policies.checks import Finding

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def no_image(monkeypatch):
    """Leave out the one look that takes seconds."""
    drawn = Check(finding=Finding(subject="GL", says="rendered", is_fault=False))
    monkeypatch.setattr(machine, "_renders", lambda _: drawn)


def by_subject(folder, plan=None):
    return {check.finding.subject: check for check in examine_machine(folder, plan=plan)}


@pytest.mark.usefixtures("no_image")
def test_this_machine_can_train(tmp_path):
    checks = by_subject(tmp_path / "not" / "there" / "yet")
    assert not [c.finding.says for c in checks.values() if c.finding.is_fault]
    assert set(checks) >= {"Python", "versions", "CUDA", "GL", "disk", "shared memory"}
    assert checks["write permission"].finding.says == str(tmp_path)
    assert checks["versions"].fix is None


@pytest.mark.sim
def test_an_image_is_really_rendered():
    check = machine._renders(None)
    assert "rendered a red box" in check.finding.says
    assert not check.finding.is_fault


def test_an_image_that_cannot_be_rendered_is_a_fault(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glx")
    check = machine._renders(None)
    assert check.finding.is_fault
    assert "MUJOCO_GL is 'glx'" in check.finding.says
    assert "apt-get install" in (check.fix or "")


@pytest.mark.usefixtures("no_image")
def test_a_wrong_version_is_named_with_its_command(monkeypatch, tmp_path):
    real = machine.metadata.version
    monkeypatch.setattr(
        machine.metadata, "version", lambda name: "0.0.1" if name == "verl" else real(name)
    )
    check = by_subject(tmp_path)["verl"]
    assert check.finding.is_fault
    assert check.finding.says == "0.0.1, but ==0.9.1 is needed"
    assert check.fix == "pip install 'verl==0.9.1'"


@pytest.mark.usefixtures("no_image")
def test_little_shared_memory_is_a_fault_and_little_disk_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: Usage(64e6, 0, 64e6))
    checks = by_subject(tmp_path)
    assert checks["shared memory"].finding.is_fault
    assert "--shm-size" in (checks["shared memory"].fix or "")
    # without a recipe nobody knows how much is needed
    assert not checks["disk"].finding.is_fault
    assert "name a recipe" in checks["disk"].finding.says


@pytest.fixture(scope="module")
def plan() -> Plan:
    """The plan of a small policy under profile 8gpu: its checkpoints take some MB."""
    recipe = load_recipe(["recipe=libero", "suite=mini", "profile=8gpu", "policy.path=bases/mini"])
    return make_plan(recipe, policy_config(recipe)[0], GPUS["a100-80"])


@pytest.mark.usefixtures("no_image")
def test_with_a_recipe_a_disk_without_room_for_its_run_is_a_fault(monkeypatch, tmp_path, plan):
    assert "the run writes up to" in by_subject(tmp_path, plan=plan)["disk"].finding.says
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: Usage(64e6, 0, 1e6))
    disk = by_subject(tmp_path, plan=plan)["disk"]
    assert disk.finding.is_fault
    assert "0.0 GB are free, and the run needs up to" in disk.finding.says
    assert disk.fix == "choose out=FOLDER on a larger disk"


@pytest.mark.usefixtures("no_image")
def test_a_port_that_is_taken_is_said(monkeypatch, tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr(machine, "RAY_PORTS", {port: "nobody"})
        check = by_subject(tmp_path)[f"port {port}"]
    assert "taken" in check.finding.says
    assert check.fix == "ray stop"
    assert "free for nobody" in by_subject(tmp_path)[f"port {port}"].finding.says


@pytest.mark.usefixtures("no_image")
def test_a_folder_that_cannot_be_written_is_a_fault(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.os, "access", lambda *_: False)
    assert by_subject(tmp_path)["write permission"].finding.is_fault


@pytest.mark.usefixtures("no_image")
def test_assets_that_are_not_liberos_are_a_fault(monkeypatch, tmp_path):
    assert "every file as LIBERO's" in by_subject(tmp_path)["LIBERO's assets"].finding.says
    for name in machine.find_assets.__globals__["ASSET_FOLDERS"]:
        (tmp_path / name).mkdir()
    (tmp_path / "wall.xml").write_text("<mujoco/>")
    monkeypatch.setenv("VERL_VLA_LIBERO_ASSETS", str(tmp_path))
    found = by_subject(tmp_path)["LIBERO's assets"]
    assert found.finding.is_fault
    assert "files absent, the first articulated_objects/" in found.finding.says
    assert "wall.xml" in found.finding.says
    # reinstalling the wheels would not touch the folder that is named
    assert found.fix == "unset VERL_VLA_LIBERO_ASSETS, or name a folder of LIBERO's assets"


@pytest.mark.usefixtures("no_image")
def test_a_package_that_is_not_there_is_a_fault_and_stops_nothing(monkeypatch, tmp_path):
    real = machine.metadata.version

    def version(name):
        if name in ("verl", "mujoco"):
            raise machine.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(machine.metadata, "version", version)
    monkeypatch.setattr(machine, "describe_faults", lambda _: None)
    checks = by_subject(tmp_path)
    assert checks["verl"].finding.says == "not installed, but ==0.9.1 is needed"
    assert checks["verl"].fix == "pip install 'verl==0.9.1'"
    assert checks["MuJoCo"].finding.is_fault
    assert "pip install mujoco==3.3.2" in (checks["MuJoCo"].fix or "")


@pytest.mark.usefixtures("no_image")
def test_the_command_answers_by_its_exit_code_and_only_prints_remedies(monkeypatch, tmp_path):
    assert run(parse("doctor", ["--out", str(tmp_path)])) == 0
    ran: list[object] = []
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: Usage(64e6, 0, 64e6))
    monkeypatch.setattr(os, "system", ran.append)
    assert run(parse("doctor", ["--out", str(tmp_path), "--fix"])) == EXIT_FAULT
    assert not ran


@pytest.mark.usefixtures("no_image")
def test_the_command_compares_the_machine_with_a_recipe(monkeypatch, tmp_path, capsys):
    words = ["recipe=libero", "suite=mini", "profile=two_cores", "policy.path=bases/mini"]
    seen: list[object] = []
    real = machine.require_disk_space
    monkeypatch.setattr(
        machine, "require_disk_space", lambda *given: (seen.append(given[0]), real(*given))
    )
    run(parse("doctor", [*words, f"out='{tmp_path}'"]))
    run(parse("doctor", [*words, "--out", str(tmp_path / "elsewhere")]))
    assert seen == [tmp_path, tmp_path / "elsewhere"]


@pytest.mark.parametrize("option", [["--policy", "bases/mini"], ["--libero"]])
def test_a_recipe_is_refused_where_it_would_not_be_used(option):
    with pytest.raises(ConfigError, match="recipe=libero"):
        run(parse("doctor", ["recipe=libero", *option]))
