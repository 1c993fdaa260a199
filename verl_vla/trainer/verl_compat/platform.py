"""veRL on a machine without an accelerator.

veRL 0.9.1 ships no CPU platform and falls back to ``cuda``. This one is found through the
``verl.plugins`` entry point. It is registered after veRL's own platforms and veRL takes the
first that is available, so it stays inert wherever there is a GPU.

veRL imports this file in the middle of ``import verl``: keep it small.
"""

from __future__ import annotations

import resource
from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

BYTES_PER_KIB = 1024
"""``ru_maxrss`` is in KiB on Linux (getrusage(2))."""


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """Every question veRL asks about a device, answered for the host's cores."""

    @property
    def device_name(self) -> str:
        """The name torch knows."""
        return "cpu"

    @property
    def vendor_name(self) -> str:
        """The key of veRL's registries for engines and kernels."""
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        """The module that veRL uses in place of ``torch.cuda``."""
        return _DEVICE_MODULE

    def is_available(self) -> bool:
        """A machine always has a core."""
        return True

    def current_device(self) -> Any:
        """A device rather than an index: tensors are moved ``.to`` it."""
        return torch.device("cpu")

    def device_count(self) -> int:
        """No accelerator."""
        return 0

    def set_device(self, device_index: int) -> None:
        """There is nothing to choose."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Work on a CPU is done when the call returns."""

    def manual_seed(self, seed: int) -> None:
        """Seed torch."""
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed torch."""
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """The host's allocator takes none."""

    def empty_cache(self) -> None:
        """The host's allocator keeps none."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        """No compute capability."""
        return (None, None)

    def communication_backend_name(self) -> str:
        """The process group's back end."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """A variable that veRL sets on workers; harmless here."""
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(  # pyright: ignore[reportIncompatibleMethodOverride] -- veRL's is not annotated
        self, msg: str
    ) -> Generator[None]:
        """No profiler to tell."""
        yield

    def profiler_start(self) -> None:
        """No profiler."""

    def profiler_stop(self) -> None:
        """No profiler."""

    def ray_resource_name(self) -> str:
        """Ray counts cores."""
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        """Ray hides no cores."""
        return []

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        """A rank asks for cores instead of GPUs."""
        return {"num_cpus": num_gpus}

    def is_ipc_supported(self) -> bool:
        """Device memory handles do not exist here."""
        return False

    def cudart(self) -> None:
        """No CUDA runtime."""
        return


def _make_device_module() -> ModuleType:
    """``torch.cpu`` and the members of ``torch.cuda`` that veRL reads unconditionally."""
    # a module of its own, so that torch.cpu stays as it is
    module = ModuleType("verl_vla_cpu_device")
    for name, member in vars(torch.cpu).items():
        # the new module keeps its own name and file
        if not name.startswith("__"):
            setattr(module, name, member)
    # veRL reads the peaks after every pass, whatever the device (``engine_workers.py``)
    answers = {
        "max_memory_allocated": peak_process_bytes,
        "max_memory_reserved": peak_process_bytes,
        "memory_allocated": peak_process_bytes,
        "memory_reserved": peak_process_bytes,
        # free and total bytes of a device that is not there
        "mem_get_info": lambda *_: (0, 0),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "reset_peak_memory_stats": lambda *_: None,
        "get_device_name": lambda *_: "CPU",
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "manual_seed_all": torch.manual_seed,
        "is_available": lambda: False,
    }
    for name, answer in answers.items():
        setattr(module, name, answer)
    return module


def peak_process_bytes(*_: Any) -> int:
    """Peak resident memory: on a CPU the process is the device."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * BYTES_PER_KIB


_DEVICE_MODULE = _make_device_module()
