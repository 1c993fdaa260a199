"""Building LIBERO's problems.

Importing this module imports robosuite and LIBERO: call
`verl_vla.envs.libero.assets.import_libero` first.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from libero.libero.envs.arenas.style import FLOOR_STYLE, WALL_STYLE
from libero.libero.envs.env_wrapper import ControlEnv

from verl_vla.envs.libero.scene_change import SceneChange

CONTROLLER = "OSC_POSE"


def build_problem(bddl_file: Path, change: SceneChange) -> Any:
    """Build a problem of LIBERO's, without its wrapper, and reset it once."""
    wrapper = ControlEnv(
        bddl_file_name=str(bddl_file),
        controller=CONTROLLER,
        has_offscreen_renderer=False,
        use_camera_obs=False,
        hard_reset=False,
        ignore_done=True,
        **_scene_arguments(change),
    )
    env = wrapper.env
    if change.arm_rad is not None:
        env.robots[0].init_qpos = np.array(change.arm_rad)
    # A stock environment rebuilds its model at the first reset and thereby lists these twice; each
    # draws a random number, and the places of the fixtures follow from the numbers after it
    env.object_property_initializers *= 2
    np.random.seed(0)
    wrapper.reset()
    return env


def _scene_arguments(change: SceneChange) -> dict[str, Any]:
    """Arguments of LIBERO's problem; none of a task whose scene is as its class has it."""
    if change.floor is None or change.wall is None:
        return {}
    # LIBERO names textures by styles and knows a part of those that are among its assets
    FLOOR_STYLE[change.floor], WALL_STYLE[change.wall] = change.floor, change.wall
    return {"scene_properties": {"floor_style": change.floor, "wall_style": change.wall}}


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Let LIBERO draw from numpy's global generator and leave no trace of it."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def trim_heap() -> None:
    """Give memory that is free back to the system."""
    # the compiler of a model leaves 100 MB of freed memory that glibc would keep
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
