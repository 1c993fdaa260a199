"""Versions, machine and commit that a number was measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata

from verl_vla.core.files import PROJECT_FOLDER

PACKAGES = ("verl", "torch", "transformers", "hf-libero", "robosuite", "mujoco", "ray", "numpy")
"""Packages whose versions can change a number."""


def provenance() -> dict[str, str]:
    """Return versions, machine and commit, to be stored with every measured number."""
    return {name: _version(name) for name in PACKAGES} | {
        "python": platform.python_version(),
        # of the machine, also where this process may use fewer
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": commit(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        # such as veRL, which an evaluation does not need
        return "not installed"


def commit() -> str:
    """Return this checkout's commit, ``-dirty`` if files were changed, ``unknown`` without git."""
    # an installed copy may lie in another repository, whose commit would say nothing
    if not (PROJECT_FOLDER / ".git").exists():
        return "unknown"
    try:
        done = subprocess.run(
            # without tags describe gives the hash, and unlike rev-parse it marks changed files
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=PROJECT_FOLDER,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
