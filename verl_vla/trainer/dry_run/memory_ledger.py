"""Tensors without data whose storages take real bytes from PyTorch's caching allocator.

A `FakeTensor` has a shape, a dtype and a lifetime. `MemoryLedger` asks PyTorch's own allocator for
the bytes of every storage that says it is on the GPU, on the stream that is current then, and
gives them back when the storage dies. What is reserved, what is lost between blocks and whether an
allocation fails is therefore decided by the code that decides it in training.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.cuda.memory import caching_allocator_alloc, caching_allocator_delete
from torch.utils.flop_counter import flop_registry

from verl_vla.trainer.dry_run.phases import Phase

aten = torch.ops.aten
DEVICE = 0
"""Index of the only device."""
ITEM_OF_A_NUMBER = 1
"""Value that a fake number has where the code reads it: finite, and a valid count."""


class MemoryLedger(FakeTensorMode):
    """The mode in which everything runs; notes bytes and FLOPs phase by phase."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.phases: list[Phase] = []
        """Completed phases, in order."""
        self.decomposed: Mapping[Any, Callable[..., Any]] = {}
        """Operators that hide the tensors they make, and functions that do the same openly."""
        self._open: Phase | None = None
        self._truth = False
        self._depth = 0
        # by the id of a storage's Python object, which lives as long as the storage
        self._storages: dict[int, _Storage] = {}
        self._device_bytes = 0
        self._host_bytes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryLedger:
        """Return itself: a copy of a fake tensor is a tensor of the same mode."""
        return self

    def begin(self, name: str) -> None:
        """Complete the open phase and begin another one."""
        self.complete()
        self._open = Phase(
            name=name,
            allocated=self._device_bytes,
            reserved=0,
            fragmented=0,
            free=0,
            host=self._host_bytes,
            flops=0,
        )
        self._at_peak(self._open)

    def complete(self) -> None:
        """Complete the open phase, if there is one."""
        if self._open is not None:
            self.phases.append(self._open)
            self._open = None

    @contextmanager
    def answering(self, truth: bool) -> Generator[None]:
        """Answer ``truth`` where the code reads a fake boolean; the default is false."""
        before, self._truth = self._truth, truth
        try:
            yield
        finally:
            self._truth = before

    @contextmanager
    def following_resizes(self) -> Generator[None]:
        """Notice storages that are resized in place, as FSDP2 frees its gathered weights."""
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            self._note(storage, None)
            return result

        with mock.patch.object(torch.UntypedStorage, "resize_", resize):
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.decomposed:
            with self:
                return self.decomposed[func](*args, **kwargs)
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._item(args[0])
        self._depth += 1
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._depth -= 1
        # the shape of a result may be found by other operators, which a kernel does not run
        if self._depth:
            return result
        count: Any = flop_registry.get(func.overloadpacket)
        if count is not None and self._open is not None:
            self._open.flops += count(*args, **kwargs, out_val=result)
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, FakeTensor) and part.device.type != "meta":
                self._note(part.untyped_storage(), part.device.type)
        return result

    def _item(self, number: FakeTensor) -> Any:
        if number.constant is not None:
            return number.constant.item()
        if number.dtype == torch.bool:
            return self._truth
        return float(ITEM_OF_A_NUMBER) if number.dtype.is_floating_point else ITEM_OF_A_NUMBER

    def _note(self, storage: torch.UntypedStorage, device: str | None) -> None:
        """Account for a storage that may be new, or of another size than before."""
        key, size = id(storage), storage.nbytes()
        known = self._storages.get(key)
        if known is None:
            # a storage that was not made in this mode, and is only resized here
            if device is None:
                return
            watch = weakref.ref(storage, lambda _: self._forget(key))
            known = self._storages[key] = _Storage(watch, on_device=device == "cuda")
        if known.size != size:
            self._resize(known, size)

    def _forget(self, key: int) -> None:
        self._resize(self._storages.pop(key), 0)

    def _resize(self, known: _Storage, size: int) -> None:
        if not known.on_device:
            self._host_bytes += size - known.size
            known.size = size
        else:
            if known.address is not None:
                caching_allocator_delete(known.address)
                known.address = None
            self._device_bytes -= known.size
            # the next line may raise that the device is full, and then nothing is held
            known.size = 0
            if size:
                known.address = caching_allocator_alloc(size, DEVICE, torch.cuda.current_stream())
            known.size = size
            self._device_bytes += size
        self._update_peaks()

    def _update_peaks(self) -> None:
        phase = self._open
        if phase is None:
            return
        phase.host = max(phase.host, self._host_bytes)
        if self._device_bytes > phase.allocated:
            phase.allocated = self._device_bytes
            self._at_peak(phase)

    def _at_peak(self, phase: Phase) -> None:
        free, total = torch.cuda.mem_get_info(DEVICE)
        phase.free, phase.reserved = free, total - free
        phase.fragmented = phase.reserved - self._device_bytes


class _Storage:
    """Bytes that one storage takes."""

    __slots__ = ("address", "on_device", "size", "watch")

    def __init__(self, watch: weakref.ref[torch.UntypedStorage], *, on_device: bool) -> None:
        self.watch = watch
        self.on_device = on_device
        self.size = 0
        self.address: Any = None
