"""Which files among the assets a simulator reads, and what to do where some are not there.

`verl_vla.envs.libero.assets` finds the folder and knows the content of each file. A copy from the
Hugging Face hub lacks what only LIBERO-PRO uses and what no model refers to (sources of meshes), so
absence is judged by a rule: needed is every model that hf-libero's objects and problems name, every
texture of their styles, and every file that such a model refers to. Models of LIBERO-PRO's objects
are needed for those alone.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from verl_vla.core.errors import ConfigError
from verl_vla.envs.libero.assets import (
    ASSETS_VARIABLE,
    INSTALL_ASSETS,
    differing_assets,
    find_assets,
    known_assets,
    libero_root,
)

_OBJECT_FOLDERS = ("stable_hope_objects", "stable_scanned_objects", "turbosquid_objects")
"""Of hf-libero's ``envs/objects/*.py``: a folder and a model by an object's name."""
_QUOTED = re.compile(r"[\"']([\w./-]+)[\"']")
_STYLE = re.compile(r'"([\w-]+)": "([\w-]+\.png)"')
_REFERENCE = re.compile(r'file="([^"]+)"')
_SHOWN = 3
"""Names that a message lists before it breaks off."""


def absent_assets(folder: Path) -> list[str]:
    """Files that LIBERO's own suites read and that a folder of assets lacks, in order.

    Names are relative to the folder. What an absent model refers to is not known, so it is listed
    only where another model needs it too.
    """
    return _absent(folder, _named_by_libero())


def absent_models(folder: Path, objects: Iterable[str]) -> list[str]:
    """Files that some objects, given by their folders' names, need and a folder of assets lacks."""
    return _absent(folder, frozenset(objects))


def describe_faults(folder: Path) -> str | None:
    """Say which files are absent and which have another content; None where all are LIBERO's.

    Reads 600 MB.
    """
    found = ((absent_assets(folder), "absent"), (differing_assets(folder), "not LIBERO's"))
    said = [f"{len(names)} files {how}, the first {names[0]}" for names, how in found if names]
    return "; ".join(said) if said else None


def remedy_for_assets() -> str:
    """A folder that was named is mended by naming another, the installed one by its command."""
    if ASSETS_VARIABLE in os.environ:
        return f"unset {ASSETS_VARIABLE}, or name a folder of LIBERO's assets"
    return INSTALL_ASSETS


def check_assets() -> None:
    """Find the assets and compare them with LIBERO's; set-up does this once.

    Raises:
        ConfigError: they are nowhere, a file is absent, or one has another content.
    """
    folder = find_assets()
    faults = describe_faults(folder)
    if faults is not None:
        raise ConfigError(
            f"LIBERO's assets in {folder}: {faults}; images rendered from them are not those that "
            f"policies were trained on. Remedy: {remedy_for_assets()}"
        )


def require_models(folder: Path, suite: str, objects: Iterable[str]) -> None:
    """Refuse a suite whose objects' models a folder of assets lacks.

    Args:
        folder: the assets.
        suite: its name, for the message.
        objects: names of the folders that the models lie in.

    Raises:
        ConfigError: files are absent.
    """
    absent = absent_models(folder, objects)
    if absent:
        shown = ", ".join(absent[:_SHOWN]) + (", .." if len(absent) > _SHOWN else "")
        raise ConfigError(
            f"{suite} needs {len(absent)} files that {folder} lacks ({shown}); other copies of "
            f"LIBERO's assets hold no objects of LIBERO-PRO. Remedy: {remedy_for_assets()}"
        )


def _absent(folder: Path, names: frozenset[str]) -> list[str]:
    known = known_assets()
    needed = {name for name in _models(names) if name in known}
    for model in [name for name in needed if name.endswith(".xml") and (folder / name).is_file()]:
        text = (folder / model).read_text(encoding="utf-8")
        files = (posixpath.join(posixpath.dirname(model), f) for f in _REFERENCE.findall(text))
        # LIBERO's release lacks a few files that its models refer to and never render
        needed |= {posixpath.normpath(file) for file in files} & known.keys()
    return sorted(name for name in needed if not (folder / name).is_file())


def _models(names: frozenset[str]) -> set[str]:
    """Where models of these names would lie, and the names themselves, which may be paths."""
    return {
        *names,
        *(f"articulated_objects/{name}.xml" for name in names),
        *(f"{folder}/{name}/{name}.xml" for folder in _OBJECT_FOLDERS for name in names),
    }


@cache
def _named_by_libero() -> frozenset[str]:
    """Quoted words of hf-libero's objects and problems, read as text, and textures of its styles.

    Of the styles those that a problem names: hf-libero lists more textures than its tasks draw.
    """
    envs = libero_root() / "envs"
    files = [*(envs / "objects").glob("*.py"), *(envs / "problems").glob("*.py")]
    words = {word for file in files for word in _QUOTED.findall(file.read_text(encoding="utf-8"))}
    styles = _STYLE.findall((envs / "arenas" / "style.py").read_text(encoding="utf-8"))
    return frozenset(words | {f"textures/{texture}" for style, texture in styles if style in words})
