"""Which EGL device belongs to which GPU, without a GPU: the driver's answers are given."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from verl_vla.envs.libero import egl_devices
from verl_vla.envs.libero.egl_devices import (
    CUDA_DEVICE,
    DRM_DEVICE_FILE,
    EglDevice,
    Gpu,
    device_variable,
    normalize_bus,
    parse_gpus,
    query_egl,
    render_devices,
)


def bus(index: int) -> str:
    return f"0000:{index + 16:02x}:00.0"


GPUS = [Gpu(index, f"GPU-{index}{index}aa-bb", bus(index)) for index in range(8)]
SOFTWARE = EglDevice(8, None, None)
TURNED = [EglDevice(7 - gpu, gpu, bus(gpu)) for gpu in range(8)] + [SOFTWARE]
"""A node on which EGL counts the other way round than CUDA."""


def devices(
    environ: dict[str, str],
    found: Sequence[EglDevice] = TURNED,
    gpus: Sequence[Gpu] = tuple(GPUS),
) -> tuple[int, ...]:
    return render_devices(environ, egl_devices=lambda: found, gpus=lambda: gpus)


def never() -> Any:
    raise AssertionError("nothing needs to be asked")


def test_every_gpu_has_its_egl_device_in_cudas_order() -> None:
    assert devices({}) == (7, 6, 5, 4, 3, 2, 1, 0)


@pytest.mark.parametrize(
    ("entries", "chosen"),
    [
        ("3", (4,)),
        ("5,2", (2, 5)),
        ("GPU-33aa", (4,)),
        ("GPU-33aa, GPU-11aa", (4, 6)),
        ("2,-1,5", (5,)),
        ("MIG-GPU-33aa-bb/1/0", ()),
        ("MIG-7c1b0d3e-0000-5555-9999-123456789abc", ()),
        ("9", ()),
        ("-1", ()),
        ("", (7, 6, 5, 4, 3, 2, 1, 0)),  # Ray's, for an actor that was given no GPU
    ],
)
def test_only_visible_gpus_render(entries: str, chosen: tuple[int, ...]) -> None:
    assert devices({"CUDA_VISIBLE_DEVICES": entries}) == chosen


def test_a_device_that_the_user_named_is_left_to_the_user() -> None:
    environ = {"MUJOCO_EGL_DEVICE_ID": "0"}
    assert render_devices(environ, egl_devices=never, gpus=never) == ()


@pytest.mark.parametrize(("backend", "asks"), [("osmesa", False), ("egl", True), ("", True)])
def test_only_egl_has_devices(backend: str, asks: bool) -> None:
    if asks:
        assert len(devices({"MUJOCO_GL": backend})) == 8
    else:
        assert render_devices({"MUJOCO_GL": backend}, egl_devices=never, gpus=never) == ()


def test_without_gpus_mujoco_chooses() -> None:
    assert render_devices({}, egl_devices=lambda: [SOFTWARE], gpus=never) == ()


def test_the_pci_bus_counts_where_the_driver_says_another_number(
    caplog: pytest.LogCaptureFixture,
) -> None:
    swapped = [EglDevice(0, 1, bus(0)), EglDevice(1, 0, bus(1))]
    with caplog.at_level(logging.WARNING):
        assert devices({}, swapped, GPUS[:2]) == (0, 1)
    assert "EGL device 0 is on the PCI bus 0000:10:00.0, which is GPU 0" in caplog.messages[0]


def test_without_buses_or_nvidia_smi_the_drivers_number_counts() -> None:
    hidden = [EglDevice(0, 1, None), EglDevice(1, 0, None)]
    assert devices({}, hidden) == (1, 0)
    assert devices({"CUDA_VISIBLE_DEVICES": "1"}, hidden, ()) == (0,)


def test_a_gpu_that_two_drivers_list_is_taken_once() -> None:
    twice = [EglDevice(0, 0, None), EglDevice(1, 1, None), EglDevice(2, 0, None)]
    assert devices({}, twice) == (0, 1)


def test_worker_i_renders_on_device_i_mod_gpus() -> None:
    given = [device_variable((7, 6, 5), number) for number in range(5)]
    assert [each["MUJOCO_EGL_DEVICE_ID"] for each in given] == ["7", "6", "5", "7", "6"]
    assert device_variable((), 3) == {}


def test_nvidia_smis_lines_are_read() -> None:
    text = "0, GPU-aa-bb, 00000000:3B:00.0\n1, GPU-cc-dd, 00000001:AF:00.0\n"
    assert parse_gpus(text) == [
        Gpu(0, "GPU-aa-bb", "0000:3b:00.0"),
        Gpu(1, "GPU-cc-dd", "0001:af:00.0"),
    ]
    assert normalize_bus("0000:3b:00.0") == "0000:3b:00.0"


def test_no_driver_no_query(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(egl_devices, "DRIVER", tmp_path / "not_there")
    monkeypatch.setattr(egl_devices.subprocess, "run", never)
    assert render_devices({}) == ()


def test_the_query_sees_all_gpus_and_its_failure_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(egl_devices, "DRIVER", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    asked: list[dict[str, str]] = []

    def fail(*_: object, env: dict[str, str], **__: object) -> None:
        asked.append(env)
        raise FileNotFoundError("libEGL.so.1")

    monkeypatch.setattr(egl_devices.subprocess, "run", fail)
    assert render_devices({}) == ()
    assert asked[0]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "CUDA_VISIBLE_DEVICES" not in asked[0]
    assert "MuJoCo takes the first: libEGL.so.1" in caplog.messages[0]


class Function:
    """A function of a library: ctypes sets its types, and it can be called."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.restype: Any = None
        self.argtypes: Any = None
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)


