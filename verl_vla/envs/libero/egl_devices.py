"""The EGL device of each GPU, so that simulators can share the rendering among them.

MuJoCo takes the number of an EGL device, and without one the first that works: one GPU renders for
all processes. EGL and CUDA number the same GPUs in two orders, and ``CUDA_VISIBLE_DEVICES`` means
nothing to EGL. The driver tells which EGL device is which CUDA device (``EGL_NV_device_cuda``), and
the kernel which PCI bus it is on.

``python -m verl_vla.envs.libero.egl_devices`` prints what the driver says, as JSON. It runs apart:
the driver reads ``CUDA_VISIBLE_DEVICES`` once a process, and must count all devices here.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

DEVICE_VARIABLE = "MUJOCO_EGL_DEVICE_ID"
"""Variable with the number of the EGL device that MuJoCo renders on."""
VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
DRIVER = Path("/proc/driver/nvidia/version")
"""File of NVIDIA's kernel driver; without it no EGL device is a GPU of CUDA's."""
MAX_DEVICES = 10
"""Number of EGL devices that MuJoCo looks at (its ``egl/egl_ext.py``, ``eglQueryDevicesEXT``)."""
QUERY_LIMIT_S = 60
"""Time limit of a query, on a busy machine; each device is initialized."""
RENDERERS_ON_GPU = 1
"""Number of renderers that a simulator process keeps on a GPU, whose memory belongs to training.
One holds 0.44 GB of LIBERO's textures (docs/benchmarks.md, Simulator memory)."""
NO_DEVICE = "-1"
"""Entry of `VISIBLE_VARIABLE` that ends the list."""

# EGL 1.5, EGL_EXT_platform_device, EGL_NV_device_cuda, EGL_EXT_device_drm: the registry's eglext.h
PLATFORM_DEVICE = 0x313F
CUDA_DEVICE = 0x323A
DRM_DEVICE_FILE = 0x3233


@dataclass(frozen=True, slots=True)
class EglDevice:
    """A device as EGL counts it, that can be rendered on."""

    index: int
    cuda_index: int | None
    """Number of the GPU in the order of the PCI bus; None for a software renderer."""
    pci_bus: str | None
    """Address such as ``0000:3b:00.0``; None if the driver or the container hides it."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as ``nvidia-smi`` lists it."""

    index: int
    uuid: str
    pci_bus: str


def render_devices(
    environ: Mapping[str, str] = os.environ,
    *,
    egl_devices: Callable[[], Sequence[EglDevice]] | None = None,
    gpus: Callable[[], Sequence[Gpu]] | None = None,
) -> tuple[int, ...]:
    """Return the EGL device of each GPU that this process may use, in CUDA's order.

    Args:
        environ: environment variables. A device in `DEVICE_VARIABLE` is the user's choice.
        egl_devices: query of EGL; None to ask the driver.
        gpus: query of the GPUs; None to ask ``nvidia-smi``.

    Returns:
        Numbers for `DEVICE_VARIABLE`; none where MuJoCo must choose: the user did, another backend
        than EGL renders, or no GPU can, such as the slices of MIG.
    """
    is_egl = "MUJOCO_GL" not in environ or environ["MUJOCO_GL"] in ("", "egl")
    if DEVICE_VARIABLE in environ or not is_egl:
        return ()
    found = [device for device in (egl_devices or _ask_egl)() if device.cuda_index is not None]
    if not found:
        return ()
    known = (gpus or _ask_nvidia_smi)()
    by_index = _by_index(found, known)
    chosen = visible(environ[VISIBLE_VARIABLE] if VISIBLE_VARIABLE in environ else "", known)
    wanted = sorted(by_index) if chosen is None else chosen
    return tuple(by_index[index] for index in wanted if index in by_index)


def device_variable(devices: Sequence[int], number: int) -> dict[str, str]:
    """Return the variable that makes a process render on its device: process i on i mod devices."""
    return {DEVICE_VARIABLE: str(devices[number % len(devices)])} if devices else {}


def visible(entries: str, gpus: Sequence[Gpu]) -> list[int] | None:
    """Return the numbers of the GPUs that `VISIBLE_VARIABLE` names, in its order.

    Args:
        entries: numbers, starts of UUIDs, or MIG slices, separated by commas.
        gpus: the machine's.

    Returns:
        None for all of them: the variable is empty, as Ray sets it for an actor without GPUs. A MIG
        slice is left out, since it has no graphics.
    """
    if not entries.strip():
        return None
    chosen: list[int] = []
    for entry in (part.strip() for part in entries.split(",")):
        if entry == NO_DEVICE:
            break
        if entry.isdecimal():
            chosen.append(int(entry))
        else:
            chosen += [gpu.index for gpu in gpus if entry and gpu.uuid.startswith(entry)]
    return chosen


