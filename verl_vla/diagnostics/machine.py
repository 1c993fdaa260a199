"""Checks of a machine's requirements for training, one at a time."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from verl_vla.config.grpo import GRPOClusterConfig
from verl_vla.core.errors import ConfigError
from verl_vla.core.files import free_bytes, nearest_folder
from verl_vla.diagnostics.planning.plan import Plan, host_cores
from verl_vla.envs.libero.asset_files import describe_faults, remedy_for_assets
from verl_vla.envs.libero.assets import assets_available, find_assets
from verl_vla.envs.libero.egl_devices import (
    DEVICE_VARIABLE,
    VISIBLE_VARIABLE,
    device_variable,
    render_devices,
)
from verl_vla.envs.libero.gl import REMEDY as GL_REMEDY
from verl_vla.envs.libero.memory import available_bytes
from verl_vla.envs.libero.mujoco_version import REMEDY as MUJOCO_REMEDY
from verl_vla.envs.libero.mujoco_version import known_difference
from verl_vla.policies.checks import Finding
from verl_vla.runs.disk_space import require_disk_space

GB = 1e9
LEAST_SHARED_BYTES = 1 * GB
"""Shared memory for the images of all slots and Ray's object store; containers often have 64 MB."""
LEAST_DRIVERS = {"12": 525, "13": 580}
"""Oldest Linux driver of each major release of CUDA (NVIDIA, CUDA Compatibility, minor version
compatibility); torch's wheels bring the rest of CUDA."""
MOST_HELD_BYTES = 2 * GB
"""Memory of a GPU that is no news: the driver's, and the context of this process."""
RAY_PORTS = {6379: "the head of a Ray cluster", 8265: "its dashboard"}
"""Default ports of Ray; a cluster of one machine takes free ones."""
PROBE_LIMIT_S = 120
"""Time limit to import MuJoCo and render one image, on a busy machine."""
PROBE = """
import mujoco, numpy
scene = '<mujoco><worldbody><light pos="0 0 3"/>' \\
    '<geom type="box" size=".3 .3 .3" rgba="1 0 0 1"/></worldbody></mujoco>'
model = mujoco.MjModel.from_xml_string(scene)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 64, 64)
renderer.update_scene(data)
image = renderer.render().astype(int)
red = (image[..., 0] - image[..., 1:].max(-1) > 30).mean()
print(f"{100 * red:.0f}")
"""
"""Program that renders a red box and prints the share of red pixels in percent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A finding, and the command that fixes it."""

    finding: Finding
    fix: str | None = None


def examine_machine(folder: Path, *, plan: Plan | None = None) -> list[Check]:
    """Run all checks once.

    Args:
        folder: folder of the runs; with a plan, of the run.
        plan: of the recipe that will train here; None if there is no recipe yet.
    """
    return [
        _python(),
        *_packages(),
        _mujoco(),
        *_cuda(plan),
        *_rendering(),
        _assets(),
        _free_space(folder, plan),
        *([] if plan is None else [_host(plan)]),
        _shared_memory(Path("/dev/shm")),
        *[_port(port, what) for port, what in RAY_PORTS.items()],
        _can_write(folder),
    ]


def _python() -> Check:
    version = sys.version_info[:2]
    return _check(
        "Python",
        platform.python_version(),
        is_fault=not (3, 10) <= version <= (3, 12),
        fix="install Python 3.10, 3.11 or 3.12 and run scripts/quickstart.sh again",
    )


def _packages() -> list[Check]:
    """Return one check for all pins that hold, and one for each that does not."""
    wanted = [Requirement(text) for text in metadata.requires("verl-vla") or ()]
    # a requirement with a marker belongs to an extra, which may be absent
    pinned = [r for r in wanted if r.specifier and r.marker is None]
    wrong: list[Check] = []
    for requirement in pinned:
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(
                _check(
                    requirement.name,
                    f"{version or 'not installed'}, but {requirement.specifier} is needed",
                    is_fault=True,
                    fix=f"pip install '{requirement}'",
                )
            )
    held = f"{len(pinned) - len(wrong)} of {len(pinned)} pinned packages have their version"
    return [_check("versions", held), *wrong]


def _version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _mujoco() -> Check:
    version = _version("mujoco")
    if version is None:
        return _check("MuJoCo", "not installed", is_fault=True, fix=MUJOCO_REMEDY)
    says = known_difference(version)
    if says is None:
        return _check("MuJoCo", f"{version}, no difference from LIBERO's physics is known")
    return _check("MuJoCo", f"{version}: {says}", is_fault=True, fix=MUJOCO_REMEDY)


