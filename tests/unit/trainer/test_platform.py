"""veRL's platform for a machine without an accelerator."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from verl.plugin.platform import PlatformBase

from verl_vla.trainer.verl_compat.platform import PlatformCPU, peak_process_bytes

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def platform() -> PlatformCPU:
    return PlatformCPU()


def test_it_answers_every_question_of_the_abstract_platform(platform):
    assert isinstance(platform, PlatformBase)
    assert PlatformCPU.__abstractmethods__ == frozenset()
    for name in PlatformBase.__abstractmethods__:
        assert name in vars(PlatformCPU), f"{name} is answered by somebody else"


def test_its_answers_are_those_of_a_cpu(platform):
    assert (platform.device_name, platform.vendor_name) == ("cpu", "cpu")
    assert platform.is_available() and platform.is_platform_available()
    assert platform.device_count() == 0
    assert platform.get_device_capability() == (None, None)
    assert platform.communication_backend_name() == "gloo"
    assert platform.ray_resource_name() == "CPU"
    assert platform.ray_resource_options(2) == {"num_cpus": 2}
    assert platform.ray_noset_envvars() == []
    assert not platform.is_ipc_supported()
    assert platform.cudart() is None


def test_a_tensor_can_be_moved_to_the_current_device(platform):
    assert torch.ones(1).to(platform.current_device()).device.type == "cpu"


@pytest.mark.parametrize("seed", ["manual_seed", "manual_seed_all"])
def test_seeding_it_seeds_torch(platform, seed):
    state = torch.get_rng_state()
    try:
        getattr(platform, seed)(3)
        first = torch.rand(2)
        getattr(platform.device_module, seed)(3)
        assert torch.equal(torch.rand(2), first)
    finally:
        torch.set_rng_state(state)


def test_what_a_cpu_cannot_do_is_no_error(platform):
    platform.set_device(0)
    platform.synchronize()
    platform.set_allocator_settings("expandable_segments:True")
    platform.empty_cache()
    platform.profiler_start()
    platform.profiler_stop()
    with platform.nvtx_range("a range"):
        pass


def test_its_module_has_what_verl_reads_of_torch_cuda(platform):
    module = platform.device_module
    assert module.is_available() is False
    assert module.max_memory_allocated() > 10 * 2**20, "bytes: torch alone needs more"
    assert module.max_memory_reserved() >= module.max_memory_allocated() // 2
    assert module.mem_get_info() == (0, 0)
    assert module.get_device_name() == "CPU"
    module.empty_cache()
    module.ipc_collect()
    module.reset_peak_memory_stats()
    state = module.get_rng_state()
    first = torch.rand(3)
    module.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_a_peak_is_counted_in_bytes():
    first, peak, last = (
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        peak_process_bytes(),
        1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )
    assert first <= peak <= last


def test_torchs_own_module_is_left_as_it_was(platform):
    assert platform.device_module is not torch.cpu
    assert "mem_get_info" not in vars(torch.cpu)


def test_verl_runs_on_it_when_told_to():
    """In a process of its own, since veRL chooses its platform once."""
    program = (
        "from verl.utils.device import get_device_name, get_nccl_backend, get_torch_device\n"
        "print(get_device_name(), get_nccl_backend(), get_torch_device().__name__)"
    )
    if "verl_vla" not in metadata.entry_points(group="verl.plugins").names:
        # not installed, so veRL does not find the entry point by itself
        program = f"import verl_vla.trainer.verl_compat.platform\n{program}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT), "VERL_PLATFORM": "cpu"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "cpu gloo verl_vla_cpu_device"
