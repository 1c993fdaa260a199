"""What may come out of a checkpoint: tensors, plain values and a few types, and no code."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, ShardOrderEntry, TensorMeta

SWITCH = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Of ``torch.load``: whatever its caller says. veRL says ``weights_only=False``."""

ALLOWED: list[Any] = [
    # weights and moments of FSDP2
    DTensor,
    DTensorSpec,
    DeviceMesh,
    Shard,
    ShardOrderEntry,
    TensorMeta,
    # the state of NumPy's random numbers
    _reconstruct,
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
]
"""All that veRL's files of a rank hold besides what torch allows by itself."""


def refuse_code() -> None:
    """From now on, no ``torch.load`` of this process runs what a file says."""
    os.environ[SWITCH] = "1"
    torch.serialization.add_safe_globals(ALLOWED)
