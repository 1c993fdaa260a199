"""JSON files that other people and other programs wrote: read as declared, or refused.

An error names file, field and value, the reason and the remedy, whatever reads the file.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, with_config

from verl_vla.core.errors import ConfigError

Schema = TypeVar("Schema")
MOST_BYTES = 1 << 28
"""Bytes from which on a file describes nothing; the largest known tokenizer has 35 MB."""
SHOWN = 60
"""Characters of a wrong value that a message shows."""


with_other_entries = with_config(ConfigDict(extra="allow", strict=True))
"""Decorator of a ``TypedDict`` that is read from a file: entries beside its own are kept."""


class Entries(BaseModel):
    """Base of schemas: entries that are not declared are other programs' and are left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


def read_json(file: Path, schema: type[Schema], remedy: str) -> Schema:
    """Read a JSON file as a declared type.

    Args:
        file: path of the file.
        schema: a subclass of `Entries`, or any type that pydantic validates.
        remedy: what to do about a file that is wrong, for the message.

    Raises:
        ConfigError: it cannot be read, is no JSON in UTF-8, or lacks a declared entry or has one of
            another type.
    """
    return _read_document(TypeAdapter(schema), read_bytes(file, remedy), str(file), remedy)


def read_json_lines(
    file: Path, schema: Any, remedy: str, *, first: int = 0, last: int | None = None
) -> list[Any]:
    """Read a file of one JSON object a line.

    A last line without its end is left out: it is being written, or a process was killed there.

    Args:
        file: path of the file.
        schema: type of every line, as in `read_json`.
        remedy: what to do about a line that is wrong, for the message.
        first: index of the first line to read.
        last: index of the line to stop at; None reads to the end.

    Raises:
        ConfigError: as `read_json`; names the line by its number.
    """
    require_regular(file, remedy)
    adapter = TypeAdapter[Any](schema)
    found: list[Any] = []
    # as bytes: a line that is no text is then told as any other that is damaged
    try:
        with file.open("rb") as opened:
            for number, line in islice(enumerate(opened, start=1), first, last):
                if line.endswith(b"\n"):
                    found.append(_read_document(adapter, line, f"{file}, line {number}", remedy))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); {remedy}") from error
    return found


def _read_document(adapter: TypeAdapter[Schema], content: bytes, where: str, remedy: str) -> Schema:
    try:
        return adapter.validate_json(content, strict=True)
    except ValidationError as error:
        raise _config_error(error, where, remedy) from error


def read_bytes(file: Path, remedy: str) -> bytes:
    """Read a small file of a folder that somebody else made.

    Raises:
        ConfigError: it is no regular file, cannot be read, or is far too large.
    """
    require_regular(file, remedy)
    try:
        size = file.stat().st_size
        if size > MOST_BYTES:
            raise ConfigError(f"{file} has {size:,} bytes, more than any such file; {remedy}")
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); {remedy}") from error


def read_begin(file: Path, num_bytes: int, remedy: str) -> bytes:
    """Read the first bytes of a file of any size.

    Raises:
        ConfigError: it is no regular file, or cannot be read.
    """
    require_regular(file, remedy)
    try:
        with file.open("rb") as opened:
            return opened.read(num_bytes)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); {remedy}") from error


def require_declared(content: Any, schema: Any, file: Path, remedy: str) -> Any:
    """Return the content of a file that was read already as a declared type; see `read_json`.

    Raises:
        ConfigError: it lacks a declared entry or has one of another type.
    """
    try:
        return TypeAdapter[Any](schema).validate_python(content, strict=True)
    except ValidationError as error:
        raise _config_error(error, str(file), remedy) from error


@contextmanager
def naming(file: Path) -> Generator[None]:
    """Put ``file`` before the message of a `ConfigError` about what was read from it.

    Raises:
        ConfigError: as the block raised it, with the file's name.
    """
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def require_regular(file: Path, remedy: str) -> None:
    """Refuse what is no file before it is opened: a FIFO would block for ever.

    Raises:
        ConfigError: it is absent, a link to nothing, a folder, a FIFO or a device.
    """
    if file.is_file():
        return
    if file.is_symlink() and not file.exists():
        raise ConfigError(f"{file} is a link to {file.readlink()}, which is not there; {remedy}")
    kind = "a folder" if file.is_dir() else "a pipe or a device" if file.exists() else "absent"
    raise ConfigError(f"{file} is {kind}, and must be a file; {remedy}")


def _config_error(error: ValidationError, where: str, remedy: str) -> ConfigError:
    # the first alone: one damaged entry of a list makes as many errors as the list is long
    detail = error.errors(include_url=False, include_context=False)[0]
    return ConfigError(f"{where}: {_refusal(detail)}; {remedy}")


def _refusal(detail: Any) -> str:
    """One of pydantic's errors as text: field, value and reason."""
    field = _dotted(detail["loc"])
    if detail["type"] == "json_invalid":
        # pydantic says where; a byte-order mark and UTF-16 are told as an unexpected character
        return f"it is no JSON in UTF-8 ({detail['msg'].removeprefix('Invalid JSON: ')})"
    if detail["type"] == "missing":
        return f"{field} is missing"
    shown = _shown(detail["input"])
    # a declared type's own check has pydantic's words before its message
    reason = detail["msg"].replace("Input", "it").removeprefix("Value error, ")
    return f"{field or 'it'} is {shown}, but {reason[0].lower()}{reason[1:]}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _dotted(location: Sequence[int | str]) -> str:
    """Return the entry's name, with indices in brackets.

    >>> _dotted(("towers", 1, "mean"))
    'towers[1].mean'
    """
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return name.removeprefix(".")
