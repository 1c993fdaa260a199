"""Weights on disk: the trained ones of a checkpoint, an exported policy, and safe loading."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed
from numpy._core.multiarray import _reconstruct
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModel

from verl_vla.policies.base import Processor
from verl_vla.policies.checkpoint import WeightWriter
from verl_vla.policies.lora import MakeWeight, merge_adapters, nf4


def write_policy(
    module: nn.Module,
    processor: Processor,
    folder: Path,
    *,
    is_quantized: bool,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the weights, merged and whole, and everything else; every rank takes part.

    No more than one weight is whole on a device at a time, and on the host what one file holds.

    Args:
        module: of this rank.
        processor: of the policy.
        folder: made where it is missing.
        is_quantized: whether weights under adapters are held in 4 bits.
        dtype: of the weights that are written; None leaves each in its own.
    """
    is_first = torch.distributed.get_rank() == 0
    makes: dict[str, MakeWeight] = (
        nf4().plain_weights(module)
        if is_quantized
        else {name: partial(_same, weight) for name, weight in module.state_dict().items()}
    )
    merged = merge_adapters(module, {n: partial(_whole, make) for n, make in makes.items()})
    writer = None
    if is_first:
        folder.mkdir(parents=True, exist_ok=True)
        plain = _plain_model(module)
        plain.config.save_pretrained(folder)
        # weights that are others' under a second name are stored once
        tied = set(plain.all_tied_weights_keys)
        writer = WeightWriter(folder, tied)
    # one at a time, on every rank in this order: each is gathered from all of them
    for name, make in merged.items():
        weight = make()
        if writer is not None:
            writer.add(name, weight if dtype is None else weight.to(dtype))
    if writer is not None:
        writer.close()
        processor.save_pretrained(folder)
    torch.distributed.barrier()


def _same(weight: Tensor) -> Tensor:
    return weight


def _whole(make: MakeWeight) -> Tensor:
    """Gather one weight, on the host of the first rank; the others have no more than its shape."""
    weight = make()
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    return weight.to("cpu" if torch.distributed.get_rank() == 0 else "meta")


def _plain_model(module: nn.Module) -> Any:
    """Return the model without adapters and without data, its configuration as it is saved."""
    with torch.device("meta"):
        plain: Any = AutoModel.from_config(cast("Any", module).merged_config())
    # as PreTrainedModel.save_pretrained fills them in, which would write the weights as well
    plain.config.dtype = str(plain.dtype).removeprefix("torch.")
    plain.config.architectures = [type(plain).__name__]
    return plain


SWITCH = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Environment variable that makes ``torch.load`` read weights only, also for a caller such as veRL
that says ``weights_only=False``."""

ALLOWED: list[Any] = [_reconstruct, np.ndarray, np.dtype, np.dtypes.UInt32DType]
"""The state of NumPy's random numbers, which veRL saves with each rank. Torch itself allows FSDP2's
types."""


def refuse_code() -> None:
    """Keep every later ``torch.load`` of this process from running code of a file."""
    os.environ[SWITCH] = "1"
    torch.serialization.add_safe_globals(ALLOWED)


def checkpoint_contents(*, has_adapters: bool) -> list[str]:
    """Name what veRL saves of a rank.

    Of a policy with adapters that is all but the model, whose frozen base the recipe names;
    `save_trained` adds the rest.
    """
    return ["optimizer", "extra"] if has_adapters else ["model", "optimizer", "extra"]


def trained(module: nn.Module) -> list[nn.Parameter]:
    """Return the trained weights, in the order of the module."""
    return [weight for weight in module.parameters() if weight.requires_grad]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_trained(module: nn.Module, folder: str) -> None:
    """Write this rank's share of the trained weights."""
    torch.save([local(weight.data).cpu() for weight in trained(module)], _file(folder))


def load_trained(module: nn.Module, folder: str) -> None:
    """Read what `save_trained` wrote, on as many ranks, without executing anything."""
    shards: list[Tensor] = torch.load(_file(folder), weights_only=True)
    # both lists are in the order of the module, so positions are enough
    for weight, shard in zip(trained(module), shards, strict=True):
        local(weight.data).copy_(shard)


def _file(folder: str) -> Path:
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return Path(folder) / f"trained_world_size_{num_ranks}_rank_{rank}.pt"
