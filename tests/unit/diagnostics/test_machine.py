"""``doctor``: what it finds on this machine and on worse ones."""

from __future__ import annotations

import os
import socket
from collections import namedtuple
from dataclasses import replace
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest

from verl_vla.cli.arguments import parse
from verl_vla.cli.doctor import EXIT_FAULT, run
from verl_vla.cli.plan import policy_config
from verl_vla.config.choices import GPUS
from verl_vla.config.compose import load_recipe
from verl_vla.core.errors import ConfigError
from verl_vla.diagnostics import machine
from verl_vla.diagnostics.machine import Check, examine_machine
from verl_vla.diagnostics.planning.memory import DeviceMemory
from verl_vla.diagnostics.planning.plan import Plan, make_plan
from verl_vla.policies.checks import Finding

Usage = namedtuple("Usage", "total used free")
DRAWN = Check(finding=Finding(subject="GL", says="rendered", is_fault=False))


@pytest.fixture
def no_image(monkeypatch):
    """Leave out the one look that takes seconds."""
    monkeypatch.setattr(machine, "_renders", lambda _: DRAWN)


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
@pytest.mark.parametrize(
    ("share", "cores", "is_fault", "has_advice"),
    [(0.99, 99, True, True), (1.01, 99, False, False), (1.01, 2, False, True)],
)
def test_with_a_recipe_the_hosts_memory_and_processors_are_compared(
    monkeypatch, tmp_path, plan, share, cores, is_fault, has_advice
):
    assert "host" not in by_subject(tmp_path)
    needed = sum(plan.host.values())
    monkeypatch.setattr(machine, "available_bytes", lambda: share * needed)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(cores)))
    host = by_subject(tmp_path, plan=plan)["host"]
    assert host.finding.is_fault == is_fault
    assert (host.fix is not None) == has_advice
    assert f"the plan counts up to {needed / 1e9:.1f} GB and 74" in host.finding.says


class Cuda:
    """The GPUs that torch sees, instead of this machine's."""

    def __init__(self, count: int, free: float = 84e9, total: float = 85e9) -> None:
        self.count, self._memory = count, (free, total)

    def is_available(self) -> bool:
        return self.count > 0

    def device_count(self) -> int:
        return self.count

    def get_device_name(self, index: int) -> str:
        return f"A100 number {index}"

    def mem_get_info(self, index: int) -> tuple[float, float]:
        return self._memory if index == self.count - 1 else (84e9, 85e9)


@pytest.fixture
def gpus(monkeypatch, no_image):
    """Let torch see GPUs, and nvidia-smi a driver."""

    def see(count: int, driver: str | None, **memory: float) -> None:
        seen = SimpleNamespace(
            __version__="2.11.0", version=SimpleNamespace(cuda="13.0"), cuda=Cuda(count, **memory)
        )
        monkeypatch.setattr(machine, "torch", seen)
        monkeypatch.setattr(machine, "_driver", lambda: driver)

    return see


def test_a_driver_that_is_too_old_for_torchs_cuda_is_said_with_its_version(gpus, tmp_path):
    """nvidia-smi works, and torch sees nothing: the commonest first fault on a rented machine."""
    gpus(0, "570.86.10")
    cuda = by_subject(tmp_path)["CUDA"]
    assert cuda.finding.is_fault
    assert "CUDA 13.0 needs driver 580 or newer, and nvidia-smi reports 570.86.10" in (
        cuda.finding.says
    )
    assert "nvidia-driver-580" in (cuda.fix or "")


def test_a_gpu_that_is_hidden_from_torch_is_a_fault(gpus, tmp_path, monkeypatch):
    gpus(0, "580.65.06")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    cuda = by_subject(tmp_path)["CUDA"]
    assert cuda.finding.is_fault
    assert "nvidia-smi sees a GPU and torch does not; CUDA_VISIBLE_DEVICES is '9'" in (
        cuda.finding.says
    )


