"""Trained weights: found among the frozen ones, and saved alone where the base is frozen."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


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
    for weight, shard in zip(trained(module), shards, strict=True):
        local(weight.data).copy_(shard)


def _file(folder: str) -> Path:
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return Path(folder) / f"trained_world_size_{num_ranks}_rank_{rank}.pt"
