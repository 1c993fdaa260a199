"""Check that the asset files that a simulator reads are present, with a remedy if not.

`verl_vla.envs.libero.assets` finds the folder and knows the content of each file. A copy from the
Hugging Face hub lacks the files that only LIBERO-PRO uses and those that no model refers to
(sources of meshes), so a rule decides which files are needed: every model that hf-libero's objects
and problems name, every texture of their styles, and every file that such a model refers to. Models
of LIBERO-PRO's objects are needed only for suites with such objects.
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
"""Asset folders of hf-libero's ``envs/objects/*.py``, which hold a folder and model per object."""
_QUOTED = re.compile(r"[\"']([\w./-]+)[\"']")
_STYLE = re.compile(r'"([\w-]+)": "([\w-]+\.png)"')
_REFERENCE = re.compile(r'file="([^"]+)"')
_SHOWN = 3
"""Number of names that a message lists."""


def absent_assets(folder: Path) -> list[str]:
    """Return the files, in order, that LIBERO's own suites read and that an asset folder lacks.

    Names are relative to the folder. The files that an absent model refers to are not known, so
    they are listed only where another model needs them too.
    """
    return _absent(folder, _named_by_libero())


def absent_models(folder: Path, objects: Iterable[str]) -> list[str]:
    """Return the files that objects, given by their folders' names, need and the assets lack."""
    return _absent(folder, frozenset(objects))


def describe_faults(folder: Path) -> str | None:
    """Describe the files that are absent or have another content; None where all are LIBERO's.

    Reads 600 MB.
    """
    found = ((absent_assets(folder), "absent"), (differing_assets(folder), "not LIBERO's"))
    said = [f"{len(names)} files {how}, the first {names[0]}" for names, how in found if names]
    return "; ".join(said) if said else None


def remedy_for_assets() -> str:
    """Return the remedy: another folder where the variable names one, else the install command."""
    if ASSETS_VARIABLE in os.environ:
        return f"unset {ASSETS_VARIABLE}, or name a folder of LIBERO's assets"
    return INSTALL_ASSETS


def check_assets() -> None:
    """Find the assets and compare them with LIBERO's; the installation does this once.

    Raises:
        ConfigError: no assets are found, a file is absent, or one has another content.
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
        folder: the asset folder.
        suite: name of the suite, for the message.
        objects: names of the folders that hold the models.

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
    # a list of what is needed so far: the set grows in the loop
    for model in [name for name in needed if name.endswith(".xml") and (folder / name).is_file()]:
        text = (folder / model).read_text(encoding="utf-8")
        files = (posixpath.join(posixpath.dirname(model), f) for f in _REFERENCE.findall(text))
        # LIBERO's release lacks a few files that its models refer to and never render
        needed |= {posixpath.normpath(file) for file in files} & known.keys()
    return sorted(name for name in needed if not (folder / name).is_file())


def _models(names: frozenset[str]) -> set[str]:
    """Return the paths that models of these names can have, and the names, which may be paths."""
    return {
        *names,
        *(f"articulated_objects/{name}.xml" for name in names),
        *(f"{folder}/{name}/{name}.xml" for folder in _OBJECT_FOLDERS for name in names),
    }


@cache
def _named_by_libero() -> frozenset[str]:
    """Return all quoted words of hf-libero's objects and problems, and textures of its styles.

    The sources are read as text. Only styles that a problem names count, since hf-libero lists more
    textures than its tasks render.
    """
    envs = libero_root() / "envs"
    files = [*(envs / "objects").glob("*.py"), *(envs / "problems").glob("*.py")]
    words = {word for file in files for word in _QUOTED.findall(file.read_text(encoding="utf-8"))}
    styles = _STYLE.findall((envs / "arenas" / "style.py").read_text(encoding="utf-8"))
    return frozenset(words | {f"textures/{texture}" for style, texture in styles if style in words})
