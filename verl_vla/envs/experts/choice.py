"""Choice of the scripted expert for a task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from verl_vla.config.choices import SUITES_WITH_EXPERTS
from verl_vla.core.errors import ConfigError
from verl_vla.envs.experts.motion import Expert
from verl_vla.envs.experts.pick_and_place import PickAndPlace
from verl_vla.envs.mini.experts import EXPERTS

if TYPE_CHECKING:
    from verl_vla.envs.libero.simulator import Simulator


def check_experts(suite_name: str) -> None:
    """Check that a suite has scripted experts.

    Raises:
        ConfigError: it has none.
    """
    if suite_name not in SUITES_WITH_EXPERTS:
        raise ConfigError(
            f"--suite is {suite_name}, which has no scripted experts; take one of "
            f"{', '.join(SUITES_WITH_EXPERTS)}"
        )


def make_expert(
    task_name: str, simulator: Simulator, pace: float, height_error_m: float = 0.0
) -> Expert:
    """Make an expert for the episode that ``simulator`` is about to play.

    Args:
        task_name: name of the task.
        simulator: the task's simulator, after settling.
        pace: largest translation in an action, at most 1.
        height_error_m: error of the heights that the expert assumes for objects; 0 makes it exact,
            another value biased.

    Raises:
        ConfigError: the task asks for more than moving one object.
    """
    if task_name in EXPERTS:
        return EXPERTS[task_name](simulator, pace, height_error_m)
    return PickAndPlace(simulator, pace, height_error_m)