def _cuda(plan: Plan | None) -> list[Check]:
    """Check the GPUs that torch sees, and with a plan whether the recipe's ranks have theirs."""
    build = f"torch {torch.__version__}"
    ranks = 0 if plan is None else _ranks_with_gpu(plan.recipe.cluster)
    if torch.version.cuda is None:
        says = f"{build} is built without it; only the profile two_cores runs"
        fix = "install the locked torch: scripts/quickstart.sh"
        return [_check("CUDA", says, is_fault=ranks > 0, fix=fix)]
    if not torch.cuda.is_available():
        return [_no_device(f"{build}, CUDA {torch.version.cuda}", torch.version.cuda, ranks)]
    count = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
    driver = _driver() or "unknown"
    says = f"{build}, CUDA {torch.version.cuda}, driver {driver}, {names}"
    found = _check("CUDA", says)
    if count < ranks:
        found = _check(
            "CUDA",
            f"{says}: {count} GPU, and cluster.ranks_per_node is {ranks}, one GPU each",
            is_fault=True,
            fix=f"set cluster.ranks_per_node={count}, or see why in nvidia-smi and in "
            f"{VISIBLE_VARIABLE}",
        )
    needed = None if plan is None or not ranks else plan.device.peak
    return [found, *[_free_memory(index, needed) for index in range(min(count, ranks or count))]]


def _ranks_with_gpu(cluster: GRPOClusterConfig) -> int:
    # a plan for cores has the device "cpu", also where the recipe says "auto"
    return 0 if cluster.device == "cpu" else cluster.ranks_per_node


def _no_device(build: str, cuda: str, ranks: int) -> Check:
    """Say why torch sees no device: there is none, the driver is too old, or it is hidden."""
    driver = _driver()
    if driver is None:
        return _check(
            "CUDA",
            f"{build}, and no device; only the profile two_cores runs",
            is_fault=ranks > 0,
            fix="train on a machine with GPUs, or with profile=two_cores",
        )
    major = cuda.partition(".")[0]
    least = LEAST_DRIVERS[major] if major in LEAST_DRIVERS else 0
    if int(driver.partition(".")[0]) < least:
        return _check(
            "CUDA",
            f"{build} needs driver {least} or newer, and nvidia-smi reports {driver}: torch sees "
            "no device",
            is_fault=True,
            fix=f"update the driver, for example as root: apt-get install nvidia-driver-{least}-"
            "server; then restart the machine",
        )
    hidden = os.environ[VISIBLE_VARIABLE] if VISIBLE_VARIABLE in os.environ else None
    return _check(
        "CUDA",
        f"{build}, driver {driver}: nvidia-smi sees a GPU and torch does not; {VISIBLE_VARIABLE} "
        f"is {hidden!r}",
        is_fault=True,
        fix=f"unset {VISIBLE_VARIABLE}, or start the container with --gpus all; python -c 'import "
        "torch; torch.cuda.init()' says more",
    )


def _free_memory(index: int, needed: int | None) -> Check:
    """Measure a GPU's free memory; what another process holds is missing in the run."""
    subject = f"memory, GPU {index}"
    free, total = torch.cuda.mem_get_info(index)
    says = f"{free / GB:.1f} of {total / GB:.1f} GB free"
    see = "nvidia-smi lists the processes that hold memory; end them, or choose another GPU with "
    remedy = f"{see}{VISIBLE_VARIABLE}"
    if needed is not None and free < needed:
        return _check(
            subject,
            f"{says}, and a rank needs {needed / GB:.1f} GB",
            is_fault=True,
            fix=remedy if total >= needed else "see what fits: verl-vla plan with the same words",
        )
    if total - free > MOST_HELD_BYTES:
        return _advice(subject, f"{says}; other processes hold the rest", remedy)
    return _check(subject, says)


