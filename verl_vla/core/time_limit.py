"""A time limit for code of somebody else that runs in the main thread."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from verl_vla.core.plugins import origin
from verl_vla.core.processes import end_now

Result = TypeVar("Result")

INTERRUPT = signal.SIGUSR2
"""Signal that makes Python run a handler in the main thread, also while that waits for a lock, a
socket or a sleep. Watching for processes that died takes SIGUSR1."""
REPEAT_S = 5.0
"""Time after which code that caught the interruption is interrupted again."""
GRACE_S = 30.0
"""Time that the code may take to end once it is interrupted. Native code that does not return to
Python cannot be interrupted at all."""


class Overdue(BaseException):
    """The interruption; no `Exception`, since a plug-in may survive each of those."""


def run_within(
    limit_s: float, work: Callable[[], Result], refuse: Callable[[str], Exception], exit_code: int
) -> Result:
    """Return what ``work`` returns, or raise an error where it takes longer than ``limit_s``.

    Only in the main thread.

    Args:
        limit_s: the limit, s.
        work: code that may never return.
        refuse: makes the error; it is given where a plug-in was at the time (see `origin`).
        exit_code: of this process, which is ended with its children where ``work`` does not end
            within `GRACE_S` after its limit.
    """
    is_late, is_over = threading.Event(), threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        # anywhere else nothing would catch it
        if _is_within(_run, frame):
            is_late.set()
            raise Overdue

    def watch() -> None:
        if is_over.wait(limit_s):
            return
        main = threading.main_thread().ident
        assert main is not None, "it has started"
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            signal.pthread_kill(main, INTERRUPT)
            if is_over.wait(REPEAT_S):
                return
        end_now(f"stopped: {refuse('')}", exit_code)

    before = signal.signal(INTERRUPT, interrupt)
    thread = threading.Thread(target=watch, daemon=True, name="run_within")
    thread.start()
    try:
        return _run(work)
    # Ray turns what interrupts its calls into a SystemError of its own
    except (Overdue, Exception) as error:
        if not is_late.is_set():
            raise
        raise refuse(origin(error)) from error
    finally:
        is_over.set()
        # a signal that is sent after the handler is gone would end the process
        thread.join()
        signal.signal(INTERRUPT, before)


def _run(work: Callable[[], Result]) -> Result:
    return work()


def _is_within(function: Callable[..., object], frame: FrameType | None) -> bool:
    """Return true where a frame was called by ``function``, directly or not."""
    while frame is not None:
        if frame.f_code is function.__code__:
            return True
        frame = frame.f_back
    return False
