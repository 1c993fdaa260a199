"""Load checkpoints without running code: tensors, plain values and a few types only."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct

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
