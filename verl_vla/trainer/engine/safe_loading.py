"""What may come out of a checkpoint: tensors, plain values and a few types, and no code."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct

SWITCH = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Of ``torch.load``: it then reads weights alone, whatever its caller says. veRL says
``weights_only=False``."""

ALLOWED: list[Any] = [_reconstruct, np.ndarray, np.dtype, np.dtypes.UInt32DType]
"""The state of NumPy's random numbers, which veRL saves with each rank. Torch itself allows FSDP2's
types."""


def refuse_code() -> None:
    """From now on, no ``torch.load`` of this process runs what a file says."""
    os.environ[SWITCH] = "1"
    torch.serialization.add_safe_globals(ALLOWED)
