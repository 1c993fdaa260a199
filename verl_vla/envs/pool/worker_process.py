"""One simulator process, seen from the pool."""

from __future__ import annotations

import fcntl
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Literal

from verl_vla.envs.pool.messages import STACK_SIGNAL, Reply, Request, Setup, Stop

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LP_NUM_THREADS": "1"}
"""Environment variables that limit a worker to one thread, since simulators run one per core;
LP_NUM_THREADS is for Mesa's software renderer."""

OUTPUT_LIMIT = 1 << 20
"""Size of a worker's output, bytes, beyond which the next request drops all but its tail."""

OUTPUT_TAIL = 4000
"""Number of last bytes of a worker's output that are reported when it dies."""

STACK_S = 0.2
"""Time that a worker that hangs has to write its stack trace, s."""

EXIT_GRACE_S = 1.0
"""Time that a process has to end once its socket is closed, s."""

State = Literal["starting", "idle", "busy", "leaving"]
"""State of a worker; ``leaving``: its simulator has raised, and the process is about to exit."""


class WorkerProcess:
    """A `verl_vla.envs.pool.worker` process with its state, request and deadline.

    Attributes:
        number: number that no other running worker of the pool has.
        state: its `State`.
        request: the request that it is serving, or None.
        deadline: time by which it must have answered or exited, on `time.monotonic`'s clock.
        tasks: times at which it last served each task; it probably has simulators for the latest.
    """

    def __init__(
        self,
        setup: Setup,
        frames_descriptor: int,
        environment: Mapping[str, str],
        *,
        number: int,
        deadline: float,
    ) -> None:
        self.number = number
        self.state: State = "starting"
        self.request: Request | None = None
        self.deadline = deadline
        self.tasks: dict[int, float] = {}
        self._is_killed_here = False
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by `reap`
        append = fcntl.fcntl(self._output, fcntl.F_GETFL) | os.O_APPEND
        fcntl.fcntl(self._output, fcntl.F_SETFL, append)  # so that it can be truncated while in use
        ours, theirs = socket.socketpair()
        # closed here once the child has a copy: else the child's end would be no hang-up
        with theirs:
            self._process = self._launch(theirs.fileno(), frames_descriptor, environment)
        # detached, or the socket's end would close the connection's descriptor
        self._connection = Connection(ours.detach())
        with suppress(OSError):  # if it is dead already, the next `receive` raises
            self._connection.send(setup)

    def _launch(
        self, socket_descriptor: int, frames_descriptor: int, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a new interpreter with this one's import path.

        `multiprocessing` would import the caller's ``__main__``, which may be a Ray actor.
        """
        path = os.pathsep.join(p for p in sys.path if p)
        descriptors = (socket_descriptor, frames_descriptor)
        return subprocess.Popen(
            [sys.executable, "-u", "-m", "verl_vla.envs.pool.worker", *map(str, descriptors)],
            stdin=subprocess.DEVNULL,  # a prompt must fail instead of waiting for input
            stdout=self._output,
            stderr=subprocess.STDOUT,
            pass_fds=descriptors,
            # the caller's variables come last, so they can undo `ONE_THREAD`
            env={**os.environ, "PYTHONPATH": path, **ONE_THREAD, **environment},
        )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def fileno(self) -> int:
        """Return the file descriptor to poll for replies."""
        return self._connection.fileno()

    def give(self, request: Request, *, deadline: float) -> None:
        """Send a request to an idle worker.

        Raises:
            OSError: the worker died before it could receive the request.
        """
        # before the request: what the worker writes meanwhile could be lost
        self._forget_old_output()
        self._connection.send(request)
        self.state, self.request, self.deadline = "busy", request, deadline
        self.tasks[request.task_id] = time.monotonic()

    def receive(self) -> Reply:
        """Receive a reply.

        Raises:
            EOFError: the worker is dead.
        """
        try:
            return pickle.loads(self._connection.recv_bytes())
        except OSError as error:
            raise EOFError from error

    def ask_to_stop(self) -> None:
        """Ask the worker to exit after its current request."""
        with suppress(OSError):
            self._connection.send(Stop())

    def terminate(self) -> None:
        """Send SIGTERM to the worker."""
        self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL to the worker."""
        self._is_killed_here = True
        self._process.kill()

    def kill_and_tell(self) -> None:
        """Kill a worker that hangs, after asking it to write its stack trace to its output."""
        # faulthandler writes the stack even where Python code never returns
        self._process.send_signal(STACK_SIGNAL)
        if not self.has_ended(before=time.monotonic() + STACK_S):
            self.kill()

    def has_ended(self, *, before: float) -> bool:
        """Wait until ``before``, on `time.monotonic`'s clock; return True if the process ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, before - time.monotonic()))
            return True
        return False

    def reap(self) -> str:
        """Wait for a worker that was killed or is about to exit, and free its resources.

        Returns:
            Its exit code or signal, and the last bytes of its output, for a message.
        """
        if not self.has_ended(before=time.monotonic() + EXIT_GRACE_S):
            self.kill()
        code = self._process.wait()
        self._connection.close()
        ending = f"exit code {code}" if code >= 0 else self._describe_signal(-code)
        with self._output:
            text = self._last_output().decode(errors="replace").strip()
        return f"{ending}; its last output:\n{text}" if text else f"{ending}; it wrote nothing"

    def _forget_old_output(self) -> None:
        file = self._output.fileno()
        if os.fstat(file).st_size > OUTPUT_LIMIT:
            kept = self._last_output()
            os.ftruncate(file, 0)
            os.write(file, kept)

    def _last_output(self) -> bytes:
        file = self._output.fileno()
        return os.pread(file, OUTPUT_TAIL, max(0, os.fstat(file).st_size - OUTPUT_TAIL))

    def _describe_signal(self, number: int) -> str:
        hint = ""
        if number == signal.SIGKILL:
            # the kernel's own kills look like anybody's
            hint = ", by this run" if self._is_killed_here else ", by the kernel if memory ran out"
        return f"signal {number}: {signal.strsignal(number)}{hint}"
