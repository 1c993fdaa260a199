"""End of processes: on SIGINT or SIGTERM after the current step is saved, or with the parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from verl_vla.core.errors import Interrupted

EXIT_ORPHANED = 1


def end_with_parent() -> None:
    """End this process when its parent ends, even by a kill; call it once, at the start."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only processes that multiprocessing started have a parent"

    def wait() -> None:
        # returns whatever ended the parent, since the system then closes its end of a pipe
        parent.join()
        # sys.exit would end this thread only
        os._exit(EXIT_ORPHANED)

    threading.Thread(target=wait, daemon=True, name="end_with_parent").start()


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""SIGINT comes from Ctrl-C; SIGTERM from ``kill``, container engines and schedulers; SIGHUP from a
terminal or a connection that is closed."""


class StopRequest:
    """A request to stop this process, which may not have been made yet."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    @property
    def is_made(self) -> bool:
        """True once a signal has arrived."""
        return self.signal_number is not None

    def carry_out(self, step: int) -> NoReturn:
        """Raise the error that ends the process with the signal's exit code.

        Args:
            step: the last step that is done and saved; 0 where there is none.

        Raises:
            Interrupted: always.
        """
        assert self.signal_number is not None, "nobody asked"
        name = signal.Signals(self.signal_number).name
        raise Interrupted(
            f"{name} after step {step}; the same command goes on from there", self.signal_number
        )


@contextmanager
def stop_requests() -> Generator[StopRequest]:
    """Record the first of `SIGNALS` as a request; a second one ends the process at once."""
    request = StopRequest()

    def ask(number: int, _: FrameType | None) -> None:
        request.signal_number = number
        for one in heeded:
            signal.signal(one, signal.SIG_DFL)
        # not print or logging: the signal may have interrupted either, and neither is reentrant
        said = f"{signal.Signals(number).name}: stopping after this step; once more stops at once\n"
        assert sys.__stderr__ is not None
        os.write(sys.__stderr__.fileno(), said.encode())

    # nohup ignores SIGHUP, and so does a run that was started with it
    heeded = [one for one in SIGNALS if signal.getsignal(one) != signal.SIG_IGN]
    before = {one: signal.signal(one, ask) for one in heeded}
    try:
        yield request
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def leave_signals_to_parent(_: int = 0) -> None:
    """Ignore Ctrl-C, which a terminal sends to all processes of a run; the main one handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
