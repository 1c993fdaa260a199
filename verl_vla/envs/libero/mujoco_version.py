"""Check that the installed MuJoCo simulates LIBERO as published policies saw it.

LIBERO pins no version of MuJoCo, and newer ones settle and colour its scenes differently. The
measurements are in docs/decisions/0011-mujoco-3.3.2.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from verl_vla.core.errors import ConfigError

REMEDY = "pip install mujoco==3.3.2"


@dataclass(frozen=True, slots=True)
class KnownDifference:
    """Versions of MuJoCo that do not reproduce LIBERO, and the difference."""

    versions: SpecifierSet
    says: str


KNOWN_DIFFERENCES = (
    KnownDifference(
        SpecifierSet(">=3.4.0"),
        "contacts settle differently: the bowl of LIBERO-Spatial task 5 hangs on the rim of the "
        "ramekin, 35 mm aside, and a published policy's success there falls from 98% to 12%; "
        "three cartons of LIBERO-10 task 0 fly up by half a metre; floors are rendered a third "
        "darker",
    ),
    KnownDifference(
        SpecifierSet(">=3.3.3,<3.4.0"),
        "textures with an sRGB chunk are decoded differently: the floor of LIBERO-Object is "
        "rendered a third darker, and a published policy's success falls from 88% to 69%",
    ),
)
"""Sources. Bowl and colours: measured here on 3.3.2, 3.3.3, 3.3.4, 3.3.7, 3.4.0 and 3.8.1. Success:
RLinf issue 1460 (Spatial 5), openvla issue 335 (Object)."""


def known_difference(version: str) -> str | None:
    """Return what is known to differ from LIBERO under a version of MuJoCo, or None.

    Raises:
        ConfigError: ``version`` is not a version number.
    """
    try:
        parsed = Version(version)
    except InvalidVersion as error:
        raise ConfigError(f"mujoco says its version is {version!r}; {REMEDY}") from error
    for difference in KNOWN_DIFFERENCES:
        # by default packaging leaves release candidates out
        if difference.versions.contains(parsed, prereleases=True):
            return difference.says
    return None


def require_libero_physics() -> None:
    """Check the installed MuJoCo; reads its metadata and imports nothing.

    Raises:
        ConfigError: it is not installed, or its physics or colours are known to differ.
    """
    try:
        version = metadata.version("mujoco")
    except metadata.PackageNotFoundError as error:
        raise ConfigError(f"MuJoCo is not installed; {REMEDY}") from error
    says = known_difference(version)
    if says is not None:
        raise ConfigError(f"mujoco is {version}, which does not simulate LIBERO: {says}; {REMEDY}")
