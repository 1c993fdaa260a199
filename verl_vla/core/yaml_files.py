"""YAML that a user wrote, in a file or in a word of a command, read within bounds or refused.

A few lines of YAML can stand for a billion values, since an alias repeats what its anchor holds.
PyYAML shares such values, but whoever walks over them does not come to an end. So the values are
counted before any of them is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from verl_vla.core.errors import ConfigError
from verl_vla.core.json_files import read_bytes, require_declared

MOST_CHARACTERS = 1 << 20
"""Longest text; a run's recipe with all 10,030 tasks of LIBERO-Plus has 0.1 MB."""
MOST_VALUES = 30_000
"""Most values, with those that aliases repeat."""
DEEPEST = 32
"""Most lists and mappings within each other; a recipe has 3."""


def read_yaml(file: Path, schema: Any, remedy: str) -> Any:
    """Read a YAML file as a declared type; see `verl_vla.core.json_files.read_json`.

    Raises:
        ConfigError: it cannot be read, is no YAML in UTF-8, is larger or deeper than the bounds of
            `parse_yaml`, or lacks a declared entry or has one of another type.
    """
    content = read_bytes(file, remedy)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: it is no YAML in UTF-8 ({error}); {remedy}") from error
    return require_declared(parse_yaml(text, str(file), remedy), schema, file, remedy)


def parse_yaml(text: str, where: str, remedy: str) -> Any:
    """Return the value of a YAML text.

    Args:
        text: the text.
        where: the file or word that it is from, for messages.
        remedy: what to do about a text that is wrong, for messages.

    Raises:
        ConfigError: it is no YAML, an alias lies within its own anchor, or it is larger or deeper
            than the bounds of this module.
    """
    try:
        require_bounds(text, where, remedy)
        return yaml.safe_load(text)
    except ConfigError:
        raise
    except Exception as error:  # PyYAML's constructors raise errors of a dozen kinds
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{where}: it is no YAML that can be read ({reason}); {remedy}"
        ) from error


class _Size(NamedTuple):
    """Number of values below a node, itself included, and the depth of the deepest of them."""

    values: int
    depth: int


class _BoundsError(ValueError):
    """A text that is refused before any value is made."""


def require_bounds(text: str, where: str, remedy: str) -> None:
    """Refuse a YAML text that stands for more than a walk over its values can end with.

    Args:
        text: the text.
        where: the file or word that it is from, for messages.
        remedy: what to do about a text that is wrong, for messages.

    Raises:
        ConfigError: an alias lies within its own anchor, or it is larger or deeper than the bounds
            of this module.
        YAMLError: it is no YAML.
    """
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{where} has {len(text):,} characters, too many for YAML; {remedy}")
    anchors: dict[str, _Size] = {}
    events = yaml.parse(text, yaml.SafeLoader)
    try:
        for event in events:
            if isinstance(event, yaml.CollectionStartEvent | yaml.ScalarEvent | yaml.AliasEvent):
                _measure(event, events, anchors, 0)
    except _BoundsError as error:
        raise ConfigError(f"{where}: {error}; {remedy}") from error


def _measure(
    event: yaml.Event, events: Iterator[yaml.Event], anchors: dict[str, _Size], depth: int
) -> _Size:
    """Return the size of a node whose first event this is; consume its other events."""
    if isinstance(event, yaml.AliasEvent):
        if event.anchor not in anchors:
            raise _BoundsError(f"the alias *{event.anchor} stands before the end of its anchor")
        return anchors[event.anchor]
    size = _Size(1, 0)
    if isinstance(event, yaml.CollectionStartEvent):
        if depth == DEEPEST:
            raise _BoundsError(f"lists and mappings lie more than {DEEPEST} deep")
        for inner in events:
            if isinstance(inner, yaml.CollectionEndEvent):
                break
            found = _measure(inner, events, anchors, depth + 1)
            size = _Size(size.values + found.values, max(size.depth, found.depth + 1))
            if size.values > MOST_VALUES:
                raise _BoundsError(f"it stands for more than {MOST_VALUES:,} values")
            if depth + size.depth > DEEPEST:
                raise _BoundsError(f"lists and mappings lie more than {DEEPEST} deep")
    if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
        anchors[event.anchor] = size
    return size
