"""One formatter of what pydantic refuses: the option's name, its value, and a remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from pydantic import ValidationError
from pydantic.dataclasses import is_pydantic_dataclass
from pydantic.fields import FieldInfo

from verl_vla.core.errors import ConfigError
from verl_vla.core.text import nearest

REMEDY = "remedy"
"""Key of a field's own remedy in its ``json_schema_extra``; see `verl_vla.config.schema.remedy`."""

# the second one is a key that is no string, such as the number in YAML's 1: 2
UNKNOWN_KEY = ("unexpected_keyword_argument", "invalid_key")
CROSS_FIELD = "value_error"
"""Type of an error that a section's own validator raises; its message is complete."""
WRONG_TYPE = {
    "int_type": "it must be int",
    "float_type": "it must be float",
    "string_type": "it must be str",
    "bool_type": "it must be bool",
    "tuple_type": "it must be a list, like [a,b]",
    "dict_type": "it is a section, set {name}.KEY instead",
    "dataclass_type": "it is a section, set {name}.KEY instead",
    "literal_error": "choose one of {expected}",
}
"""Remedies by pydantic's types of error; any other type is about the value's range."""

Location = tuple[int | str, ...]
"""Keys and indices that lead to a value."""


class _Refusal(NamedTuple):
    """One of pydantic's errors as text."""

    name: str
    """Dotted name of the option or section."""
    text: str
    is_type: bool = False
    """True if the value has the wrong type, which another member of a union may have accepted."""


def config_error(
    schema: type[Any], error: ValidationError, values: Mapping[Any, Any], path: str
) -> ConfigError:
    """Return an error with one line per wrong option of ``values``, unknown keys first.

    Args:
        schema: the section that refused ``values``.
        error: all that is wrong with them.
        values: values by the names of options.
        path: dotted name of the section, empty for a recipe.
    """
    details = error.errors(include_url=False)
    # a misspelt key may also be a missing one, and the first line then names the cause
    details.sort(key=lambda detail: detail["type"] not in UNKNOWN_KEY)
    found = [_refusal(schema, detail, values, path) for detail in details]
    lines: dict[str, None] = {}  # ordered, each line once
    for name in dict.fromkeys(refusal.name for refusal in found):
        of_option = [refusal for refusal in found if refusal.name == name]
        # a union reports an error of each member; one about the range means that the type fits that
        # member, so the others' complaints about the type would mislead
        ranges = [refusal.text for refusal in of_option if not refusal.is_type]
        lines |= dict.fromkeys(ranges or ["; or ".join(refusal.text for refusal in of_option)])
    return ConfigError("\n".join(lines))


def _refusal(
    schema: type[Any], detail: Mapping[str, Any], values: Mapping[Any, Any], path: str
) -> _Refusal:
    location: Location = detail["loc"]
    if detail["type"] in UNKNOWN_KEY:
        *above, key = location
        name = _join(path, [*above, str(key)])
        _, field = _option(schema, above)
        section = cast("Any", schema if field is None else field.annotation)
        known = list(section.__pydantic_fields__)
        remedy = nearest(str(key), known, prefix=_join(path, [*above, ""]))
        return _Refusal(name, f"unknown key {name!r}; {remedy}")
    name = _join(path, location)
    if detail["type"] == "missing":
        return _Refusal(name, f"{name} is required and has no default; set it")
    if detail["type"] == CROSS_FIELD:
        # the exception itself, since pydantic's message puts "Value error, " before it
        return _Refusal(name, str(detail["ctx"]["error"]))
    return _wrong_value(schema, detail, values, path)


def _wrong_value(
    schema: type[Any], detail: Mapping[str, Any], values: Mapping[Any, Any], path: str
) -> _Refusal:
    kind, value = detail["type"], detail["input"]
    location = _in_values(detail["loc"], values)
    name = _join(path, location)
    if kind in WRONG_TYPE:
        # pydantic joins the choices with commas and one "or"
        expected = detail["ctx"]["expected"].replace(" or ", ", ") if "literal" in kind else ""
        remedy = WRONG_TYPE[kind].format(name=name, expected=expected)
        return _Refusal(name, f"{name} is {_shown(value)}; {remedy}", is_type=True)
    option, field = _option(schema, location)
    own = None if field is None else field.json_schema_extra
    if isinstance(own, dict) and REMEDY in own:
        # the remedy is about the option as a whole, also where one item of a list is wrong
        name, value = _join(path, option), _at(values, option)
        return _Refusal(name, f"{name} is {_shown(value)}; {own[REMEDY]}")
    return _Refusal(name, f"{name} is {_shown(value)}; {_bound(detail)}")


def _bound(detail: Mapping[str, Any]) -> str:
    """Return the remedy of a value out of range."""
    if detail["type"] == "greater_than_equal":
        least = detail["ctx"]["ge"]
        return f"set at least {least:g}" if least else "set 0 or more"
    if detail["type"] == "greater_than":
        return f"set more than {detail['ctx']['gt']:g}"
    return str(detail["msg"]).replace("Input", "it")


def _option(schema: type[Any], location: Sequence[int | str]) -> tuple[Location, FieldInfo | None]:
    """Return the part of a location that names an option or section, and its field."""
    field: FieldInfo | None = None
    for depth, name in enumerate(location):
        section = schema if field is None else field.annotation
        # below an option lie its items and the members of a union, which are no fields
        if not isinstance(section, type) or not is_pydantic_dataclass(section):
            return tuple(location[:depth]), field
        field = cast("Any", section).__pydantic_fields__[name]
    return tuple(location), field


def _in_values(location: Location, values: Any) -> Location:
    """Remove from a location what pydantic adds to it: the names of a union's members."""
    found: list[int | str] = []
    for part in location:
        is_item = isinstance(part, int) and isinstance(values, Sequence)
        if is_item or (isinstance(values, Mapping) and part in values):
            found.append(part)
            values = cast("Any", values)[part]
    return tuple(found)


def _at(values: Any, location: Location) -> Any:
    for part in location:
        values = values[part]
    return values


def _shown(value: Any) -> str:
    return "empty" if value == "" else repr(value)


def _join(path: str, location: Sequence[int | str]) -> str:
    """Return a dotted name, with indices in brackets.

    >>> _join("optimizer", ("betas", 1))
    'optimizer.betas[1]'
    """
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")
