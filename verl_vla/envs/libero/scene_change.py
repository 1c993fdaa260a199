"""Changes of a perturbed task to a simulator, besides its objects: data, without MuJoCo."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

from verl_vla.core.errors import ContractError

PIVOT_M = (0.0, 0.0, 0.8)
"""Point that the camera moves around, in every scene (LIBERO-Plus ``envs/problems/*.py``)."""
DECIMALS = 4
"""Number of decimals that LIBERO-Plus rounds a camera's pose to, after each of its moves."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraMove:
    """A movement of the third-person camera; the moves are applied in LIBERO-Plus's order."""

    around_deg: int = 0
    """Orbit around the vertical axis, counter-clockwise from above; the camera keeps its aim."""
    over_deg: int = 0
    """Orbit around the horizontal axis through `PIVOT_M`, upwards."""
    distance: float = 1.0
    """Factor of the distance from `PIVOT_M`."""
    pan_deg: int = 0
    """Rotation around the vertical axis in place, so that the aim changes."""
    tilt_deg: int = 0
    """Rotation around the horizontal axis in place."""

    def move(self, position: Floats, quaternion: Floats) -> tuple[Floats, Floats]:
        """Return the new position [3] m and orientation [4] (w, x, y, z)."""
        pivot = np.array(PIVOT_M)
        # scipy's quaternions are (x, y, z, w), MuJoCo's (w, x, y, z)
        turn = Rotation.from_quat(quaternion[[1, 2, 3, 0]])
        over, around = _about_y(self.over_deg), _about_z(self.around_deg)
        # skipped where there is none, as in LIBERO-Plus, since each move rounds
        if self.over_deg:
            position = _round(over.apply(position - pivot) + pivot)
            turn = _rounded(over * turn)
        # always, as in LIBERO-Plus: an orbit by 0 degrees rounds too
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
    """The properties of a task that its BDDL file does not define; by default nothing changes."""

    camera: CameraMove | None = None
    """Movement of the third-person view; the wrist camera is never moved."""
    noise: int = 0
    """Kind and strength of the third-person image's noise, 1..50; 0 is none. See
    `verl_vla.envs.libero.image_noise.disturb`."""
    arm_rad: tuple[float, ...] | None = None
    """Seven joint angles of the arm at the reset. An init state sets the joints again, as in
    published evaluations; only the orientation and posture that the controller seeks remain."""
    floor: str | None = None
    """File of the floor among LIBERO's textures."""
    wall: str | None = None
    """File of the wall among LIBERO's textures; set if `floor` is, as LIBERO sets both or none."""

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
    # LIBERO-Plus rounds with Python's round, which differs from numpy's on near-ties
    return np.array([round(float(value), DECIMALS) for value in values])
