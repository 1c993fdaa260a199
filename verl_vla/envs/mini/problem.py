"""The mini suite's table-top problem, and its objects, which are registered when imported.

Importing this module imports LIBERO and robosuite: call
`verl_vla.envs.libero.assets.import_libero` first, and build the problem within
`asset_folder(ASSETS)`. The objects come from robosuite's wheel or are primitives, so none
of LIBERO's assets are needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from libero.libero.envs import TASK_MAPPING
from libero.libero.envs.base_object import register_object
from libero.libero.envs.bddl_base_domain import register_problem
from libero.libero.envs.regions import REGION_SAMPLERS, TableRegionSampler
from robosuite.models.objects import BoxObject, CanObject, CylinderObject, MilkObject

from verl_vla.envs.mini import (
    ASSETS,
    CUBE_HALF_M,
    EYE_M,
    LOOK_AT_M,
    PLATE_HALF_HEIGHT_M,
    PLATE_RADIUS_M,
    START_JOINTS_RAD,
)

_FRICTION = (1.0, 0.005, 0.0001)
_CUBE: dict[str, Any] = {
    "size": (CUBE_HALF_M,) * 3,
    "density": 200.0,
    "friction": _FRICTION,
    "solref": (0.01, 1.0),
}

# `register_problem` returns nothing, so LIBERO's module holds None under the name of the class
_Tabletop: Any = TASK_MAPPING["libero_tabletop_manipulation"]


class Mini_Tabletop(_Tabletop):  # noqa: N801 -- LIBERO finds a problem by its lower-case class name
    """LIBERO's table top with the mini suite's arena, camera and start pose."""

    def __init__(self, bddl_file_name: str, *args: Any, **kwargs: Any) -> None:
        kwargs["scene_xml"] = str(ASSETS / "mini_table.xml")
        super().__init__(bddl_file_name, *args, **kwargs)

    def _load_robots(self) -> None:
        super()._load_robots()
        self.robots[0].init_qpos = np.array(START_JOINTS_RAD)

    def _setup_camera(self, mujoco_arena: Any) -> None:
        super()._setup_camera(mujoco_arena)
        mujoco_arena.set_camera(camera_name="agentview", pos=EYE_M, quat=look_at(EYE_M, LOOK_AT_M))


def look_at(eye: tuple[float, ...], target: tuple[float, ...]) -> npt.NDArray[np.float64]:
    """Return the orientation [4] (w, x, y, z) of a camera at ``eye`` that looks at ``target``."""
    # columns right, up, backward: a MuJoCo camera looks along -z
    backward = np.subtract(eye, target)
    backward /= np.linalg.norm(backward)
    right = np.cross([0.0, 0.0, 1.0], backward)
    right /= np.linalg.norm(right)
    up = np.cross(backward, right)
    # from matrix to quaternion by the trace; w is 0.6 for this camera, so it can be divided by
    w = np.sqrt(1.0 + right[0] + up[1] + backward[2]) / 2.0
    skew = [up[2] - backward[1], backward[0] - right[2], right[1] - up[0]]
    return np.array([w, *np.divide(skew, 4.0 * w)])


@register_object
class MiniRedCube(BoxObject):
    """A red cube that fits the gripper."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, rgba=(0.85, 0.08, 0.08, 1.0), **_CUBE)
        _describe(self, "mini_red_cube")


@register_object
class MiniBlueCube(BoxObject):
    """A blue cube of the same size."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, rgba=(0.1, 0.2, 0.85, 1.0), **_CUBE)
        _describe(self, "mini_blue_cube")


@register_object
class MiniWhitePlate(CylinderObject):
    """A flat disc, heavy enough to stay where it is."""

    def __init__(self, name: str) -> None:
        super().__init__(
            name=name,
            size=(PLATE_RADIUS_M, PLATE_HALF_HEIGHT_M),
            rgba=(0.97, 0.97, 1.0, 1.0),
            density=5000.0,
            friction=_FRICTION,
        )
        _describe(self, "mini_white_plate")


@register_object
class MiniCan(CanObject):
    """The soda can of robosuite's wheel."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        _describe(self, "mini_can")


@register_object
class MiniMilk(MilkObject):
    """The milk carton of robosuite's wheel."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        _describe(self, "mini_milk")


def _describe(thing: Any, category: str) -> None:
    """Set the attributes that LIBERO requires of every object."""
    thing.category_name = category
    thing.rotation, thing.rotation_axis = (0.0, 0.0), "z"
    thing.object_properties = {"vis_site_names": {}}


def register_mini_problem() -> None:
    """Make the problem known to LIBERO's BDDL machinery; a second call changes nothing."""
    register_problem(Mini_Tabletop)
    # LIBERO looks a problem's samplers up by its name
    REGION_SAMPLERS["mini_tabletop"] = {"table": TableRegionSampler}
