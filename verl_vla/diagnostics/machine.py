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

from verl_vla.core.errors import ConfigError
from verl_vla.diagnostics.planning.plan import Plan
from verl_vla.envs.libero.asset_files import describe_faults, remedy_for_assets
from verl_vla.envs.libero.assets import assets_available, find_assets
from verl_vla.envs.libero.gl import REMEDY as GL_REMEDY
from verl_vla.envs.libero.mujoco_version import REMEDY as MUJOCO_REMEDY
from verl_vla.envs.libero.mujoco_version import known_difference
from verl_vla.policies.checks import Finding
from verl_vla.runs.disk_space import free_bytes, nearest_folder, require_disk_space

GB = 1e9
LEAST_SHARED_BYTES = 1 * GB
"""Shared memory for the images of all slots and Ray's object store; containers often have 64 MB."""
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


def examine_machine(
    folder: Path, num_gpus: int | None = None, *, plan: Plan | None = None
) -> list[Check]:
    """Run all checks once.

    Args:
        folder: folder of the runs; with a plan, of the run.
        num_gpus: number of devices to render an image on; None for all that torch sees.
        plan: of the recipe that will train here; None if there is no recipe yet.
    """
    devices = torch.cuda.device_count() if num_gpus is None else num_gpus
    return [
        _python(),
        *_packages(),
        _mujoco(),
        _cuda(),
        *[_renders(device) for device in (range(devices) if devices else [None])],
        _assets(),
        _free_space(folder, plan),
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


def _cuda() -> Check:
    build = f"torch {torch.__version__}"
    if torch.version.cuda is None:
        return _check("CUDA", f"{build} is built without it; only the profile two_cores runs")
    if not torch.cuda.is_available():
        says = f"{build}, CUDA {torch.version.cuda}, and no device; only the profile two_cores runs"
        return _check("CUDA", says)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return _check(
        "CUDA", f"{build}, CUDA {torch.version.cuda}, driver {_driver()}, {', '.join(names)}"
    )


def _driver() -> str:
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.splitlines()[0] if done.returncode == 0 else "unknown"


def _renders(device: int | None) -> Check:
    """Render an image in a separate process, as a simulator does."""
    subject = "GL" if device is None else f"GL, GPU {device}"
    environment = dict(os.environ)
    if device is not None:
        # the number of the device that MuJoCo renders on
        environment["MUJOCO_EGL_DEVICE_ID"] = str(device)
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
