"""Compile ``fake_cuda.c``, once for each version of it, into the user's cache folder."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from verl_vla.core.errors import ConfigError

SOURCE = Path(__file__).with_name("fake_cuda.c")
HOST_DEFINES = Path(__file__).with_name("host_defines.h")
COMPILERS = ("cc", "gcc", "clang")
HEADER = "cuda_runtime_api.h"
SONAME = "libcuda.so.1"
"""Name of the driver's library: what PyTorch links to it then finds this one loaded."""
CACHE_VARIABLE = "XDG_CACHE_HOME"
"""Environment variable of the user's cache folder (XDG Base Directory Specification)."""


def shim_is_missing() -> str | None:
    """Return why the shim cannot be built on this machine, or None where it can."""
    if _compiler() is None:
        return (
            f"it needs a C compiler, and none of {', '.join(COMPILERS)} is installed; "
            "install one (Debian: apt install gcc)"
        )
    if _headers() is None:
        return (
            f"it needs CUDA's {HEADER}, which PyTorch's CUDA packages bring, and this PyTorch was "
            "installed without them; install torch from the package index"
        )
    return None


def build_shim() -> Path:
    """Return the shared library, compiled if this version of it was not yet.

    Raises:
        ConfigError: there is no compiler or no header, or the compiler refuses the source.
    """
    missing = shim_is_missing()
    if missing is not None:
        raise ConfigError(f"the dry run cannot be built: {missing}")
    compiler, headers = _compiler(), _headers()
    assert compiler is not None and headers is not None
    # all that the library is compiled from, so that another torch builds another one
    parts = (SOURCE.read_bytes(), HOST_DEFINES.read_bytes(), (headers / HEADER).read_bytes())
    digest = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    folder = _cache_folder() / f"fake_cuda-{digest}"
    library = folder / "libfake_cuda.so"
    if not library.is_file():
        (folder / "crt").mkdir(parents=True, exist_ok=True)
        shutil.copy(HOST_DEFINES, folder / "crt" / "host_defines.h")
        # beside it, and renamed: two processes may build it at the same time
        with TemporaryDirectory(dir=folder) as scratch:
            partial = Path(scratch) / library.name
            _compile(compiler, (folder, headers), partial)
            partial.replace(library)
    return library


def _compile(compiler: str, include: tuple[Path, ...], library: Path) -> None:
    command = [
        compiler,
        *("-shared", "-fPIC", "-O1", f"-Wl,-soname,{SONAME}"),
        *(f"-I{folder}" for folder in include),
        *(str(SOURCE), "-o", str(library), "-lpthread"),
    ]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ConfigError(
            f"the dry run cannot be built: '{' '.join(command)}' ended with {done.returncode}:\n"
            f"{done.stderr}"
        )


def _compiler() -> str | None:
    found = (shutil.which(name) for name in COMPILERS)
    return next((path for path in found if path is not None), None)


def _headers() -> Path | None:
    """Return the folder of CUDA's headers among the installed packages."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    for place in places:
        for header in sorted(Path(place).glob(f"*/include/{HEADER}")):
            return header.parent
    return None


def _cache_folder() -> Path:
    wanted = os.environ.get(CACHE_VARIABLE)
    root = Path(wanted) if wanted else Path("~/.cache").expanduser()
    return root / "verl_vla"