class FakeEgl:
    """Three devices behind EGL's own interface: a GPU, one that cannot be rendered on, software."""

    def __init__(self) -> None:
        number, pointer = ctypes.c_int, ctypes.c_void_p
        out = ctypes.POINTER(ctypes.c_ssize_t)
        self._functions = {
            b"eglQueryDevicesEXT": ctypes.CFUNCTYPE(
                number, number, ctypes.POINTER(pointer), ctypes.POINTER(number)
            )(self._list),
            b"eglQueryDeviceAttribEXT": ctypes.CFUNCTYPE(number, pointer, number, out)(self._cuda),
            b"eglQueryDeviceStringEXT": ctypes.CFUNCTYPE(pointer, pointer, number)(self._text),
            b"eglGetPlatformDisplayEXT": ctypes.CFUNCTYPE(pointer, number, pointer, pointer)(
                lambda platform, device, _: device if platform == 0x313F else None
            ),
        }
        self._card = ctypes.create_string_buffer(b"/dev/dri/card1")
        self.eglGetProcAddress = Function(self._address)
        self.eglInitialize = Function(lambda display, *_: display != 102)

    def _address(self, name: bytes) -> int | None:
        if name not in self._functions:
            return None
        return ctypes.cast(self._functions[name], ctypes.c_void_p).value

    def _list(self, most: int, devices: Any, count: Any) -> int:
        assert most == egl_devices.MAX_DEVICES
        for index in range(3):
            devices[index] = 101 + index
        count[0] = 3
        return 1

    def _cuda(self, device: int, name: int, value: Any) -> int:
        if name != CUDA_DEVICE or device == 103:
            return 0
        value[0] = 5
        return 1

    def _text(self, device: int, name: int) -> int | None:
        is_card = name == DRM_DEVICE_FILE and device == 101
        return ctypes.addressof(self._card) if is_card else None


def test_egl_is_asked_through_its_own_interface(tmp_path: Path) -> None:
    address = tmp_path / "0000:3b:00.0"
    address.mkdir()
    (tmp_path / "card1").mkdir()
    (tmp_path / "card1" / "device").symlink_to(address)
    found = query_egl(FakeEgl(), tmp_path)
    assert found == [EglDevice(0, 5, "0000:3b:00.0"), EglDevice(2, None, None)]


def test_an_egl_without_devices_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    egl = FakeEgl()
    egl.eglGetProcAddress = Function(lambda _: None)
    with pytest.raises(OSError, match="libEGL has no eglQueryDevicesEXT"):
        query_egl(egl)
