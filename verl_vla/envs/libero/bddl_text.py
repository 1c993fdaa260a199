"""Read and rewrite task definitions (BDDL files) as text, without LIBERO.

LIBERO's own parser evaluates the angles in a file as Python code; `has_plain_angles` detects a file
with anything but numbers there, so that it is refused before that parser reads it.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from verl_vla.envs.libero.assets import libero_root

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
_ANGLES = re.compile(r":yaw_rotation\s*\(\s*\(([^()]*)\)\s*\)")
_CLASS = re.compile(r"^class (\w+)\(", re.MULTILINE)

WORKSPACES = ("main_table", "kitchen_table", "living_room_table", "study_table", "coffee_table")
"""Tables of LIBERO's problems; the sixth workspace is the floor."""


def sentence(text: str) -> str:
    """Return the instruction in a BDDL file's text, with single spaces.

    >>> sentence("(define (:language Open  the drawer))")
    'Open the drawer'
    """
    return " ".join(_group(text, "language").split())


def problem(text: str) -> str:
    """Return the name of the problem class that LIBERO builds, in lower case.

    >>> problem("(define (problem LIBERO_Floor_Manipulation))")
    'libero_floor_manipulation'
    """
    return _find(r"\(problem\s+([^\s()]+)\s*\)", text).lower()


def objects(text: str) -> dict[str, str]:
    """Return the names of the movable objects, in order, each with its category."""
    return _declared(_group(text, "objects"))


def categories(text: str) -> set[str]:
    """Return the categories of all objects and fixtures, except the workspace's."""
    fixtures = _declared(_group(text, "fixtures"))
    kinds = set(objects(text).values()) | set(fixtures.values())
    return kinds - {*WORKSPACES, "table", "floor"}


@cache
def known_categories() -> frozenset[str]:
    """Return the categories that hf-libero has a class for, read from its sources as text."""
    folder = libero_root() / "envs" / "objects"
    names = [name for file in folder.glob("*.py") for name in _CLASS.findall(_read(file))]
    # LIBERO makes a category from a class name like this: a new word at each capital and digit
    return frozenset(
        "_".join(re.sub(r"([A-Z0-9])", r" \1", name).split()).lower() for name in names
    )


def has_plain_angles(text: str) -> bool:
    """Return True if every angle is a number.

    >>> has_plain_angles("(:yaw_rotation ((0 1.5)))"), has_plain_angles("(:yaw_rotation ((f 0)))")
    (True, False)
    """
    plain = [
        all(_NUMBER.match(value) for value in values.split()) for values in _ANGLES.findall(text)
    ]
    # a group that the pattern does not match would pass unseen, so they are counted
    return all(plain) and len(plain) == text.count(":yaw_rotation")


def exchange(text: str, first: str, second: str) -> str:
    """Exchange the start regions of two objects."""
    # both are read first: after one replacement the two regions are the same
    places = [_find(rf"\(On\s+{name}\s+(\S+?)\s*\)", text) for name in (first, second)]
    for name, old, new in ((first, *places), (second, *reversed(places))):
        text = re.sub(rf"\(On\s+{name}\s+{old}\s*\)", f"(On {name} {new})", text)
    return text


def move_scene(text: str, source: str, target: str, problem_name: str) -> str:
    """Move everything on the workspace ``source`` to the workspace of another problem."""
    text = set_problem(text, problem_name)
    kind = "table" if target == "main_table" else target  # only this name and category differ
    text = re.sub(rf"\b{source} - \w+", f"{target} - {kind}", text)
    # also in the names of its regions, which begin with the workspace's
    return re.sub(rf"\b{source}(?=[\s)_])", target, text)


def set_problem(text: str, problem_name: str) -> str:
    """Replace the problem class that LIBERO builds."""
    return re.sub(r"\(problem\s+[^\s()]+\s*\)", f"(problem {problem_name})", text)


def _declared(group: str) -> dict[str, str]:
    """Parse declarations like ``a_1 a_2 - a`` into a mapping of name to category."""
    found: dict[str, str] = {}
    for names, category in re.findall(r"((?:\S+\s+)+?)-\s+(\S+)", group):
        found |= dict.fromkeys(names.split(), category)
    return found


def _group(text: str, keyword: str) -> str:
    return _find(rf"\(:{keyword}\b([^()]*)\)", text)


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in the file")
    return found[1]


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")
