"""End a run when a process dies that calls wait for without a time limit.

A call of TransferQueue waits on a socket. If the process at its other end is killed, for example
for its memory, the call waits for ever, and so does everything that waits for the call. Ray's own
clients try to reconnect for a minute and then end the process without a word of what was saved.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from verl_vla.core.errors import EXIT_LEARNER_LOST, LearnerLostError
from verl_vla.core.processes import end_now, is_alive, name_and_parent, pids

CHECK_EVERY_S = 3.0
ANSWER_LIMIT_S = 10.0
"""Time that a process may take to answer a check. One that is busy for longer is not dead: Ray says
at once when an actor is."""
END_LIMIT_S = 30.0
"""Time that the run may take to end once a process is dead. What ends it may wait for it too."""
INTERRUPT = signal.SIGUSR1
"""Signal by which the thread that watches interrupts the main thread; Python waits for a lock until
a signal's handler raises."""
RAY_DAEMONS = ("gcs_server", "raylet")


class Watchdog:
    """Raises `LearnerLostError` in the main thread when a process has died.

    As a context manager it encloses all that has to end, and ends this process if that hangs.

    Args:
        describe: makes a message of the name of the dead process.
    """

    def __init__(self, describe: Callable[[str], str]) -> None:
        self._describe = describe
        self._has_ended = threading.Event()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()

    @contextmanager
    def watching(self, find_dead: Callable[[], str | None]) -> Generator[None]:
        """Watch while the context lasts; only in the main thread.

        Args:
            find_dead: names a process that is dead, or returns None.
        """
        is_over = threading.Event()
        dead: list[str] = []

        def interrupt(number: int, frame: FrameType | None) -> None:
            # it may have been sent in the moment in which the context ended
            if not is_over.is_set():
                raise LearnerLostError(self._describe(dead[0]))

        def watch() -> None:
            while not is_over.wait(CHECK_EVERY_S):
                name = find_dead()
                if name is not None and not is_over.is_set():
                    dead.append(name)
                    main = threading.main_thread().ident
                    assert main is not None, "it has started"
                    signal.pthread_kill(main, INTERRUPT)
                    self._enforce_end(name)
                    return

        before = signal.signal(INTERRUPT, interrupt)
        thread = threading.Thread(target=watch, daemon=True, name="watchdog")
        thread.start()
        try:
            yield
        except Exception as error:
            # Ray turns what interrupts its calls into a SystemError of its own
            if not dead:
                raise
            _drop_waiting_calls_quietly()
            if isinstance(error, LearnerLostError):
                raise
            raise LearnerLostError(self._describe(dead[0])) from error
        finally:
            is_over.set()
            signal.signal(INTERRUPT, before)

    def _enforce_end(self, name: str) -> None:
        if not self._has_ended.wait(END_LIMIT_S):
            end_now(f"stopped: {self._describe(name)}", EXIT_LEARNER_LOST)


def _drop_waiting_calls_quietly() -> None:
    """Say nothing of calls that still wait for the dead process when the interpreter ends.

    Their tracebacks would follow the message, and all of them say what it says.
    """
    sys.unraisablehook = lambda _: None
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def dead_among(actors: Mapping[str, Any], children: Mapping[str, int]) -> str | None:
    """Return the name of an actor or process that is dead, or None.

    Args:
        actors: Ray's handles of actors by the names to call them.
        children: process ids of children of this process, likewise.
    """
    for name, pid in children.items():
        # first: without these, Ray cannot be asked about its actors
        if not is_alive(pid):
            return f"{name} (process {pid})"
    for name, actor in actors.items():
        try:
            ray.get(actor.__ray_ready__.remote(), timeout=ANSWER_LIMIT_S)
        except RayActorError:
            return name
        except GetTimeoutError:
            # busy
            continue
    return None


def queue_actors(num_storage_units: int) -> dict[str, Any]:
    """Return the handles of TransferQueue's processes; the names are those of 0.1.10."""
    found = {
        "TransferQueueController": ray.get_actor(
            "TransferQueueController", namespace="transfer_queue"
        )
    }
    for rank in range(num_storage_units):
        name = f"TransferQueueStorageUnit#{rank}"
        found[name] = ray.get_actor(name)
    return found


def ray_daemons() -> dict[str, int]:
    """Return the process ids of Ray's daemons that this process has started.

    There are none where it joined a cluster.
    """
    own = os.getpid()
    found: dict[str, int] = {}
    for pid in pids():
        name, parent = name_and_parent(pid)
        if parent == own and name in RAY_DAEMONS:
            found[name] = pid
    return found
