"""All weights on every rank for as long as they do not change: one gather for a whole rollout."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule


def keep_gathered(module: nn.Module) -> None:
    """From the next forward pass on, every rank keeps all weights that it gathers.

    To be ended by `shed_gathered` before they change.
    """
    for part in _sharded_parts(module):
        part.set_reshard_after_forward(False, recurse=False)


def shed_gathered(module: nn.Module, reshard_after_forward: bool) -> None:
    """Give up what `keep_gathered` kept, and do as before: each rank has its shards alone."""
    for part in _sharded_parts(module):
        part.set_reshard_after_forward(reshard_after_forward, recurse=False)
        part.reshard()


def _sharded_parts(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]