def test_no_gpu_is_a_fault_only_for_a_recipe_that_wants_some(gpus, tmp_path, plan):
    gpus(0, None)
    assert not by_subject(tmp_path)["CUDA"].finding.is_fault
    assert by_subject(tmp_path, plan=plan)["CUDA"].finding.is_fault
    on_cores = replace(
        plan.recipe, cluster=replace(plan.recipe.cluster, device="cpu", ranks_per_node=1)
    )
    assert not by_subject(tmp_path, plan=replace(plan, recipe=on_cores))["CUDA"].finding.is_fault


def test_fewer_gpus_than_ranks_are_a_fault(gpus, tmp_path, plan):
    gpus(8, "580.65.06")
    assert not by_subject(tmp_path, plan=plan)["CUDA"].finding.is_fault
    gpus(4, "580.65.06")
    assert not by_subject(tmp_path)["CUDA"].finding.is_fault
    cuda = by_subject(tmp_path, plan=plan)["CUDA"]
    assert cuda.finding.is_fault
    assert "4 GPU, and cluster.ranks_per_node is 8" in cuda.finding.says
    assert "cluster.ranks_per_node=4" in (cuda.fix or "")


WEIGHTS_OF_30_GB = DeviceMemory(
    phases={"update": {"weights": int(30e9)}}, outside={}, allocator="", fragmented_share=0.0
)


def test_memory_that_another_process_holds_is_measured(gpus, tmp_path, plan):
    gpus(8, "580.65.06", free=20e9)
    checks = by_subject(tmp_path)
    assert checks["memory, GPU 0"].fix is None
    held = checks["memory, GPU 7"]
    assert not held.finding.is_fault
    assert "20.0 of 85.0 GB free; other processes hold the rest" in held.finding.says
    large = replace(plan, device=WEIGHTS_OF_30_GB)
    short = by_subject(tmp_path, plan=large)["memory, GPU 7"]
    assert short.finding.is_fault
    assert "20.0 of 85.0 GB free, and a rank needs 30.0 GB" in short.finding.says
    assert "nvidia-smi lists the processes" in (short.fix or "")


def test_a_gpu_that_is_too_small_is_no_other_processs_fault(gpus, tmp_path, plan):
    gpus(8, "580.65.06", free=23e9, total=24e9)
    large = replace(plan, device=WEIGHTS_OF_30_GB)
    short = by_subject(tmp_path, plan=large)["memory, GPU 7"]
    assert short.finding.is_fault
    assert "verl-vla plan" in (short.fix or "")


def test_gpus_that_do_not_render_are_counted(gpus, tmp_path, monkeypatch):
    gpus(8, "580.65.06")
    rendered: list[int | None] = []
    monkeypatch.setattr(machine, "render_devices", lambda: (5, 3))
    monkeypatch.setattr(machine, "_renders", lambda device: (rendered.append(device), DRAWN)[1])
    assert "2 of 8 GPUs render" in by_subject(tmp_path)["GL"].finding.says
    assert rendered == [5, 3]


@pytest.mark.parametrize("fails", [FileNotFoundError("nvidia-smi"), None])
def test_the_driver_is_nvidia_smis_or_none(monkeypatch, fails):
    def run_smi(*_: object, **__: object) -> CompletedProcess[str]:
        if fails is not None:
            raise fails
        return CompletedProcess([], 0, "580.65.06\n580.65.06\n")

    monkeypatch.setattr(machine.subprocess, "run", run_smi)
    assert machine._driver() == (None if fails else "580.65.06")


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


@pytest.mark.parametrize(
    ("profile", "device"), [("8gpu", "cuda"), ("two_cores", "cpu"), ("auto", "cpu")]
)
def test_a_recipe_that_demands_gpus_is_planned_with_them_where_there_are_none(
    monkeypatch, tmp_path, profile, device
):
    words = ["recipe=libero", "suite=mini", "policy.path=bases/mini", f"out='{tmp_path}'"]
    words += ["cluster.device=auto"] if profile == "auto" else [f"profile={profile}"]
    monkeypatch.setattr("verl_vla.cli.doctor.torch.cuda.is_available", lambda: False)
    planned: list[Plan] = []
    monkeypatch.setattr(
        "verl_vla.cli.doctor.examine_machine", lambda _, plan: (planned.append(plan), [DRAWN])[1]
    )
    assert run(parse("doctor", words)) == 0
    assert [plan.recipe.cluster.device for plan in planned] == [device]
