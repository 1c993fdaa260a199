"""Typed options from a mapping.

A recipe is a plain mapping, composed by Hydra from YAML files and command-line overrides;
`parse` turns it into frozen dataclasses. The dataclasses own every default and every check, so
a recipe holds only what differs, and a misspelt or impossible option stops the run before a
worker starts.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from verl_vla.core.errors import ConfigError

T = TypeVar("T")


def parse(schema: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Build ``schema`` from ``values``; ``path`` is the section's dotted name, for messages.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a missing key, or a value of
            the wrong type or outside the choices.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Clip:
    ...     low: float = 0.2
    ...     norm: Literal["token", "episode"] = "token"
    >>> parse(Clip, {"low": 1})
    Clip(low=1.0, norm='token')
    >>> parse(Clip, {"lo": 0.1}, "loss")
    Traceback (most recent call last):
    verl_vla.core.errors.ConfigError: unknown key 'loss.lo'; did you mean 'loss.low'?
    """
    hints = get_type_hints(schema)
    known = {f.name: f for f in fields(cast(Any, schema))}
    for key in values:
        if key not in known:
            raise ConfigError(_unknown_key(key, list(known), path))
    for name, f in known.items():
        if f.default is MISSING and f.default_factory is MISSING and name not in values:
            raise ConfigError(f"{_join(path, name)} is required and has no default; set it")
    return schema(**{key: _value(hints[key], v, _join(path, key)) for key, v in values.items()})


def meanings(schema: type[Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every option of ``schema`` and its sections, with the docstring below its field.

    The docstrings are read from the source, since Python keeps none for an attribute; so the class
    of each section must be defined in a file.
    """
    hints, documented = get_type_hints(schema), _docstrings(schema)
    for f in fields(schema):
        name = _join(path, f.name)
        if is_dataclass(hints[f.name]):
            yield from meanings(cast("type[Any]", hints[f.name]), name)
        else:
            yield name, documented[f.name] if f.name in documented else ""


def _docstrings(schema: type[Any]) -> dict[str, str]:
    """Return the string literal below each field, by the field's name."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for node, below in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            found[node.target.id] = " ".join(str(below.value.value).split())
    return found


def _unknown_key(key: str, known: list[str], path: str) -> str:
    close = difflib.get_close_matches(str(key), known, n=1)
    remedy = (
        f"did you mean {_join(path, close[0])!r}?"
        if close
        else f"known keys: {', '.join(_join(path, name) for name in known)}"
    )
    return f"unknown key {_join(path, str(key))!r}; {remedy}"


def _value(hint: Any, value: Any, path: str) -> Any:
    """Check ``value`` against the type ``hint`` and convert it where no information is lost."""
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} is {value!r}; it is a section, set {path}.KEY instead")
        return parse(cast("type[Any]", hint), cast("Mapping[str, Any]", value), path)
    origin = get_origin(hint)
    if origin is Literal:
        return _choice(get_args(hint), value, path)
    if origin in (Union, types.UnionType):
        return _one_of(get_args(hint), value, path)
    if origin is tuple:
        return _sequence(get_args(hint)[0], value, path)
    if origin is dict:
        return _mapping(get_args(hint)[1], value, path)
    return _scalar(hint, value, path)


def _choice(choices: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is False and "off" in choices:
        return "off"  # YAML reads an unquoted off as false
    if value not in choices:
        raise ConfigError(f"{path} is {value!r}; choose one of {', '.join(map(repr, choices))}")
    return value


def _one_of(hints: tuple[Any, ...], value: Any, path: str) -> Any:
    reasons: list[str] = []
    for hint in hints:
        if hint is type(None):
            if value is None:
                return None
            continue
        try:
            return _value(hint, value, path)
        except ConfigError as error:
            reasons.append(str(error))
    raise ConfigError("; or ".join(reasons))


def _sequence(hint: Any, value: Any, path: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"{path} is {value!r}; it must be a list, like [a,b]")
    items = cast("Sequence[Any]", value)
    return tuple(_value(hint, item, f"{path}[{i}]") for i, item in enumerate(items))


def _mapping(hint: Any, value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path} is {value!r}; it is a section, set {path}.KEY instead")
    items = cast("Mapping[str, Any]", value)
    if hint is Any:
        return dict(items)
    return {key: _value(hint, item, _join(path, key)) for key, item in items.items()}


def _scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"{path} is nan, which no check can compare; set a number")
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{path} is {value!r}; it must be {hint.__name__}")
    return value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
