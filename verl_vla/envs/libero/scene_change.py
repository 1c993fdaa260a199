"""What a perturbed task changes in a simulator besides its objects: data, without MuJoCo."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

from verl_vla.core.errors import ContractError

PIVOT_M = (0.0, 0.0, 0.8)
"""LIBERO-Plus ``envs/problems/*.py``: what the camera moves around, in every scene."""
DECIMALS = 4
"""To which LIBERO-Plus rounds a camera's pose, after each of its moves."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraMove:
    """How the third-person camera leaves its place, in LIBERO-Plus's order of moves."""

    around_deg: int = 0
    """Around the vertical axis, counter-clockwise seen from above; the camera keeps its aim."""
    over_deg: int = 0
    """Around the horizontal axis through `PIVOT_M`, upwards."""
    distance: float = 1.0
    """From `PIVOT_M`, as a multiple."""
    pan_deg: int = 0
    """Around the vertical axis in place, so that the aim changes."""
    tilt_deg: int = 0
    """Around the horizontal axis in place."""

    def move(self, position: Floats, quaternion: Floats) -> tuple[Floats, Floats]:
        """Return the new position [3] m and orientation [4] (w, x, y, z)."""
        pivot = np.array(PIVOT_M)
        turn = Rotation.from_quat(quaternion[[1, 2, 3, 0]])
        over, around = _about_y(self.over_deg), _about_z(self.around_deg)
        if self.over_deg:
            position = _round(over.apply(position - pivot) + pivot)
            turn = _rounded(over * turn)
        position, turn = _round(around.apply(position)), _rounded(around * turn)
        if self.distance != 1.0:
            position = _round(pivot + (position - pivot) * self.distance)
        if self.pan_deg:
            turn = _rounded(_about_z(self.pan_deg) * turn)
        if self.tilt_deg:
            turn = _rounded(_about_y(self.tilt_deg) * turn)
        return position, turn.as_quat()[[3, 0, 1, 2]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneChange:
    """Everything of a task that its BDDL file does not say; unchanged where nothing is set."""

    camera: CameraMove | None = None
    """Of the third-person view; the wrist camera is never moved."""
    noise: int = 0
    """Kind and strength of the third-person image's disturbance, 1..50; 0 is none. See
    `verl_vla.envs.libero.image_noise.disturb`."""
    arm_rad: tuple[float, ...] | None = None
    """Seven joints of the arm at the reset. An init state sets them again, as in published
    evaluations, so what stays is the orientation and the posture that the controller seeks."""
    floor: str | None = None
    """File among LIBERO's textures."""
    wall: str | None = None
    """File among LIBERO's textures; set where `floor` is, as LIBERO sets both or none."""

    def __post_init__(self) -> None:
        if (self.floor is None) != (self.wall is None):
            raise ContractError(
                f"a scene has floor {self.floor!r} and wall {self.wall!r}; set both or neither"
            )


UNCHANGED = SceneChange()


def _about_y(degrees: int) -> Rotation:
    return Rotation.from_euler("y", -degrees, degrees=True)


def _about_z(degrees: int) -> Rotation:
    return Rotation.from_euler("z", degrees, degrees=True)


def _rounded(turn: Rotation) -> Rotation:
    return Rotation.from_quat(_round(turn.as_quat()))


def _round(values: Floats) -> Floats:
    # numpy rounds ties in another way than Python, whose rounding theirs is
    return np.array([round(float(value), DECIMALS) for value in values])
