"""Stand-ins for the few parts of torch, bitsandbytes and veRL that need tensors with data.

Each says why it is there; everything else that a dry run executes is the real code.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.fsdp._fully_shard import _fsdp_init
from torch.distributed.tensor import DTensor, _dispatch, _sharding_prop
from torch.distributed.tensor import _utils as tensor_utils
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._pytree import tree_map_only
from transformers import AutoModel

from verl_vla.policies import weight_files
from verl_vla.policies.lora import nf4
from verl_vla.policies.registry import load_config
from verl_vla.trainer.engine import engine
from verl_vla.trainer.grpo import worker

# registers the shapes of collectives
importlib.import_module("torch.distributed._tools.fake_collectives")

BLOCK = 64
"""Weights that share a scale (`verl_vla.policies.quantization`, bitsandbytes' default)."""


@contextmanager
def stand_ins(four_bits: FourBits | None) -> Generator[None]:
    """Put all of them in place while the block runs.

    Args:
        four_bits: of bitsandbytes; None where the recipe does not use it.
    """
    replaced = _replaced() + ([] if four_bits is None else four_bits.replaced)
    with ExitStack() as stack:
        for target, name, stand_in in replaced:
            stack.enter_context(mock.patch.object(target, name, stand_in))
        yield


def _replaced() -> list[tuple[Any, str, Any]]:
    saved: dict[str, Any] = {}

    def save(value: Any, file: Any) -> None:
        # what torch reads back of a file lies where it lay
        saved[str(file)] = tree_map_only(Tensor, _Described, value)

    def load(file: Any, **_: Any) -> Any:
        return tree_map_only(_Described, _Described.make, saved[str(file)])

    shape_and_offset = tensor_utils.compute_local_shape_and_global_offset

    def outside(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return shape_and_offset(*args, **kwargs)

    propagate = vars(ShardingPropagator)["_propagate_tensor_meta_non_cached"]

    def propagate_outside(*args: Any) -> Any:
        # whole weights, of whose shards it asks the shape alone
        with unset_fake_temporarily():
            return propagate(*args)

    original = vars(nn.Module)["_apply"]

    def apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if any(type(weight.data) is FakeTensor for weight in module.parameters()):
            return _convert(module, function)
        return original(module, function, recurse)

    return [
        # it swaps tensors in place, which fake ones do not allow
        (nn.Module, "_apply", apply),
        # there are no weights to read
        (engine, "load_model", _without_weights),
        # a fake tensor keeps its device when its data are set
        (_fsdp_init, "_move_states_to_device", _move),
        # it computes with tensors where it could with numbers, and reads them
        *(
            (module, "compute_local_shape_and_global_offset", outside)
            for name, module in list(sys.modules.items())
            if name.startswith("torch.distributed")
            and vars(module).get("compute_local_shape_and_global_offset") is shape_and_offset
        ),
        # results depend on shapes alone, so they may be kept
        *((module, "_are_we_tracing", lambda: False) for module in (_dispatch, _sharding_prop)),
        (ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate_outside),
        # fake tensors cannot be jagged: rows come dense
        *((module, "dense", lambda rows, width: rows) for module in (engine, worker)),
        *((module, "stacked", lambda rows: rows) for module in (engine, worker)),
        (engine, "right_padded", lambda ids: (ids, torch.ones_like(ids))),
        (engine, "pack_like_language_model", lambda values, *_: values),
        # nothing is on disk
        (torch, "save", save),
        (torch, "load", load),
        (weight_files, "save_file", lambda _, file, **__: file.touch()),
    ]


def _without_weights(folder: str, *, dtype: torch.dtype, attn_implementation: str) -> nn.Module:
    """Do as `load_model`, without reading a file but the configuration."""
    config: Any = load_config(folder)
    with unset_fake_temporarily(), torch.device("meta"):
        model: Any = AutoModel.from_config(config, attn_implementation=attn_implementation)
    model = model.to(dtype)
    model.freeze_untrained()
    # tensors of the mode, on the CPU as after reading
    return _convert(model, _empty_on_cpu).eval()


def _convert(module: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """Replace all weights and buffers by what ``function`` makes of them."""
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            data = weight.data
            # what is in its place keeps what was set on it
            if (new := function(data)) is not data:
                setattr(part, name, nn.Parameter(new, weight.requires_grad))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, function(buffer))
    return module


def _empty_on_cpu(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _move(params: list[nn.Parameter], buffers: list[Tensor], device: torch.device) -> None:
    """Move states to a device, and say so."""
    for tensor in [*params, *buffers]:
        if tensor.device != device:
            tensor.data = tensor.to(device)
            cast("FakeTensor", tensor).fake_device = device


class _Described:
    """A tensor of a file: enough to make it again."""

    def __init__(self, tensor: Tensor) -> None:
        self._make: Callable[[], Tensor]
        if isinstance(tensor, DTensor):
            local = _Described(tensor.to_local())
            mesh, placements = tensor.device_mesh, tensor.placements
            shape, stride = tensor.shape, tensor.stride()
            self._make = lambda: DTensor.from_local(
                local.make(), mesh, placements, run_check=False, shape=shape, stride=stride
            )
        elif isinstance(tensor, FakeTensor):
            shape, dtype, device = tensor.shape, tensor.dtype, tensor.device
            self._make = lambda: torch.empty(shape, dtype=dtype, device=device)
        else:
            self._make = lambda: tensor

    def make(self) -> Tensor:
        """Make the tensor again."""
        return self._make()


class FourBits:
    """Stand-ins for bitsandbytes, whose `Params4bit` cannot hold a tensor without data."""

    def __init__(self) -> None:
        self.functional: Any = importlib.import_module("bitsandbytes.functional")
        self.optimizer: Any = importlib.import_module("bitsandbytes.optim.optimizer").Optimizer8bit

    @property
    def replaced(self) -> list[tuple[Any, str, Any]]:
        """Targets, names and stand-ins, as for `mock.patch.object`."""
        return [
            (nf4(), "_quantized", self._quantized),
            # paged state lies on the device until it is full
            (self.optimizer, "get_state_buffer", _state_buffer),
            (self.optimizer, "prefetch_state", lambda *_: None),
        ]

    @property
    def decomposed(self) -> dict[Any, Callable[..., Tensor]]:
        """Operators that unpack a weight inside, and what they do."""
        return {torch.ops.bitsandbytes.gemm_4bit.default: self._multiply}

    def _quantized(self, linear: nn.Linear, device: int) -> nn.Module:
        """Do as `verl_vla.policies.quantization._quantized`, with a plain parameter."""
        weight = linear.weight.data.to(device)
        packed, state = self.functional.quantize_4bit(
            weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        with unset_fake_temporarily(), torch.device("meta"):
            layer: Any = nf4().Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,  # pyright: ignore[reportUnnecessaryComparison]
                compute_dtype=weight.dtype,
                quant_type="nf4",
            )
        quantized: Any = nn.Parameter(packed, requires_grad=False)
        # a forward pass gives the weight its state from the layer
        quantized.quant_state = layer.quant_state = state
        layer.weight = quantized
        layer.bias = linear.bias
        return layer.to(device)

    def _multiply(
        self,
        inputs: Tensor,
        packed: Tensor,
        shape: list[int],
        absmax: Tensor,
        blocksize: int,
        quant_type: str,
        bias: Tensor | None = None,
        absmax_8bit: Tensor | None = None,
        *_: Tensor,
    ) -> Tensor:
        """Unpack the weight and multiply, as bitsandbytes does from a few hundred rows on.

        Source: ``bitsandbytes/backends/cuda/ops.py``, ``gemm_4bit``.
        """
        scales = absmax
        if absmax_8bit is not None:
            scales = torch.empty(absmax_8bit.shape, device=inputs.device)
        weight = torch.ops.bitsandbytes.dequantize_4bit.default(
            packed, scales, blocksize, quant_type, shape, inputs.dtype
        )
        # not `linear`, which hides its product from whoever counts operations here
        product = (inputs.flatten(0, -2) @ weight.t()).unflatten(0, inputs.shape[:-1])
        return product if bias is None else product + bias


def _state_buffer(_: Any, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros_like(weight, dtype=dtype)
