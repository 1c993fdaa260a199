"""Atomic file writes and folder locks: a file is complete or absent whenever a process ends."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from verl_vla.core.errors import ConfigError


def partial_file(file: Path) -> Path:
    """Return the path that ``file`` is written to before it is renamed; a kill may leave it."""
    return file.with_suffix(".tmp")


def require_place(file: Path, option: str) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold.

    Raises:
        ConfigError: its folder does not exist, or it is a folder itself.
    """
    if not file.parent.is_dir():
        raise ConfigError(f"{option} is {file}, but there is no folder {file.parent}; make it")
    if file.is_dir():
        raise ConfigError(f"{option} is {file}, which is a folder; name a file in it")


def atomic_write(file: Path, text: str) -> None:
    """Write ``file`` completely, or leave its old content."""
    # beside the file: a rename is atomic within one file system only
    partial = partial_file(file)
    partial.write_text(text)
    partial.replace(file)


PROJECT_FOLDER = Path(__file__).resolve().parents[2]
"""Root of the checkout; relative paths in a recipe are also looked up here."""

LOCK = "lock"
"""Name of the lock file; it is never deleted, and names the last process that held the folder."""


@contextmanager
def writing_to(folder: Path) -> Generator[None]:
    """Turn an ``OSError`` from writing in ``folder`` into an error that says what to do.

    Raises:
        ConfigError: the folder cannot be written.
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
    """Create ``folder`` if needed and lock it; the system releases the lock if the process dies.

    Raises:
        ConfigError: the folder cannot be written, or another process has locked it.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # not "w", which would erase the name of the process that holds the lock
        file = (folder / LOCK).open("a+")
    with file:
        try:
            # LOCK_NB: whoever comes second is told at once, not left waiting
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
