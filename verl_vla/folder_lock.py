"""One process at a time in a folder of results."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from verl_vla.errors import ConfigError

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
