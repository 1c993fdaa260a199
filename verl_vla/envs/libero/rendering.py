"""Renderer of a simulator's images.

Importing this module imports MuJoCo, which then reads ``MUJOCO_GL``: call
`verl_vla.envs.libero.gl.prepare_gl` first.
"""

from __future__ import annotations

import atexit
from dataclasses import dataclass

import mujoco
import numpy as np
import numpy.typing as npt

from verl_vla.envs.libero.scene_change import CameraMove

COLLISION_GROUP = 0
"""Geom group of the collision shapes; robosuite does not render it."""
MOVED_CAMERA = "agentview"
"""The third-person view, the only one that a perturbation moves."""
HIDDEN_GROUP = 4
"""A geom group that MuJoCo does not render by default."""


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """Options of rendering; every value other than the default changes pixels."""

    size: int
    """Height and width, pixels."""
    has_shadows: bool = True
    is_antialiased: bool = True
    hidden_bodies: tuple[str, ...] = ()
    """Bodies whose visible shapes are left out, because no camera in use shows them."""
    camera_move: CameraMove | None = None
    """Movement of `MOVED_CAMERA` from its original pose."""


class Renderer:
    """Renderer of one model; made at the first image, since a GL context costs a second."""

    def __init__(self, model: mujoco.MjModel, look: RenderOptions) -> None:
        # before the GL context is made, which reads shadows and samples once
        _apply(look, model)
        self._options = mujoco.MjvOption()
        # robosuite shows the shapes that are seen, not those that collide
        self._options.geomgroup[COLLISION_GROUP] = 0
        self._renderer = mujoco.Renderer(model, look.size, look.size)
        atexit.register(self.close)  # before MuJoCo's own handler, after which freeing fails

    def render(self, data: mujoco.MjData, camera: str) -> npt.NDArray[np.uint8]:
        """Render one camera: [size, size, 3] RGB, upright, mirrored as LIBERO's policies see it.

        LIBERO's own images are upside down. openvla-oft turns them by 180 degrees
        (``experiments/robot/libero/libero_utils.py:33``), so left and right are swapped.
        """
        self._renderer.update_scene(data, camera, self._options)
        return np.ascontiguousarray(self._renderer.render()[:, ::-1])

    def close(self) -> None:
        """Free the GL context."""
        atexit.unregister(self.close)
        # freeing deletes GL objects by number in the current context, which may be another's
        context = self._renderer._gl_context
        if context is not None:
            context.make_current()
        self._renderer.close()


def _apply(look: RenderOptions, model: mujoco.MjModel) -> None:
    # MuJoCo refuses a renderer that is larger than the model's buffer
    model.vis.global_.offwidth = max(model.vis.global_.offwidth, look.size)
    model.vis.global_.offheight = max(model.vis.global_.offheight, look.size)
    if not look.has_shadows:
        model.vis.quality.shadowsize = 0
    if not look.is_antialiased:
        model.vis.quality.offsamples = 0
    hidden = [model.body(name).id for name in look.hidden_bodies]
    is_hidden = np.isin(model.geom_bodyid, hidden) & (model.geom_group != COLLISION_GROUP)
    model.geom_group[is_hidden] = HIDDEN_GROUP
    if look.camera_move is not None:
        camera = model.camera(MOVED_CAMERA).id
        model.cam_pos[camera], model.cam_quat[camera] = look.camera_move.move(
            model.cam_pos[camera].copy(), model.cam_quat[camera].copy()
        )
