"""Operators of a pass with their FLOPs and bytes, grouped into classes of kernels.

A kernel reads its inputs from the device's memory once and writes its outputs once; caches that
outlive a kernel are not counted. Views, and memory that is only reserved, are no kernels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
FLOPS: Mapping[Any, Callable[..., int]] = flop_registry | {
    # torch counts attention on a GPU only
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
"""Functions that count the FLOPs of an operator."""

PRODUCTS = "matrix products"
ATTENTION = "attention"
NORMS = "norms"
ELEMENTWISE = "activations, other elementwise"
COPIES = "copies and casts"
UNKNOWN = "not classified"
"""Class of operators that no rule here names; they count like all others."""

RESERVES = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"})
"""Operators that write nothing."""
FROM_SHAPE = frozenset(
    {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
)
"""Operators that look at the shape of their input, not at its values."""
OVERWRITES = frozenset({"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"})
"""Operators that do not read what they change."""
READS_ROWS = frozenset({"embedding", "gather", "index", "index_select"})
"""Operators that read as much of their first input as they return, not all of it."""
RENAMES = frozenset({"_unsafe_view", "lift_fresh"})
"""Operators that return their input's memory, which their schemas do not say."""
NUMBER = "_local_scalar_dense"
"""Operator behind ``item()`` and ``bool()``."""
MOVES = frozenset(
    {
        *FROM_SHAPE,
        *OVERWRITES,
        *READS_ROWS,
        *("_to_copy", "clone", "cat", "stack", "constant_pad_nd", "repeat", "arange", "full"),
        *("zeros", "ones", "scalar_tensor", "slice_backward", "select_backward", "slice_scatter"),
        *("embedding_dense_backward", "scatter", "scatter_add", "index_put", "sort"),
        *("_unsafe_index", "_unsafe_index_put", "new_tensor"),
    }
)
"""Operators that copy or cast, or write constants."""
REDUCTIONS = frozenset(
    {
        *(
            "sum",
            "mean",
            "amax",
            "max",
            "any",
            "all",
            "cumsum",
            "_foreach_norm",
            "linalg_vector_norm",
        ),
        *("_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data"),
        *("native_layer_norm", "native_layer_norm_backward"),
    }
)
"""Operators that count among the elementwise ones, since they are as cheap for their bytes."""


class Call(NamedTuple):
    """One operator of a pass, on tensors of one size."""

    kernel: str
    """Class of kernels."""
    operator: str
    flops: int
    bytes: int
    """Bytes read and written."""


class Label(NamedTuple):
    """Part of a pass that an operator belongs to."""

    part: str
    """Part of the model."""
    kernel: str | None = None
    """Class of all operators that are neither matrix products nor attention; None where they are
    told apart."""


class OperatorCounts(TorchDispatchMode):
    """A dispatch mode that counts operators on fake tensors, forward and backward.

    Operators of a backward pass belong to the part whose forward pass made their autograd node.
    A number that the code reads from a fake tensor is 1, a truth value false.
    """

    def __init__(self, part: str) -> None:
        """Begin to count.

        Args:
            part: part of the operators outside of every `label`.
        """
        super().__init__()
        self.calls: Counter[Call] = Counter()
        self._outside = Label(part)
        self._open: list[Label] = []
        # first and last sequence number of autograd nodes; inner parts come before outer ones
        self._made: list[tuple[int, int, Label]] = []
        self._begun: list[int] = []

    def begin(self, label: Label) -> None:
        """Assign the operators that follow to ``label``, until the matching `end`."""
        self._open.append(label)
        self._begun.append(_next_node())

    def end(self) -> None:
        """End the innermost label."""
        label, first = self._open.pop(), self._begun.pop()
        self._made.append((first, _next_node(), label))

    @contextmanager
    def label(self, label: Label) -> Generator[None]:
        """Assign operators to ``label`` while the block runs."""
        self.begin(label)
        try:
            yield
        finally:
            self.end()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == NUMBER:
            # fake tensors have no value
            return False if args[0].dtype == torch.bool else 1.0
        result = func(*args, **kwargs)
        moved = moved_bytes(func, args, kwargs, result)
        count: Any = FLOPS.get(func.overloadpacket)
        flops = 0 if count is None else count(*args, **kwargs, out_val=result)
        if moved or flops:
            self.calls[Call(self._kernel(func, name), name, flops, moved)] += 1
        return result

    def _kernel(self, func: Any, name: str) -> str:
        label = self._label()
        if "attention" in name:
            return f"{ATTENTION}, {label.part}"
        if func.overloadpacket in FLOPS:
            return f"{PRODUCTS}, {label.part}"
        if label.kernel is not None:
            return label.kernel
        if name in MOVES:
            return COPIES
        if torch.Tag.pointwise in func.tags or name in REDUCTIONS or name.startswith("_foreach"):
            return ELEMENTWISE
        return UNKNOWN

    def _label(self) -> Label:
        # also where a forward pass is computed again, within a backward pass
        if self._open:
            return self._open[-1]
        # None outside of a backward pass
        node = cast("Any", torch)._C._current_autograd_node()
        if node is not None:
            number = node._sequence_nr()
            for first, end, label in self._made:
                if first <= number < end:
                    return label
        return self._outside


def _next_node() -> int:
    """Return the sequence number that the next autograd node will have."""
    return cast("Any", autograd)._get_sequence_nr()


def moved_bytes(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the bytes that an operator reads and writes.

    0 for a view, and for a question about a tensor, which makes no other tensor.
    """
    name = func.overloadpacket.__name__
    if func.is_view or name in RENAMES or name in RESERVES:
        return 0
    changed: list[Tensor] = []
    read: list[Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.name in kwargs:
            given = kwargs[argument.name]
        elif index < len(args) and not argument.kwarg_only:
            given = args[index]
        else:
            continue
        tensors = list(_tensors(given))
        is_changed = argument.alias_info is not None and argument.alias_info.is_write
        if is_changed:
            changed += tensors
        if not (is_changed and (argument.kwarg_only or name in OVERWRITES)):
            read += tensors
    written = _distinct([*changed, *_tensors(result)])
    if not written:
        return 0
    if name in FROM_SHAPE:
        read = []
    if name in READS_ROWS:
        read = [*_tensors(result), *read[1:]]
    return sum(map(_size, _distinct(read))) + sum(map(_size, written))


def _tensors(values: Any) -> Iterable[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return tensors without those that are the same part of the same memory."""
    found: dict[Any, Tensor] = {}
    for tensor in tensors:
        # a storage's Python object lives as long as the storage
        storage = id(tensor.untyped_storage())
        key = (storage, tensor.storage_offset(), tensor.shape, tensor.stride())
        found[key] = tensor
    return list(found.values())


def _size(tensor: Tensor) -> int:
    """Return the bytes of a tensor's memory; a dimension that is repeated counts once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    # a size of 0 has any stride
    numel = math.prod(1 if stride == 0 and size else size for size, stride in sizes)
    return numel * tensor.itemsize
