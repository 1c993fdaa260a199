"""Shard a policy over the ranks with FSDP2, layer by layer; keep it gathered for a rollout."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from verl.utils.fsdp_utils import fsdp2_load_full_state_dict
from verl.utils.torch_dtypes import PrecisionType


def keep_gathered(module: nn.Module) -> None:
    """From the next forward pass on, every rank keeps all weights that it gathers.

    To be ended by `shed_gathered` before they change.
    """
    for part in _sharded_parts(module):
        # not recursively: the list has the nested parts too
        part.set_reshard_after_forward(False, recurse=False)


def shed_gathered(module: nn.Module, reshard_after_forward: bool) -> None:
    """Give up what `keep_gathered` kept, and do as before: each rank has its shards alone."""
    for part in _sharded_parts(module):
        part.set_reshard_after_forward(reshard_after_forward, recurse=False)
        part.reshard()


def _sharded_parts(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def shard(
    module: nn.Module, mesh: DeviceMesh, config: Any, offload: CPUOffloadPolicy | None
) -> nn.Module:
    """Shard ``module`` in place and give every rank its part of the weights of rank 0.

    veRL would also wrap the embedding and the head, whose weights these models read directly:
    under FSDP2 those would be shards there.

    Args:
        module: whole, on the CPU; names its layers in ``_no_split_modules``.
        mesh: of the ranks that share it.
        config: veRL's ``FSDPEngineConfig``: in which types weights are used and gradients summed.
        offload: keeps the shards in the host's memory; None keeps them on the device.
    """
    precision: dict[str, Any] = dict(config.mixed_precision)
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=PrecisionType.to_dtype(precision["param_dtype"]),
            reduce_dtype=PrecisionType.to_dtype(precision["reduce_dtype"]),
            cast_forward_inputs=True,
        ),
        "reshard_after_forward": config.reshard_after_forward,
    }
    if offload is not None:
        options["offload_policy"] = offload
    # before fully_shard(), which turns the weights into DTensors
    full_state = module.state_dict()
    layers: set[str] = set(module._no_split_modules)  # pyright: ignore[reportArgumentType]
    # layers first: the root then owns what is left, e.g. the embedding and the head
    for part in module.modules():
        if type(part).__name__ in layers:
            fully_shard(part, **options)
    fully_shard(module, **options)
    fsdp2_load_full_state_dict(module, full_state, mesh, offload)
    return module