def _driver() -> str | None:
    """Return the version of NVIDIA's driver; None where ``nvidia-smi`` finds no GPU."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    # one line a GPU, and all have one driver
    return next(iter(done.stdout.split()), None)


def _rendering() -> list[Check]:
    """Render on every device that simulators will use."""
    devices = render_devices()
    # none where MuJoCo chooses one for all of them
    checks = [_renders(device) for device in devices] or [_renders(None)]
    num_gpus = torch.cuda.device_count()
    if num_gpus > len(checks):
        says = f"{len(checks)} of {num_gpus} GPUs render, for all simulators"
        fix = (
            f"unset {DEVICE_VARIABLE}, install NVIDIA's EGL (libnvidia-gl), or in a container set "
        )
        checks.append(_advice("GL", says, f"{fix}NVIDIA_DRIVER_CAPABILITIES=all"))
    return checks


def _renders(device: int | None) -> Check:
    """Render an image in a separate process, as a simulator does."""
    subject = "GL" if device is None else f"GL, EGL device {device}"
    environment = {**os.environ, **device_variable([] if device is None else [device], 0)}
    # before MuJoCo is imported, which reads its GL then
    program = f"from verl_vla.envs.libero.gl import prepare_gl\nprepare_gl()\n{PROBE}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _check(subject, f"no image in {PROBE_LIMIT_S} s", is_fault=True, fix=GL_REMEDY)
    if done.returncode != 0:
        why = (done.stderr.strip() or "no word").splitlines()[-1]
        return _check(subject, f"no image: {why}", is_fault=True, fix=GL_REMEDY)
    share = int(done.stdout)
    return _check(
        subject,
        f"rendered a red box that fills {share}% of the image",
        is_fault=share == 0,
        fix=GL_REMEDY,
    )


def _assets() -> Check:
    subject = "LIBERO's assets"
    remedy = remedy_for_assets()
    if not assets_available():
        return _advice(subject, "none; only the suite mini can be simulated", remedy)
    folder = find_assets()
    faults = describe_faults(folder)
    if faults is not None:
        return _check(subject, f"{folder}: {faults}", is_fault=True, fix=remedy)
    return _check(subject, f"{folder}, every file as LIBERO's")


def _free_space(folder: Path, plan: Plan | None) -> Check:
    says = f"{free_bytes(folder) / GB:.0f} GB free for {folder}"
    if plan is None:
        return _check("disk", f"{says}; name a recipe to compare it with what its run writes")
    try:
        require_disk_space(folder, plan.disk)
    except ConfigError as error:
        return _check("disk", str(error), is_fault=True, fix="choose out=FOLDER on a larger disk")
    return _check("disk", f"{says}; the run writes up to {sum(plan.disk.values()) / GB:.1f} GB")


def _host(plan: Plan) -> Check:
    """Compare memory and processors with what the plan counts of a node."""
    available, needed = available_bytes(), sum(plan.host.values())
    # cores of this process: a scheduler may grant fewer than the machine has
    cores, wanted = len(os.sched_getaffinity(0)), host_cores(plan.recipe)
    says = (
        f"{available / GB:.1f} GB of memory are available and {cores} processors; the plan counts "
        f"up to {needed / GB:.1f} GB and {wanted}"
    )
    if available < needed:
        fix = "take a larger machine, or fewer environment.num_workers and cluster.ranks_per_node"
        return _check("host", says, is_fault=True, fix=fix)
    # fewer processors only take longer
    if cores < wanted:
        return _advice("host", says, "set environment.num_workers to fewer, or wait longer")
    return _check("host", says)


def _shared_memory(folder: Path) -> Check:
    size = shutil.disk_usage(folder).total if folder.is_dir() else 0
    return _check(
        "shared memory",
        f"{size / GB:.1f} GB in {folder}",
        is_fault=size < LEAST_SHARED_BYTES,
        fix="start the container with --shm-size=8g, or as root: mount -o remount,size=8g /dev/shm",
    )


def _port(port: int, what: str) -> Check:
    with socket.socket() as probe:
        # a port that was closed a moment ago counts as free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            says = f"taken ({error.strerror}); is a Ray running already?"
            return _advice(f"port {port}", says, "ray stop")
    return _check(f"port {port}", f"free for {what}")


def _can_write(folder: Path) -> Check:
    existing = nearest_folder(folder)
    return _check(
        "write permission",
        f"{existing}",
        is_fault=not os.access(existing, os.W_OK),
        fix=f"choose out=FOLDER elsewhere, or: chown $USER {existing}",
    )


def _check(subject: str, says: str, *, is_fault: bool = False, fix: str | None = None) -> Check:
    """Make a check; ``fix`` is kept only for a fault."""
    finding = Finding(subject=subject, says=says, is_fault=is_fault)
    return Check(finding=finding, fix=fix if is_fault else None)


def _advice(subject: str, says: str, fix: str) -> Check:
    """Make a check that is no fault but has a recommendation."""
    return Check(finding=Finding(subject=subject, says=says, is_fault=False), fix=fix)
