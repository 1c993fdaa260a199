"""The shapes of a simulated scene as oriented boxes.

LIBERO builds the collision shapes of its objects from boxes, so for them this is exact; of any
other shape it is MuJoCo's own bounding box (``mjModel.geom_aabb``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

PLANE = 0
"""``mjtGeom.mjGEOM_PLANE``, which has no bounding box."""
CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=float)


@dataclass(frozen=True, slots=True)
class Boxes:
    """The poses and sizes of N boxes at one moment."""

    centres: Floats
    """[N, 3] m."""
    axes: Floats
    """[N, 3, 3] rotation matrices; a box's edges are the columns."""
    halves: Floats
    """[N, 3] half the edges, m."""

    @property
    def corners(self) -> Floats:
        """[N, 8, 3] m."""
        offsets = CORNERS * self.halves[:, None]
        # [N, 3, 3] and [N, 8, 3] -> [N, 8, 3], from the frames of the boxes to the world's
        return self.centres[:, None] + np.einsum("nij,nkj->nki", self.axes, offsets)

    @property
    def top(self) -> float:
        """Height of the highest corner, m."""
        return float(self.corners[..., 2].max())

    @property
    def bottom(self) -> float:
        """Height of the lowest corner, m."""
        return float(self.corners[..., 2].min())

    def between(self, low: float, high: float) -> Boxes:
        """Return the boxes that reach into a range of heights, m."""
        heights = self.corners[..., 2]
        chosen = (heights.min(1) <= high) & (heights.max(1) >= low)
        return Boxes(self.centres[chosen], self.axes[chosen], self.halves[chosen])

    def tops_over(self, places: Floats, margin: float) -> Floats:
        """Return the height of the boxes' upper side above each point of the ground plane.

        Args:
            places: [M, 2] m.
            margin: distance by which each box is enlarged on every side, m.

        Returns:
            [M] m; minus infinity where there is no box.
        """
        # a vertical line meets a box where it is between all three pairs of faces
        lines = np.concatenate([places, np.zeros((len(places), 1))], axis=1)
        # [M, N, 3]: where each line meets the ground, in the frame of each box
        starts = np.einsum("nji,mnj->mni", self.axes, lines[:, None] - self.centres)
        slopes = self.axes[:, 2, :]
        # a line along a pair of faces gets a tiny slope, so that it meets them far away
        slopes = np.where(np.abs(slopes) < 1e-9, 1e-9, slopes)
        faces = np.stack([-self.halves - margin, self.halves + margin])[:, None]
        heights = (faces - starts) / slopes
        # inside from the last pair that it enters to the first that it leaves
        enters, leaves = heights.min(0).max(-1), heights.max(0).min(-1)
        # less the margin, which widens a box but must not raise it
        return np.where(enters <= leaves, leaves - margin, -np.inf).max(1, initial=-np.inf)


def boxes_of(model: Any, data: Any, geoms: npt.NDArray[np.int64]) -> Boxes:
    """Return the boxes around some geoms of a MuJoCo model at the moment in ``data``."""
    axes = np.array(data.geom_xmat[geoms]).reshape(-1, 3, 3)
    bounds = np.array(model.geom_aabb[geoms])
    # MuJoCo keeps a geom's bounding box, (centre, half edges), in the frame of the geom
    centres = data.geom_xpos[geoms] + np.einsum("nij,nj->ni", axes, bounds[:, :3])
    return Boxes(centres, axes, bounds[:, 3:])


def colliding_geoms(model: Any, is_chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return the geoms, planes excepted, of the chosen bodies [nbody] that others can touch."""
    # two geoms can touch if a bit of one's contype is in the other's conaffinity
    collides = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
    return np.flatnonzero(
        collides & (model.geom_type != PLANE) & is_chosen[model.geom_bodyid]
    ).astype(np.int64)
