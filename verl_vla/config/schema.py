"""Sections of a recipe: frozen dataclasses whose fields pydantic checks.

A recipe is a plain mapping, composed by Hydra from YAML files and command-line overrides; `parse`
turns it into sections. They own every default, bound and description, so a recipe holds only what
differs, and a misspelt or impossible option stops the run before a worker starts.

pydantic would read ``"2"`` and ``true`` as numbers. Numbers and booleans are therefore annotated
with pydantic's `StrictInt`, `StrictFloat` (which takes whole numbers) and `StrictBool`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass, is_pydantic_dataclass
from typing_extensions import dataclass_transform

from verl_vla.config.errors import REMEDY, config_error
from verl_vla.config.plain_values import require_plain

T = TypeVar("T")

RULES = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def section(path: str) -> Callable[[type[T]], type[T]]:
    """Return a decorator that makes a class a section.

    A section is frozen and keyword-only. Its constructor raises a `ConfigError` with one line per
    wrong option.

    Args:
        path: dotted name of the section within a recipe, for messages; empty for a recipe.
    """

    def decorate(cls: type[T]) -> type[T]:
        # slots=True makes a new class, so the one that was decorated must not be used any more
        made = cast("type[T]", dataclass(frozen=True, kw_only=True, slots=True, config=RULES)(cls))
        construct = made.__init__

        @functools.wraps(construct)
        def checked(self: T, **values: Any) -> None:
            require_plain(values, path)
            try:
                construct(self, **values)
            except ValidationError as error:
                # the message holds everything; pydantic's traceback would only repeat it
                raise config_error(made, error, values, path) from None

        made.__init__ = checked
        return made

    return decorate


def remedy(text: str) -> dict[str, Any]:
    """Return the ``json_schema_extra`` of a field with its own answer to a value out of range.

    ``text`` follows the option's name and value, as in "seed is -1; set 0 or more".
    """
    return {REMEDY: text}


def parse(schema: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Build ``schema`` from ``values``; ``path`` is the section's dotted name, for messages.

    Raises:
        ConfigError: unknown keys (with the nearest known ones), missing keys, or values of the
            wrong type, outside the choices or out of range, or such as `require_plain` refuses.

    >>> from verl_vla.config.grpo import ClipRange
    >>> parse(ClipRange, {"low": 1, "hi": 0.3}, "loss.clip")
    Traceback (most recent call last):
    verl_vla.core.errors.ConfigError: unknown key 'loss.clip.hi'; did you mean 'loss.clip.high'? ...
    loss.clip.low is 1; a ratio is clipped between 0 and 2, so choose a number between 0 and 1, ...
    """
    require_plain(values, path)
    try:
        return TypeAdapter(schema).validate_python(dict(values))
    except ValidationError as error:
        raise config_error(schema, error, values, path) from None


def meanings(schema: type[Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the description of every option, in the order of the fields.

    A description is the docstring below the field; one that is declared again without a docstring
    keeps that of the base class.
    """
    for name, field in schema.__pydantic_fields__.items():
        dotted = f"{path}.{name}" if path else name
        if is_pydantic_dataclass(kind := cast("type[Any]", field.annotation)):
            yield from meanings(kind, dotted)
        else:
            yield dotted, _description(schema, name)


def _description(schema: type[Any], name: str) -> str:
    # pydantic drops the description where a subclass declares the field again without one
    for base in schema.__mro__:
        if is_pydantic_dataclass(base) and name in base.__pydantic_fields__:
            text = base.__pydantic_fields__[name].description
            if text:
                return " ".join(text.split())
    return ""
