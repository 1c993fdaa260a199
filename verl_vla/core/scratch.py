"""One folder for the temporary files of a command and of all processes that it starts.

veRL, Ray, LIBERO and simulators that are killed leave files in the folder for temporary files. They
are given one of the command's own instead, which goes with it. What a killed command left is
removed by the next one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from types import FrameType

from verl_vla.core.errors import ConfigError, Interrupted
from verl_vla.core.files import LOCK

PREFIX = "verl-vla-"
"""Begin of the folder's name; short, since Ray's sockets lie below it."""
VARIABLE = "TMPDIR"
"""Environment variable by which processes find the folder."""


@contextmanager
def scratch_folder() -> Generator[Path]:
    """Make the folder, let this process and its children use it, and remove it afterwards.

    Raises:
        ConfigError: there is no folder for temporary files.
        Interrupted: SIGTERM, where nothing else handles it.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(_locked_folder())
        stack.enter_context(_set(VARIABLE, str(folder)))
        # tempfile has looked the variable up already
        stack.enter_context(_tempfile_in(folder))
        if not _has_home():
            (folder / "home").mkdir()
            stack.enter_context(_set("HOME", str(folder / "home")))
        stack.enter_context(_sigterm_raises())
        yield folder


@contextmanager
def _locked_folder() -> Generator[Path]:
    try:
        usual = Path(tempfile.gettempdir())
        remove_abandoned(usual)
        folder, lock = _make_locked(usual)
    except OSError as error:
        raise ConfigError(
            f"no folder for temporary files can be made ({error}); set {VARIABLE} to a folder that "
            "can be written"
        ) from error
    with lock:
        try:
            yield folder
        finally:
            # a process that is still ending may write there; the next command removes the rest
            shutil.rmtree(folder, ignore_errors=True)


def _make_locked(usual: Path) -> tuple[Path, TextIOWrapper]:
    """Make a folder with a lock file that this process holds."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=usual))
        try:
            lock = (folder / LOCK).open("a")
        # before there was a lock, another command may have taken the folder for abandoned
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock.fileno()).st_nlink:
            return folder, lock
        lock.close()


@contextmanager
def _set(name: str, value: str) -> Generator[None]:
    """Set an environment variable while the block runs."""
    before = os.environ[name] if name in os.environ else None
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _tempfile_in(folder: Path) -> Generator[None]:
    usual, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = usual


def _has_home() -> bool:
    """Whether there is a home to keep caches in, as numba, Mesa and matplotlib do."""
    try:
        home = Path.home()
    # a user that the system does not know, as in a container
    except RuntimeError:
        return False
    return os.path.isdir(home) and os.access(home, os.W_OK | os.X_OK)


def remove_abandoned(usual: Path) -> None:
    """Remove the folders of commands that were killed: nobody holds their lock any more."""
    try:
        names = [name for name in os.listdir(usual) if name.startswith(PREFIX)]
    # a folder may be written to without being listed, and its rest is then not ours to find
    except PermissionError:
        return
    for folder in (usual / name for name in names):
        # a command may be ending, and another one may be removing the same folder
        with suppress(OSError):
            # no link, and no folder of another user
            is_own = folder.lstat().st_uid == os.getuid() and not folder.is_symlink()
            if is_own and (folder / LOCK).is_file():
                with (folder / LOCK).open("a") as lock:
                    _remove_unless_held(folder, lock)


def _remove_unless_held(folder: Path, lock: TextIOWrapper) -> None:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _sigterm_raises() -> Generator[None]:
    """Let SIGTERM unwind this process, so that what it has opened is closed and removed."""
    is_free = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    # Python allows handlers in the main thread only
    if not is_free or threading.current_thread() is not threading.main_thread():
        yield
        return
    own = os.getpid()

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != own:
            # a forked child, which nobody waits for to unwind
            os.kill(os.getpid(), number)
        raise Interrupted("SIGTERM", number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
