"""Settings of PyTorch's memory allocator on a GPU: the user's own, or the project's."""

from __future__ import annotations

import os

VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Environment variables that the allocator reads (PyTorch's notes on CUDA semantics)."""
EXPANDABLE = "expandable_segments:True"
"""Setting with which freed memory serves requests of another size. Micro-batches differ in size,
and without it a full GPU has a sixth of its memory in pieces: docs/performance.md."""


def allocator_variables() -> dict[str, str]:
    """Return the environment variables of a process with a GPU: the user's, if there are any."""
    own = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return own or {VARIABLES[0]: EXPANDABLE}
