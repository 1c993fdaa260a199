"""Damage for the fuzz of files: values planted into documents, and bytes changed or cut off.

Each of 3,680 damaged files must be read as valid or refused by name; any other exception fails the
test, and so does what is read and cannot be used. ``pytest --hypothesis-seed=N`` tries other files.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from verl_vla.core.errors import ConfigError

LONGEST = timedelta(seconds=30)
"""One input takes milliseconds; more than this is a hang, also on a machine that does much else."""

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["NaN", "inf", "${seed}", "../..", "\0", "1e999", "true", "😀"]),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)
"""What may stand in place of a value of a document."""
MOST_CHANGES = 4
MOST_CUT = 40
"""Bytes that one change takes out."""


def places(content: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of a document's values; of a list, those of its first two."""
    items: Any = ()
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list):
        items = enumerate(content[:2])
    return [above, *(place for key, value in items for place in places(value, (*above, key)))]


def planted(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of a document with another value at a path."""
    if not place:
        return value
    copy = content.copy()
    copy[place[0]] = planted(content[place[0]], place[1:], value)
    return copy


@st.composite
def documents(draw: st.DrawFn, content: Any) -> Any:
    """A document with one value replaced, or one entry of a mapping left out."""
    place = draw(st.sampled_from(places(content)))
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    if place and isinstance(inner, dict) and draw(st.booleans()):
        rest = {key: value for key, value in inner.items() if key != place[-1]}
        return planted(content, place[:-1], rest)
    return planted(content, place, draw(VALUES))


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with a few bytes changed, put in, taken out or cut off its end."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, MOST_CHANGES))):
        place = draw(st.integers(0, max(len(changed) - 1, 0)))
        kind = draw(st.sampled_from(["change", "insert", "remove", "cut"]))
        if kind == "change":
            changed[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "insert":
            changed[place:place] = draw(st.binary(max_size=MOST_CUT))
        elif kind == "remove":
            del changed[place : place + draw(st.integers(1, MOST_CUT))]
        else:
            del changed[place:]
    return bytes(changed)


def inputs(number: int) -> settings:
    """Return the settings of a fuzz that tries ``number`` inputs."""
    return settings(
        max_examples=number,
        # without the search for the lines that only failures run, which takes minutes
        phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
        deadline=LONGEST,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def is_read(read: Callable[[], Any], *, named: str) -> bool:
    """Check whether something is read; a refusal must name ``named``."""
    try:
        read()
    except ConfigError as error:
        assert named in str(error)
        return False
    return True


def replaced(file: Path, content: bytes, read: Callable[[], Any], *, named: str) -> bool:
    """Check whether something is read while a file has another content."""
    whole = file.read_bytes()
    try:
        file.write_bytes(content)
        return is_read(read, named=named)
    finally:
        file.write_bytes(whole)
