"""Atomic file writes and folder locks: a file is complete or absent whenever a process ends."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from verl_vla.core.errors import ConfigError, WriteError


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


DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST)


@contextmanager
def recording(file: Path) -> Generator[None]:
    """Turn an ``OSError`` from writing a record of a run into an error that says what to do.

    Raises:
        WriteError: the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise WriteError(why_not_written(file, error)) from error


def why_not_written(file: Path, error: OSError) -> str:
    """Return a line with the file, the reason, the room that is left there, and the remedy."""
    if error.errno in DISK_IS_FULL:
        remedy = "Make room or lift the quota"
    elif error.errno in IN_THE_WAY:
        remedy = f"Move away what is not as it should be, {error.filename}"
    else:
        remedy = "Remove the cause"
    # no reason where a library made the error itself
    reason = error.strerror or " ".join(str(error).split())
    return (
        f"{file} could not be written ({reason}; {free_bytes(file.parent) / 2**20:.0f} MiB are "
        f"free there). {remedy}, and start the same command again"
    )


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user may still write in a folder, which need not exist."""
    return shutil.disk_usage(nearest_folder(folder)).free


def nearest_folder(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.resolve().parents) if path.is_dir())


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
