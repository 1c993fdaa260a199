"""Grasps of an object from above, computed from its shape.

An object that fits between the fingers is gripped across, near its top; a wider one at its rim,
with one finger inside. The chosen direction is narrow, free of neighbours and near the hand's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from verl_vla.envs.experts.boxes import Boxes
from verl_vla.envs.experts.scene import Scene

Floats = npt.NDArray[np.float64]

WIDEST_M = 0.07
"""Largest width that is gripped across; the fingers open 0.076 m."""
DEPTH_M = 0.024
"""Largest depth of the point between the fingertips below the top of an object."""
RIM_DEPTH_M = 0.015
"""Depth of the point between the fingertips below the top of a rim."""
FLOOR_M = 0.003
"""Smallest gap between the fingertips and the surface that the object stands on."""
PAD_M = 0.008
"""Half the height of the part of the object that the finger pads hold."""
TURNS_RAD = np.deg2rad(np.arange(-90.0, 90.0, 5.0))
"""Directions that are tried, relative to the hand's present one."""
OPENING_M = np.array([0.045, 0.06])
"""Distances from the middle at which an open finger begins and ends; panda_gripper.xml."""
TURN_COST_M = 0.02
"""Width that a turn of 1 rad costs, so that among equally wide directions the nearest is chosen."""
CROWDING_COST = 10.0
"""Width, m, that a metre of overlap with a neighbour costs."""
RIM_SECTOR = np.cos(np.deg2rad(20.0))
"""Cosine of the angle around a direction within which corners count as the rim there."""


@dataclass(frozen=True, slots=True)
class Grasp:
    """A grasp: target of the point between the fingertips, and the direction of closing."""

    position: Floats
    """[3] m, target of the point between the fingertips."""
    axis: Floats
    """[3] horizontal unit vector along which the fingers close."""


def choose_grasp(scene: Scene, axis: Floats) -> Grasp:
    """Choose the best grasp of the item for a hand whose fingers move along ``axis`` [3] now."""
    ahead = np.arctan2(axis[1], axis[0])
    item, others = scene.item, scene.others
    costs: list[float] = []
    grasps: list[Grasp] = []
    for turn in TURNS_RAD:
        direction = np.array([np.cos(ahead + turn), np.sin(ahead + turn), 0.0])
        for grasp, width in _grasps(scene, item, direction):
            crowding = _crowding(scene, others, grasp)
            costs.append(width + TURN_COST_M * abs(turn) + CROWDING_COST * crowding)
            grasps.append(grasp)
    return grasps[int(np.argmin(costs))]


def _grasps(scene: Scene, item: Boxes, axis: Floats) -> list[tuple[Grasp, float]]:
    """Return the grasps along one direction, each with the width between the fingers, m."""
    lowest = item.bottom + scene.fingers_below_m + FLOOR_M
    # as deep as hand and fingers allow, but neither into the surface below nor over the object
    height = max(item.top - min(DEPTH_M, scene.hand_above_m), min(lowest, item.top))
    # only what the pads hold counts: an object may be wider further down
    held = item.between(height - PAD_M, height + PAD_M).corners.reshape(-1, 3)
    low, high = (held @ axis).min(), (held @ axis).max()
    if high - low <= WIDEST_M:
        across = np.array([-axis[1], axis[0], 0.0])
        # twice the middle of the held part across the closing direction
        along = (held @ across).min() + (held @ across).max()
        middle = 0.5 * ((low + high) * axis + along * across)
        return [(Grasp(np.array([*middle[:2], height]), axis), float(high - low))]
    return [
        (Grasp(_rim(item, scene.item_position, side), axis), WIDEST_M) for side in (axis, -axis)
    ]


def _rim(item: Boxes, middle: Floats, outward: Floats) -> Floats:
    """Return the grasp point on the rim in a direction, [3] m."""
    corners = item.corners.reshape(-1, 3)
    upper = corners[corners[:, 2] > item.top - RIM_DEPTH_M]
    offsets = upper[:, :2] - middle[:2]
    away = offsets @ outward[:2]
    facing = away >= RIM_SECTOR * np.linalg.norm(offsets, axis=1)
    radius = np.median(away[facing]) if facing.any() else away.max()
    return np.array([*(middle[:2] + radius * outward[:2]), item.top - RIM_DEPTH_M])


def _crowding(scene: Scene, others: Boxes, grasp: Grasp) -> float:
    """Return how deep the open fingers and the hand would reach into neighbours, summed, m."""
    fingers = np.concatenate([-OPENING_M, OPENING_M])
    hand = np.linspace(-scene.hand_half_m, scene.hand_half_m, 5)
    tops = others.tops_over(
        grasp.position[:2] + np.concatenate([fingers, hand])[:, None] * grasp.axis[:2], 0.01
    )
    # what must be free below the fingertips, and below the hand
    lowest = grasp.position[2] + np.concatenate(
        [np.full(len(fingers), -scene.fingers_below_m), np.full(len(hand), scene.hand_above_m)]
    )
    return float(np.maximum(tops - lowest, 0.0).sum())
