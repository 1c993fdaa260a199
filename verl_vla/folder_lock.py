"""One process at a time in a run's folder."""

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
def folder_lock(folder: Path) -> Generator[None]:
    """Hold an existing ``folder``; the system lets go of it when the process ends, however it ends.

    Raises:
        ConfigError: another process holds it.
    """
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigError(
                f"{folder} is in use by {file.read()}; let that process finish or end it, or "
                "choose another out=FOLDER"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
