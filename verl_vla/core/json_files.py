"""JSON files that other people and other programs wrote: read as declared, or refused.

An error names file, field and value, the reason and the remedy, whatever reads the file.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, with_config

from verl_vla.core.errors import ConfigError
from verl_vla.core.files import partial_file
from verl_vla.core.text import shorten

Schema = TypeVar("Schema")
MOST_BYTES = 1 << 28
"""Bytes from which on a file describes nothing; the largest known tokenizer has 35 MB."""
MOST_LINE_BYTES = 1 << 24
"""Bytes of a line that no log has; an episode's with its actions has some 20 kB."""
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
) -> Iterator[Any]:
    """Read a file of one JSON object a line, line by line: the file may be of any size.

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
    adapter = TypeAdapter[Any](schema)
    lines = islice(enumerate(_raw_lines(file, 0, remedy), start=1), first, last)
    for number, line in lines:
        if line.endswith(b"\n"):
            yield _read_document(adapter, line, f"{file}, line {number}", remedy)


def read_last_json_lines(
    file: Path, schema: Any, remedy: str, num_bytes: int, *, first: int = 0
) -> Iterator[Any]:
    """Read the last lines of such a file, ``num_bytes`` at most; of a smaller file all from first.

    The arguments are those of `read_json_lines`.
    """
    require_regular(file, remedy)
    begin = file.stat().st_size - num_bytes
    if begin <= 0:
        yield from read_json_lines(file, schema, remedy, first=first)
        return
    adapter = TypeAdapter[Any](schema)
    for line in _raw_lines(file, begin, remedy):
        if line.endswith(b"\n"):
            where = f"{file}, in the last {num_bytes:,} bytes"
            yield _read_document(adapter, line, where, remedy)


def keep_json_lines(
    file: Path, schema: Any, remedy: str, is_kept: Callable[[Any], bool], *, first: int = 0
) -> list[Any]:
    """Write such a file again without some of its lines, and without a half-written last one.

    The file may be of any size; it is replaced when the new one is complete.

    Args:
        file: path of the file.
        schema: type of every line, as in `read_json`.
        remedy: what to do about a line that is wrong, for the message.
        is_kept: tells of a line as read whether it stays.
        first: index of the first line to look at; those before it stay.

    Returns:
        The lines that were left out.
    """
    adapter = TypeAdapter[Any](schema)
    dropped: list[Any] = []
    partial = partial_file(file)
    try:
        with partial.open("wb") as written:
            for number, line in enumerate(_raw_lines(file, 0, remedy), start=1):
                if not line.endswith(b"\n"):
                    break
                content = None
                if number > first:
                    content = _read_document(adapter, line, f"{file}, line {number}", remedy)
                if content is None or is_kept(content):
                    written.write(line)
                else:
                    dropped.append(content)
        partial.replace(file)
    finally:
        # of a damaged file nothing is left beside it
        partial.unlink(missing_ok=True)
    return dropped


def _raw_lines(file: Path, first_byte: int, remedy: str) -> Iterator[bytes]:
    # as bytes: a line that is no text is then told as any other that is damaged
    require_regular(file, remedy)
    try:
        with file.open("rb") as opened:
            if first_byte:
                opened.seek(first_byte)
                # the rest of a line, however long
                while opened.readline(MOST_LINE_BYTES)[-1:] not in (b"\n", b""):
                    pass
            # bounded: what is no file of lines may be a single one of gigabytes
            while line := opened.readline(MOST_LINE_BYTES):
                if len(line) == MOST_LINE_BYTES and not line.endswith(b"\n"):
                    raise ConfigError(
                        f"{file} has a line of more than {MOST_LINE_BYTES:,} bytes, so it is none "
                        f"of ours or damaged; {remedy}"
                    )
                yield line
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); {remedy}") from error


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
    shown = shorten(repr(detail["input"]), SHOWN)
    # a declared type's own check has pydantic's words before its message
    reason = detail["msg"].replace("Input", "it").removeprefix("Value error, ")
    return f"{field or 'it'} is {shown}, but {reason[0].lower()}{reason[1:]}"


def _dotted(location: Sequence[int | str]) -> str:
    """Return the entry's name, with indices in brackets.

    >>> _dotted(("towers", 1, "mean"))
    'towers[1].mean'
    """
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return name.removeprefix(".")
