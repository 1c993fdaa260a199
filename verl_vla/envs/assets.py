"""Where LIBERO's files lie, and how to import LIBERO without its side effects.

LIBERO's first import asks a question on stdin and writes to the user's home unless
``LIBERO_CONFIG_PATH`` holds a config; `import_libero` points it at a temporary one. The meshes and
textures of the five suites are no part of the wheel; `find_assets` says where they are.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verl_vla.envs.gl import prepare_gl
from verl_vla.errors import ConfigError

ASSETS_VARIABLE = "VERL_VLA_LIBERO_ASSETS"
CACHED_ASSETS = Path("~/.cache/libero/assets")
"""Where hf-libero keeps its download."""
ASSETS_REPOSITORY = "lerobot/libero-assets"
"""The dataset on the Hugging Face hub that hf-libero downloads; its `utils/download_utils.py`."""
STANDINS_FILE = "STANDINS.json"
"""In a folder of assets that is not complete: the list of those that something else stands for."""
ASSET_FOLDERS = (
    "articulated_objects",
    "scenes",
    "stable_hope_objects",
    "stable_scanned_objects",
    "textures",
    "turbosquid_objects",
)


def libero_root() -> Path:
    """Return the folder of the inner ``libero`` package without importing it.

    Raises:
        ConfigError: hf-libero is not installed.
    """
    spec = importlib.util.find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("LIBERO is not installed; `pip install hf-libero==0.1.4`")
    return Path(next(iter(spec.submodule_search_locations))) / "libero"


def import_libero() -> Any:
    """Import ``libero.libero``: no question on stdin, nothing written to the user's home.

    Raises:
        ConfigError: LIBERO is not installed, or there is nothing to render with.
    """
    if "libero.libero" not in sys.modules:
        prepare_gl()
        logging.getLogger("robosuite_logs").addFilter(_is_news)
        os.environ["LIBERO_CONFIG_PATH"] = _write_config(libero_root())
    return importlib.import_module("libero.libero")


@contextmanager
def asset_folder(folder: Path) -> Generator[None]:
    """Let LIBERO load its meshes and textures from ``folder`` while the block runs."""
    libero = import_libero()
    before = libero._assets_path_cache
    libero._assets_path_cache = str(folder)
    try:
        yield
    finally:
        libero._assets_path_cache = before


def assets_available() -> bool:
    """Say whether LIBERO's assets are on this machine; imports and downloads nothing."""
    return _local_assets() is not None


def find_assets() -> Path:
    """Return the folder of LIBERO's assets, downloading them where a hub can be reached.

    Raises:
        ConfigError: ``VERL_VLA_LIBERO_ASSETS`` is wrong, or they are nowhere and cannot be had.
    """
    found = _local_assets()
    if found is not None:
        return found
    if ASSETS_VARIABLE in os.environ:
        folder = os.environ[ASSETS_VARIABLE]
        raise ConfigError(
            f"{ASSETS_VARIABLE}={folder} lacks {', '.join(_missing(Path(folder)))}; "
            "it must be the folder that holds them"
        )
    return _download()


def describe_assets(folder: Path) -> dict[str, Any]:
    """What makes two folders of assets draw the same pictures, without reading gigabytes.

    Returns:
        ``fingerprint``, of the names and sizes of all files, and ``standins``, the files that
        something else stands for.
    """
    sizes = sorted(
        f"{path.relative_to(folder)} {path.stat().st_size}\n"
        for path in folder.rglob("*")
        if path.is_file()
    )
    standins = folder / STANDINS_FILE
    return {
        "fingerprint": hashlib.sha256("".join(sizes).encode()).hexdigest()[:16],
        "standins": json.loads(standins.read_text()) if standins.exists() else [],
    }


def _local_assets() -> Path | None:
    if ASSETS_VARIABLE in os.environ:
        places = [Path(os.environ[ASSETS_VARIABLE])]
    else:
        places = [CACHED_ASSETS.expanduser()]
        if importlib.util.find_spec("libero") is not None:
            places.insert(0, libero_root() / "assets")
    return next((place.resolve() for place in places if not _missing(place)), None)


def _missing(folder: Path) -> list[str]:
    return [name for name in ASSET_FOLDERS if not (folder / name).is_dir()]


def _download() -> Path:
    # hf-libero's own download passes an argument that huggingface_hub 1.x no longer takes
    hub = importlib.import_module("huggingface_hub")
    target = CACHED_ASSETS.expanduser()
    try:
        hub.snapshot_download(repo_id=ASSETS_REPOSITORY, repo_type="dataset", local_dir=target)
    except Exception as error:  # the network fails in too many ways to name
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"LIBERO's assets are not on this machine and {ASSETS_REPOSITORY} cannot be downloaded "
            f"({type(error).__name__}: {reason}); export {ASSETS_VARIABLE}=FOLDER with a copy, or "
            "start once where a hub can be reached. The suite 'mini' needs none of them"
        ) from error
    if _missing(target):
        raise ConfigError(f"{ASSETS_REPOSITORY} came without {', '.join(_missing(target))}")
    return target


def _is_news(record: logging.LogRecord) -> bool:
    return "macro" not in record.getMessage()  # three lines at each import, on an optional file


def _write_config(root: Path) -> str:
    folder = tempfile.mkdtemp(prefix="verl-vla-libero-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    places = {
        "benchmark_root": root,
        "bddl_files": root / "bddl_files",
        "init_states": root / "init_files",
        "datasets": root.parent / "datasets",
        "assets": root / "assets",
    }
    lines = [f"{key}: {place}\n" for key, place in places.items()]
    (Path(folder) / "config.yaml").write_text("".join(lines))
    return folder
