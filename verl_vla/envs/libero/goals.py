"""Distances of a running LIBERO problem from its goals, read from the simulator's state.

A goal is one predicate of the conjunction in a task's BDDL file, e.g. ``(On bowl plate)``. LIBERO
only checks whether it holds; here its distance is measured too. Rewards and benchmarks use it, a
policy never.

Source of the predicates: hf-libero 0.1.4, ``envs/predicates/base_predicates.py`` and
``envs/objects/articulated_objects.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl_vla.core.episode import GoalReadings
from verl_vla.core.errors import ContractError
from verl_vla.envs.libero.controller_kernels import Floats

UP_HEIGHT_M = 1.0
"""Height that an object must reach for LIBERO's ``Up``."""

RELATIONS = ("on", "in", "stack")
"""Predicates about two things; the first must be moved."""


@dataclass(frozen=True, slots=True)
class _Articulation:
    """A predicate about joints, in LIBERO's ``articulation`` properties."""

    wanted: str
    """The range that the joints must reach."""
    away: str
    """The range away from rest; its sign gives the direction of opening."""
    combine: Callable[[Sequence[float]], float]
    """``min`` where one joint is enough, ``max`` where all joints must reach the range."""


ARTICULATIONS = {
    "open": _Articulation("default_open_ranges", "default_open_ranges", min),
    "close": _Articulation("default_close_ranges", "default_open_ranges", max),
    "turnon": _Articulation("default_turnon_ranges", "default_turnon_ranges", min),
    "turnoff": _Articulation("default_turnoff_ranges", "default_turnon_ranges", min),
}


class GoalMeter:
    """Measurement of the goals of one problem."""

    def __init__(self, problem: Any) -> None:
        """Look up the objects and joints of the problem's goals.

        Args:
            problem: a LIBERO environment without its wrapper.

        Raises:
            ContractError: the task has a predicate that is not known here.
        """
        self._goals = [_goal(problem, *goal) for goal in problem.parsed_problem["goal_state"]]

    def read(self, gripper: Floats) -> GoalReadings:
        """Measure every goal, given the gripper's position [3] m; return [G, 3]."""
        return np.array([measure(gripper) for measure in self._goals], dtype=np.float32)


_Measure = Callable[[Floats], tuple[float, float, bool]]
"""Function from the gripper's position, [3] m, to reach, remaining and holds; see `Reading`."""


def _goal(problem: Any, predicate: str, *names: str) -> _Measure:
    things = [problem.object_states_dict[name] for name in names]
    kind = predicate.lower()
    if kind in RELATIONS:
        return lambda gripper: (
            _distance(gripper, _place(things[0])),
            _distance(_place(things[0]), _place(things[1])),
            # LIBERO decides: besides the position it asks for contact
            bool(problem._eval_predicate([predicate, *names])),
        )
    if kind == "up":
        return lambda gripper: _one_sided(gripper, things[0], UP_HEIGHT_M - _place(things[0])[2])
    if kind in ARTICULATIONS:
        gap = _joint_gap(problem, kind, things[0])
        return lambda gripper: _one_sided(gripper, things[0], gap())
    raise ContractError(f"the goal predicate {predicate!r} is unknown; add it to {__name__}")


def _one_sided(gripper: Floats, thing: Any, gap: float) -> tuple[float, float, bool]:
    """Measure a goal that holds where ``gap`` is 0 or less."""
    return _distance(gripper, _place(thing)), max(gap, 0.0), gap <= 0


def _joint_gap(problem: Any, kind: str, thing: Any) -> Callable[[], float]:
    """Return a function that measures the distance of joints from their threshold, m or rad.

    LIBERO's predicates are not called, since ``TurnOn`` also lights the burner.
    """
    name: str = thing.object_name
    is_site = thing.object_state_type == "site"
    owner = problem.get_object(thing.parent_name if is_site else name)
    joints = (problem.object_sites_dict[name] if is_site else owner).joints
    addresses = [problem.sim.model.get_joint_qpos_addr(joint) for joint in joints]
    ranges: dict[str, Sequence[float]] = owner.object_properties["articulation"]
    rule = ARTICULATIONS[kind]
    # e.g. a microwave opens towards negative angles, a stove's knob towards positive ones
    opens_upwards = sum(ranges[rule.away]) > 0
    # LIBERO tests one bound of a range, the one that the joint reaches first
    seeks_more = opens_upwards == (rule.wanted == rule.away)
    low, high = min(ranges[rule.wanted]), max(ranges[rule.wanted])

    def gap() -> float:
        places = [float(problem.sim.data.qpos[address]) for address in addresses]
        return rule.combine([low - place if seeks_more else place - high for place in places])

    return gap


def _place(thing: Any) -> Floats:
    return np.array(thing.get_geom_state()["pos"])


def _distance(a: Floats, b: Floats) -> float:
    return float(np.linalg.norm(a - b))
