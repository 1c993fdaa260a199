"""One rule for the values of all options, also of those that sections do not check further.

A recipe is written down as YAML and its numbers as JSON, and both are read again: a value that does
not survive that, or that nobody could compute with, is refused wherever it stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from datetime import date
from typing import Any, cast

from verl_vla.core.errors import ConfigError
from verl_vla.core.yaml_files import DEEPEST, MOST_VALUES

LARGEST_BITS = 63
"""Bits of the largest whole number, which a signed integer of 64 bits holds."""
LONGEST = 10_000
"""Characters of the longest text; a path has at most 4,096 (``PATH_MAX``)."""


def require_plain(values: Any, path: str) -> None:
    """Refuse values that no option can have.

    Args:
        values: nested mappings and sequences.
        path: dotted name of their section, for messages.

    Raises:
        ConfigError: a number that is infinite, NaN or larger than 64 bits, a text that is too long
            or has a NUL, or values that are too many or too deep; one line for each.
    """
    lines: list[str] = []
    for count, (name, value, depth) in enumerate(_walk(values, path, 0)):
        if count == MOST_VALUES:
            raise ConfigError(
                f"{path or 'the recipe'} holds more than {MOST_VALUES:,} values; leave some out"
            )
        if depth > DEEPEST:
            raise ConfigError(
                f"{name}: lists and sections lie more than {DEEPEST} deep; write it flatter"
            )
        fault = _fault(value)
        if fault is not None:
            lines.append(f"{name} is {fault}")
    if lines:
        raise ConfigError("\n".join(lines))


def _walk(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any, int]]:
    yield name, value, depth
    if isinstance(value, Mapping):
        for key, inner in cast("Mapping[Any, Any]", value).items():
            yield from _walk(inner, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for index, inner in enumerate(cast("Sequence[Any]", value)):
            yield from _walk(inner, f"{name}[{index}]", depth + 1)


def _fault(value: Any) -> str | None:
    """Return value, reason and remedy of what is no plain value."""
    if isinstance(value, bytes | date | Set):
        return f"{value!r}, a {type(value).__name__}; write text, numbers, lists or sections"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}, which no check can compare; set a number"
    if isinstance(value, int) and value.bit_length() > LARGEST_BITS:
        # Python refuses to write down a number of more than 4,300 digits
        return f"a whole number of {value.bit_length()} bits; set one of at most {LARGEST_BITS}"
    if isinstance(value, str) and len(value) > LONGEST:
        return f"a text of {len(value):,} characters; set one of at most {LONGEST:,}"
    if isinstance(value, str) and "\0" in value:
        return f"{value!r}, and no file or name can have a NUL; leave it out"
    return None