def _by_index(found: Sequence[EglDevice], known: Sequence[Gpu]) -> dict[int, int]:
    """Map a GPU's number to its EGL device.

    The PCI bus decides where both sides know it: a driver that does not count in the bus's order
    says another number.
    """
    on_bus = {gpu.pci_bus: gpu.index for gpu in known}
    by_index: dict[int, int] = {}
    for device in found:
        index = device.cuda_index
        assert index is not None, "only GPUs are mapped"
        if device.pci_bus in on_bus and on_bus[device.pci_bus] != index:
            logger.warning(
                "EGL device %d is on the PCI bus %s, which is GPU %d, and says that it is CUDA "
                "device %d; the bus counts",
                device.index,
                device.pci_bus,
                on_bus[device.pci_bus],
                index,
            )
            index = on_bus[device.pci_bus]
        # a GPU may be listed twice, by two drivers; MuJoCo would take the first
        by_index.setdefault(index, device.index)
    return by_index


def _ask_egl() -> Sequence[EglDevice]:
    """Ask EGL in a process that sees every GPU, in the order of the PCI bus."""
    if not DRIVER.exists():
        return ()
    environment = {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    environment.pop(VISIBLE_VARIABLE, None)
    done = _run([sys.executable, "-m", __name__], environment)
    if done is None:
        return ()
    # the last line, since a driver may have written before it
    return [EglDevice(**entry) for entry in json.loads(done.splitlines()[-1])]


def _ask_nvidia_smi() -> Sequence[Gpu]:
    query = ["--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader"]
    done = _run(["nvidia-smi", *query], dict(os.environ))
    return () if done is None else parse_gpus(done)


def parse_gpus(text: str) -> list[Gpu]:
    """Parse ``index, uuid, pci.bus_id`` lines of ``nvidia-smi``."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line]
    return [Gpu(int(index), uuid, normalize_bus(bus)) for index, uuid, bus in rows]


def normalize_bus(address: str) -> str:
    """Write a PCI address as the kernel does: ``00000000:3B:00.0`` is ``0000:3b:00.0``."""
    domain, rest = address.lower().split(":", 1)
    return f"{int(domain, 16):04x}:{rest}"


def _run(command: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """Return the output of a command; None, with a warning, where it fails."""
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=QUERY_LIMIT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        # rendering goes on as without this module, on one GPU
        logger.warning("the GPUs to render on are unknown, so MuJoCo takes the first: %s", error)
        return None
    return done.stdout


def query_egl(egl: Any = None, drm_folder: Path = Path("/sys/class/drm")) -> list[EglDevice]:
    """Ask EGL for the devices that can be rendered on; needs a driver, and no CUDA.

    Args:
        egl: library with EGL's functions; None for the system's.
        drm_folder: folder in which the kernel describes graphics cards.

    Raises:
        OSError: there is no libEGL, or it cannot list devices.
    """
    egl = ctypes.CDLL("libEGL.so.1") if egl is None else egl
    # ctypes' default is an int of 32 bits, which cuts the address off
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    pointer, number = ctypes.c_void_p, ctypes.c_int
    list_devices = _extension(
        egl, "eglQueryDevicesEXT", number, number, ctypes.POINTER(pointer), ctypes.POINTER(number)
    )
    attribute = _extension(
        egl, "eglQueryDeviceAttribEXT", number, pointer, number, ctypes.POINTER(ctypes.c_ssize_t)
    )
    text = _extension(egl, "eglQueryDeviceStringEXT", ctypes.c_char_p, pointer, number)
    display_of = _extension(egl, "eglGetPlatformDisplayEXT", pointer, number, pointer, pointer)
    egl.eglInitialize.argtypes = [pointer, pointer, pointer]
    devices, count = (pointer * MAX_DEVICES)(), number()
    if not list_devices(MAX_DEVICES, devices, ctypes.byref(count)):
        return []
    found: list[EglDevice] = []
    for index in range(count.value):
        display = display_of(PLATFORM_DEVICE, devices[index], None)
        if not display or not egl.eglInitialize(display, None, None):
            continue
        # an EGLAttrib is as wide as a pointer
        cuda = ctypes.c_ssize_t()
        is_gpu = attribute(devices[index], CUDA_DEVICE, ctypes.byref(cuda))
        card = text(devices[index], DRM_DEVICE_FILE)
        found.append(EglDevice(index, cuda.value if is_gpu else None, _bus_of(card, drm_folder)))
    return found


def _bus_of(card: bytes | None, drm_folder: Path) -> str | None:
    """Return the PCI address of ``/dev/dri/cardN``, from the kernel's folder of it."""
    if not card:
        return None
    device = drm_folder / Path(card.decode()).name / "device"
    return device.resolve().name if device.exists() else None


def _extension(egl: Any, name: str, result: type, *arguments: type) -> Callable[..., Any]:
    address = egl.eglGetProcAddress(name.encode())
    if not address:
        raise OSError(f"libEGL has no {name}")
    return ctypes.CFUNCTYPE(result, *arguments)(address)


if __name__ == "__main__":
    sys.stdout.write(json.dumps([asdict(device) for device in query_egl()]) + "\n")
