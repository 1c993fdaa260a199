"""One task of a LIBERO suite, perturbed or not."""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from verl_vla.envs.base import Task
from verl_vla.envs.libero.scene_change import UNCHANGED, SceneChange

CAMERAS = ("agentview", "robot0_eye_in_hand")
"""The views that published policies use: third person and wrist."""

ACTION_DIM = 7
"""Three translations, three rotations, the gripper (-1 opens, +1 closes)."""

PROPRIO_DIM = 8
"""End-effector position (m), axis-angle (rad), gripper joints (m)."""

MAX_SAMPLED = 1000
"""Starts of a task that can be sampled besides the recorded ones, for larger evaluations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseTask:
    """The unperturbed task that a perturbed one was made from."""

    suite: str
    task_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LiberoTask(Task):
    """One instruction of a suite, and the files that its simulator is built from."""

    bddl_file: Path
    init_states_file: Path
    num_init_states: int | None = None
    """Recorded init states, where they are not as many as those of the suite's other tasks."""
    change: SceneChange = UNCHANGED
    """What the BDDL file does not say."""
    state_shift_m: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """By which objects stand elsewhere than in the file of init states: another workspace."""
    num_objects: int = 0
    """Objects to which `state_shift_m` applies, the first ones of a state."""
    axis: str | None = None
    """The perturbation; None of an unperturbed task."""
    base: BaseTask | None = None
    """None of an unperturbed task."""
    refused: str | None = None
    """Why it cannot be built here; None where it can."""
    made_text: str | None = None
    """Its definition where that was made here from `bddl_file`; None where it is that file."""

    def definition(self) -> str:
        """The text of its definition."""
        return (
            self.bddl_file.read_text(encoding="utf-8") if self.made_text is None else self.made_text
        )

    @contextmanager
    def definition_file(self) -> Generator[Path]:
        """A file of its definition, which LIBERO reads when it builds the task and never again.

        One that was made here is removed with the context: a process may be killed later, and
        would leave it behind.
        """
        if self.made_text is None:
            yield self.bddl_file
            return
        with tempfile.TemporaryDirectory(prefix="verl-vla-task-") as folder:
            file = Path(folder) / f"{self.name}.bddl"
            file.write_text(self.made_text, encoding="utf-8")
            yield file
