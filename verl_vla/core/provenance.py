"""What a number was measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("verl", "torch", "transformers", "hf-libero", "robosuite", "mujoco", "ray", "numpy")


def provenance() -> dict[str, str]:
    """Versions, machine and commit, for the record beside every measured number."""
    return {name: _version(name) for name in PACKAGES} | {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": commit(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """Commit of this checkout, ``-dirty`` where files were changed, ``unknown`` outside git."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
