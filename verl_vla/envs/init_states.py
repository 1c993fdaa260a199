"""The files that recorded starts are read from; nothing in them is executed."""

from __future__ import annotations

import codecs
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy._core.multiarray import _reconstruct

_NUMPY_TYPES: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}
"""All that a LIBERO init-state file may hold; anything else in it is refused."""


def read_states(file: Path) -> npt.NDArray[np.float64]:
    """Read an ``.npz`` of ours or a ``.pruned_init`` of LIBERO's: [states, values]."""
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as stored:
            return stored["states"]
    # what `torch.save` makes of an array: a pickle in an archive, which can be read without torch
    with zipfile.ZipFile(file) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(name) as stored:
            return _StatesUnpickler(stored).load()


class _StatesUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in _NUMPY_TYPES:
            raise pickle.UnpicklingError(
                f"an init-state file asks for {module_name}.{global_name}, which no array needs"
            )
        return _NUMPY_TYPES[module_name, global_name]
