"""One task of a LIBERO suite, perturbed or not."""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from verl_vla.envs.base import Task
from verl_vla.envs.libero.scene_change import UNCHANGED, SceneChange

ACTION_DIM = 7
"""Number of an action's values: 3 translations, 3 rotations, gripper (-1 opens, +1 closes)."""

PROPRIO_DIM = 8
"""Number of proprio values: end-effector position (3, m), axis-angle (3, rad), gripper (2, m)."""

MAX_SAMPLED = 1000
"""Number of starts per task that can be sampled besides the recorded ones."""


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
    """Number of recorded init states, if not the suite's; None where it is the suite's."""
    change: SceneChange = UNCHANGED
    """Changes that the BDDL file does not define."""
    state_shift_m: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Shift of the objects against the recorded init states, if they are on another workspace."""
    num_objects: int = 0
    """Number of objects, the first ones of a state, that `state_shift_m` applies to."""
    axis: str | None = None
    """Axis of the perturbation; None if unperturbed."""
    base: BaseTask | None = None
    """The task that it was made from; None if unperturbed."""
    refused: str | None = None
    """Reason why the task cannot be built here; None where it can."""
    made_text: str | None = None
    """Definition that was made here from `bddl_file`; None where that file is the definition."""

    def definition(self) -> str:
        """Return the text of the task's BDDL definition."""
        return (
            self.bddl_file.read_text(encoding="utf-8") if self.made_text is None else self.made_text
        )

    @contextmanager
    def definition_file(self) -> Generator[Path]:
        """Provide the definition as a file, which LIBERO reads only while it builds the task.

        A file made here is removed at the end of the context already, since a process that is
        killed later would leave it behind.
        """
        if self.made_text is None:
            yield self.bddl_file
            return
        with tempfile.TemporaryDirectory(prefix="verl-vla-task-") as folder:
            file = Path(folder) / f"{self.name}.bddl"
            file.write_text(self.made_text, encoding="utf-8")
            yield file
