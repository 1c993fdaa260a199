"""Scripted expert that picks an object up from above and puts it into or onto something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from verl_vla.envs.experts.grasp import Grasp, choose_grasp
from verl_vla.envs.experts.motion import CLOSED, GAIN, OPEN, Expert, Floats
from verl_vla.envs.experts.scene import Scene

if TYPE_CHECKING:
    from verl_vla.envs.libero.simulator import Simulator

TURN_GAIN = 4.0
"""Action per radian of error; an action of 1 commands 0.5 rad."""
FASTEST_TURN = 0.6
FASTEST_CHANGE = 0.25
"""Largest change of the commanded translation from one step to the next."""
HOVER_M = 0.06
"""Smallest height above the grasp from which the hand comes down."""
CLEARANCE_M = 0.025
"""Height over other things at which hand and object travel."""
FREE_M = 0.03
"""Free space that the hand needs on either side of its path."""
NEAR_M, ASIDE_M = 0.006, 0.04
"""Sideways distances from the goal within which the hand may be down, and beyond which it must be
up."""
AT_M = 0.006
"""Distance within which a position counts as reached."""
AT_RAD = 0.1
"""Angle within which a direction counts as reached."""
GAP_M = 0.006
"""Gap between an object and the surface below when it is let go."""
CLOSING_STEPS = 7
OPENING_STEPS = 5
STILL_M = 0.0005
"""Movement in one step below which the hand counts as still."""
STILL_STEPS = 8
"""Number of still steps after which the hand cannot move on: it touches something, or the arm is
stretched out."""
LEAVE_M = 0.05
"""Height by which the hand rises from an object that it has put down."""
LOST_M = 0.04
"""Distance an object may slip from where it was gripped; beyond it, it is picked up again."""


class PickAndPlace(Expert):
    """Expert that approaches, grips, carries, lets go and leaves; starts over if the object slips.

    Each phase is one method; `act` calls the current one.
    """

    def __init__(self, simulator: Simulator, pace: float, height_error_m: float) -> None:
        """Read the goal of the task that ``simulator`` plays; see `Scene`.

        ``height_error_m`` is added to the object's height: 0 makes the expert exact, another value
        biased.
        """
        super().__init__(simulator, pace)
        self._scene = Scene(simulator)
        self._height_error_m = height_error_m
        self._has_lost = False
        self._translation = np.zeros(3)
        self._grasp = self._plan()
        self._held = np.zeros(3)
        self._rest = np.zeros(3)
        # infinitely far: the first step is no still one
        self._hand_before = np.full(3, np.inf)
        self._enter(self._approach)

    def act(self) -> Floats:
        """Return the action [7] for this moment; call it once per step."""
        self._steps += 1
        hand = self._simulator.gripper_position()
        is_still = np.linalg.norm(hand - self._hand_before) < STILL_M
        self._still_steps = self._still_steps + 1 if is_still else 0
        self._hand_before = hand
        return self._phase()

    @property
    def has_finished(self) -> bool:
        """True once the object was let go and the hand has left."""
        return self._phase == self._stay

    def has_missed(self) -> bool:
        """Return True where it continues without the object; only a biased expert does."""
        return self._has_lost

    def _enter(self, phase: Callable[[], Floats]) -> None:
        self._phase, self._steps, self._still_steps = phase, 0, 0

    def _plan(self) -> Grasp:
        grasp = choose_grasp(self._scene, self._simulator.gripper_rotation()[:, 0])
        return replace(grasp, position=grasp.position + [0.0, 0.0, self._height_error_m])

    def _approach(self) -> Floats:
        goal = self._grasp.position
        hand = self._simulator.gripper_position()
        is_there = np.linalg.norm(goal - hand) < AT_M and self._turn_left() < AT_RAD
        if is_there or self._still_steps >= STILL_STEPS:
            self._enter(self._grip)
            return self._move(goal, CLOSED)
        below = self._scene.fingers_below_m + CLEARANCE_M
        highest = self._scene.highest_on_the_way(hand, goal, FREE_M)
        height = max(goal[2] + HOVER_M, highest + below)
        return self._move(self._funnel(goal, goal, height), OPEN)

    def _grip(self) -> Floats:
        if self._steps > CLOSING_STEPS:
            # where the hand has hold of the object: a later difference means that it slips
            self._held = self._simulator.gripper_position() - self._scene.item_position
            self._enter(self._carry)
        return self._move(self._grasp.position, CLOSED)

    def _carry(self) -> Floats:
        scene = self._scene
        hand, item = self._simulator.gripper_position(), scene.item_position
        held = hand - item
        self._has_lost |= bool(np.linalg.norm(held - self._held) > LOST_M)
        if self._has_lost and self._height_error_m == 0:
            # a biased expert carries on without the object instead, so that its episode fails
            self._has_lost = False
            self._grasp = self._plan()
            self._enter(self._approach)
            return self._move(hand + [0.0, 0.0, HOVER_M], OPEN)
        goal = scene.goal_position
        bottom = scene.item.bottom
        below = hand[2] - bottom
        # the object's position goes to the goal, and the hand is off it by `held`
        rest = np.array([*(goal[:2] + held[:2]), goal[2] + GAP_M + below])
        rest[2] = max(rest[2], self._lowest_hand(rest))
        if np.linalg.norm(rest - hand) < AT_M or self._still_steps >= STILL_STEPS:
            self._rest = hand
            self._enter(self._let_go)
            return self._move(hand, OPEN)
        # the object's middle and the hand may not pass over the same things
        highest = max(
            scene.highest_on_the_way(item, goal, FREE_M),
            scene.highest_on_the_way(hand, rest, FREE_M),
        )
        height = max(rest[2], highest + below + CLEARANCE_M)
        over = self._funnel(rest, goal + held, height)
        # sideways only as far as it has risen: 0 at a clearance below the free height, 1 at it
        risen = (hand[2] - (height - CLEARANCE_M)) / CLEARANCE_M
        aside = rest[:2] - hand[:2]
        if np.linalg.norm(aside) > ASIDE_M:
            over[:2] = hand[:2] + aside * np.clip(risen, 0.0, 1.0)
        return self._move(over, CLOSED)

    def _let_go(self) -> Floats:
        if self._steps > OPENING_STEPS:
            self._enter(self._leave)
        return self._move(self._rest, OPEN)

    def _leave(self) -> Floats:
        goal = self._rest + [0.0, 0.0, LEAVE_M]
        if self._simulator.gripper_position()[2] > goal[2] - 2 * AT_M:
            self._enter(self._stay)
        return self._move(goal, OPEN)

    def _stay(self) -> Floats:
        return self._move(self._rest + [0.0, 0.0, LEAVE_M], OPEN)

    def _lowest_hand(self, place: Floats) -> float:
        """Return the lowest height of the hand at a position without touching anything, m."""
        reach = self._scene.hand_half_m * self._grasp.axis
        highest = self._scene.highest_on_the_way(place - reach, place + reach, FREE_M)
        return highest - self._scene.hand_above_m + AT_M

    def _funnel(self, goal: Floats, middle: Floats, height: float) -> Floats:
        """Return ``goal``, raised up to ``height`` while the hand is not yet above it."""
        aside = np.linalg.norm(goal[:2] - self._simulator.gripper_position()[:2])
        share = np.clip((aside - NEAR_M) / (ASIDE_M - NEAR_M), 0.0, 1.0)
        return np.array([*goal[:2], goal[2] + share * (height - goal[2])])

    def _turn(self) -> Floats:
        """Return the remaining rotation [3] to the grasp, hand pointing down; axis-angle, rad."""
        now = self._simulator.gripper_rotation()
        # either way round, as both fingers are alike: the nearer one
        axis = self._grasp.axis if now[:, 0] @ self._grasp.axis > 0 else -self._grasp.axis
        down = np.array([0.0, 0.0, -1.0])
        # columns: along the fingers, across them, along the hand
        wanted = np.stack([axis, np.cross(down, axis), down], axis=1)
        return _rotation_vector(wanted @ now.T)

    def _turn_left(self) -> float:
        return float(np.linalg.norm(self._turn()))

    def _move(self, target: Floats, gripper: float) -> Floats:
        wanted = _shorten(GAIN * (target - self._simulator.gripper_position()), self._pace)
        change = _shorten(wanted - self._translation, FASTEST_CHANGE)
        self._translation = self._translation + change
        turn = _shorten(TURN_GAIN * self._turn(), FASTEST_TURN)
        return np.array([*self._translation, *turn, gripper])


def _shorten(vector: Floats, longest: float) -> Floats:
    length = float(np.linalg.norm(vector))
    return vector * (longest / length) if length > longest else vector


def _rotation_vector(rotation: Floats) -> Floats:
    """Return the axis-angle vector [3], rad, of a rotation matrix [3, 3] well below half a turn."""
    # R - R^T is 2 sine [axis]x, and the trace 1 + 2 cosine (Rodrigues' formula)
    skew = rotation - rotation.T
    sine_axis = 0.5 * np.array([skew[2, 1], skew[0, 2], skew[1, 0]])
    sine, cosine = float(np.linalg.norm(sine_axis)), 0.5 * (float(np.trace(rotation)) - 1.0)
    return sine_axis * (np.arctan2(sine, cosine) / sine) if sine > 0.0 else sine_axis
