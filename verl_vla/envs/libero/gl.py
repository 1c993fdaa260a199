"""Choice of the GL backend that simulators render with, made before MuJoCo is imported."""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Mapping, MutableMapping

from verl_vla.core.errors import ConfigError
from verl_vla.core.text import nearest

LIBRARIES: Mapping[str, str] = {"egl": "libEGL.so.1", "osmesa": "libOSMesa.so.8"}
"""Shared library that each of MuJoCo's headless backends loads, in order of preference."""

REMEDY = (
    "install a headless GL, e.g. `apt-get install libegl1 libgl1-mesa-dri` (or `libosmesa6` with "
    "MUJOCO_GL=osmesa)"
)


def prepare_gl(environ: MutableMapping[str, str] = os.environ) -> str:
    """Choose a headless GL backend and write it to ``environ``; keep a choice already made.

    A software renderer gets one thread per process (``LP_NUM_THREADS``), since there is one
    simulator process per core.

    Returns:
        The value of ``MUJOCO_GL``, e.g. ``egl``.

    Raises:
        ConfigError: the chosen backend, or every backend, lacks its library.
    """
    # MuJoCo itself does not mind capitals, and PyOpenGL does
    chosen = environ["MUJOCO_GL"].lower().strip() if "MUJOCO_GL" in environ else ""
    if not chosen:
        found = [name for name, library in LIBRARIES.items() if _loads(library)]
        if not found:
            missing = " nor ".join(LIBRARIES.values())
            raise ConfigError(f"nothing to render with: neither {missing} was found; {REMEDY}")
        chosen = environ["MUJOCO_GL"] = found[0]
    if chosen not in LIBRARIES:
        raise ConfigError(f"MUJOCO_GL is {chosen!r}; {nearest(chosen, list(LIBRARIES))}")
    if not _loads(LIBRARIES[chosen]):
        raise ConfigError(f"MUJOCO_GL={chosen} needs {LIBRARIES[chosen]}, not found; {REMEDY}")
    environ["MUJOCO_GL"] = chosen
    # MuJoCo's contexts go through PyOpenGL, which has a setting of its own
    if environ.setdefault("PYOPENGL_PLATFORM", chosen) != chosen:
        raise ConfigError(
            f"PYOPENGL_PLATFORM is {environ['PYOPENGL_PLATFORM']} and MUJOCO_GL {chosen}, and both "
            f"choose what MuJoCo renders with; unset PYOPENGL_PLATFORM, or set it to {chosen}"
        )
    environ.setdefault("LP_NUM_THREADS", "1")
    return chosen


def check_gl() -> None:
    """Make a GL context and drop it; imports MuJoCo.

    Raises:
        ConfigError: the library is installed, but there is no device that it can render on.
    """
    chosen = prepare_gl()
    try:
        context = importlib.import_module("mujoco.gl_context").GLContext(64, 64)
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"MUJOCO_GL={chosen} makes no context ({error}); {REMEDY}") from error
    context.free()


def renderer_name() -> str:
    """Return the renderer's name, e.g. ``egl, llvmpipe (LLVM 15.0.6, 256 bits)``.

    Two renderers make different pixels of one scene.

    Raises:
        ConfigError: as in `prepare_gl`.
    """
    chosen = prepare_gl()
    context = importlib.import_module("mujoco.gl_context").GLContext(64, 64)
    try:
        context.make_current()
        gl = importlib.import_module("OpenGL.GL")
        return f"{chosen}, {gl.glGetString(gl.GL_RENDERER).decode()}"
    finally:
        context.free()


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
