"""The device that is not there: its memory is PyTorch's allocator's, and it computes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from verl_vla.core.allocator import EXPANDABLE, VARIABLES
from verl_vla.core.errors import ConfigError
from verl_vla.trainer.dry_run import shim

GB, MB = 10**9, 10**6
PAGE = 20 << 20  # of expandable segments, the larger one (c10/core/AllocatorConfig.h, kLargeBuffer)
needs_shim = pytest.mark.skipif(
    shim.shim_is_missing() is not None, reason=f"no dry run here: {shim.shim_is_missing()}"
)


def ask(allocator: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("one_gpu.py"))],
        env=os.environ
        | {
            "LD_PRELOAD": str(shim.build_shim()),
            "VERL_VLA_FAKE_CUDA_BYTES": str(4 * GB),
            "CUDA_VISIBLE_DEVICES": "0",
            "OMP_NUM_THREADS": "1",
            VARIABLES[0]: allocator,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_shim
@pytest.mark.parametrize("allocator", ["", EXPANDABLE])
def test_the_allocator_of_pytorch_finds_one_gpu_of_the_size_asked_for(allocator: str) -> None:
    found = ask(allocator)
    assert found["devices"] == 1
    assert found["capability"] == [8, 0]
    assert found["total"] == 4 * GB
    assert found["free_of_4"] == pytest.approx(GB, abs=PAGE)
    assert "CUDA out of memory. Tried to allocate 1.86 GiB" in found["refused"]
    # blocks are kept for later until the cache is emptied
    assert found["kept"] == pytest.approx(3 * GB, abs=PAGE)
    assert found["kept_after_emptying"] == 0
    assert "not possible in a dry run" in found["kernel"]


@needs_shim
def test_a_storage_takes_its_bytes_once_and_gives_them_back() -> None:
    found = ask("")
    assert found["of_a_view"] == pytest.approx(100 * MB, abs=PAGE)
    assert found["shrunk"] == 0
    assert found["grown"] == pytest.approx(50 * MB, abs=PAGE)
    assert found["gone"] == 0
    assert (found["false"], found["true"], found["number"]) == (False, True, 1.0)
    one, two = found["phases"]
    name, allocated, reserved, fragmented, free, host, flops = one
    assert (name, allocated, host, flops) == ("one", 100 * MB, 0, 0)
    assert reserved == pytest.approx(100 * MB, abs=PAGE)
    assert (fragmented, free) == (reserved - allocated, 4 * GB - reserved)
    name, allocated, *_, host, flops = two
    assert (name, host, flops) == ("two", 10 * MB, 2 * 64 * 32 * 16)
    assert 0 < allocated < MB


@needs_shim
def test_the_shim_is_compiled_once_for_each_version(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(shim.CACHE_VARIABLE, str(tmp_path))
    first = shim.build_shim()
    assert first.is_relative_to(tmp_path)
    compiled = first.stat().st_mtime_ns
    assert shim.build_shim() == first
    assert first.stat().st_mtime_ns == compiled
    changed = tmp_path / "fake_cuda.c"
    changed.write_text(shim.SOURCE.read_text() + "\nint one_more;\n")
    monkeypatch.setattr(shim, "SOURCE", changed)
    assert shim.build_shim() != first


@needs_shim
def test_what_the_compiler_says_is_passed_on(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(shim.CACHE_VARIABLE, str(tmp_path))
    broken = tmp_path / "fake_cuda.c"
    broken.write_text("no C at all\n")
    monkeypatch.setattr(shim, "SOURCE", broken)
    with pytest.raises(ConfigError, match="cannot be built: '.*' ended with 1:\n.*error"):
        shim.build_shim()
    assert not list(tmp_path.rglob("*.so"))


def test_a_machine_without_a_compiler_or_headers_is_told_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(shim, "COMPILERS", ("no_such_compiler",))
    with pytest.raises(ConfigError, match="needs a C compiler.*apt install gcc"):
        shim.build_shim()
    monkeypatch.setattr(shim, "COMPILERS", ("true",))
    monkeypatch.setattr(shim, "HEADER", "no_such_header.h")
    reason = shim.shim_is_missing()
    assert reason is not None
    assert "no_such_header.h" in reason
