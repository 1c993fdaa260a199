"""Files that are there whole or not at all, whenever a process ends."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from verl_vla.core.errors import ConfigError


def partial_file(file: Path) -> Path:
    """Where ``file`` is written before it takes its place; a killed process may leave it."""
    return file.with_suffix(".tmp")


def require_place(file: Path, option: str) -> None:
    """Refuse, before the work, a file that could not be written after it.

    Raises:
        ConfigError: its folder is not there, or it is a folder itself.
    """
    if not file.parent.is_dir():
        raise ConfigError(f"{option} is {file}, but there is no folder {file.parent}; make it")
    if file.is_dir():
        raise ConfigError(f"{option} is {file}, which is a folder; name a file in it")


def atomic_write(file: Path, text: str) -> None:
    """Write ``file``, or leave what was there."""
    partial = partial_file(file)
    partial.write_text(text)
    partial.replace(file)


PROJECT_FOLDER = Path(__file__).resolve().parents[2]
"""The checkout; relative paths of a recipe are also looked up here."""

LOCK = "lock"
"""Name of the file that is locked; it stays, and says who had the folder last."""


@contextmanager
def writing_to(folder: Path) -> Generator[None]:
    """Turn the system's refusal to write in ``folder`` into one that says what to do.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"the folder to write to is {folder}, which cannot be written ({error.strerror}); "
            "choose another"
        ) from error


@contextmanager
def folder_lock(folder: Path) -> Generator[None]:
    """Make ``folder`` if need be, and hold it; the system lets go when the process ends.

    Raises:
        ConfigError: the folder cannot be written, or another process holds it.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigError(
                f"{folder} is in use by {file.read()}; let that process finish or end it, or "
                "choose another folder"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
