"""Entry point of the command line: find the verb and run it.

A verb's module is imported only when it is called, so that ``recipes`` is fast and ``eval`` works
without veRL and Ray.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence

from verl_vla.cli.arguments import COMMANDS, parse
from verl_vla.core.errors import (
    EXIT_CHECKPOINT,
    EXIT_COLD_START,
    EXIT_DIVERGED,
    EXIT_LEARNER_LOST,
    EXIT_REWARD,
    EXIT_SIGNAL,
    EXIT_STARVED,
    EXIT_USAGE,
    CheckpointError,
    ColdStartError,
    ConfigError,
    DivergedError,
    Interrupted,
    LearnerLostError,
    RewardError,
    StarvedError,
    WriteError,
)
from verl_vla.core.files import DISK_IS_FULL
from verl_vla.core.scratch import scratch_folder
from verl_vla.core.text import nearest
from verl_vla.runs.terminal import Console

STOPPED = {
    StarvedError: EXIT_STARVED,
    ColdStartError: EXIT_COLD_START,
    RewardError: EXIT_REWARD,
    CheckpointError: EXIT_CHECKPOINT,
    WriteError: EXIT_CHECKPOINT,
    DivergedError: EXIT_DIVERGED,
    LearnerLostError: EXIT_LEARNER_LOST,
}
"""Exit codes of errors that end a command and whose message explains the reason."""

OF_PATHS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
"""Errors of the system about a path as such, which the user has named, whatever is done with it."""
LONGEST_WORD = 400
"""Characters of a word in a message; the rest of longer ones is left out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code of the process."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    console = _speak_plainly()
    _one_thread_each()
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0 if argv else EXIT_USAGE
    try:
        _refuse_nul(argv)
        if argv[0] not in COMMANDS:
            raise ConfigError(f"{argv[0]!r} is no command; {nearest(argv[0], list(COMMANDS))}")
        options = parse(argv[0], argv[1:])
        # after the arguments are checked, since the import may take seconds
        with scratch_folder():
            command = importlib.import_module(f"verl_vla.cli.{argv[0].replace('-', '_')}")
            try:
                return command.run(options)
            finally:
                # before an error is written, or a bar would be drawn over it
                console.end_bars()
    except ConfigError as error:
        sys.stderr.write(f"error: {_shorten(str(error))}\n")
        return EXIT_USAGE
    except tuple(STOPPED) as error:
        sys.stderr.write(f"stopped: {error}\n")
        # isinstance, since SolvedError has the exit code of the StarvedError that it is
        return next(code for kind, code in STOPPED.items() if isinstance(error, kind))
    except OSError as error:
        said, code = _explain(error)
        sys.stderr.write(f"{said}\n")
        return code
    except Interrupted as error:
        sys.stderr.write(f"stopped: {error}\n")
        return EXIT_SIGNAL + error.signal_number
    except KeyboardInterrupt:
        sys.stderr.write("stopped: SIGINT\n")
        return EXIT_SIGNAL + signal.SIGINT


def _refuse_nul(argv: Sequence[str]) -> None:
    for word in argv:
        if "\0" in word:
            raise ConfigError(f"{word!r} holds a NUL, which no path and no name has; remove it")


def _shorten(message: str) -> str:
    """Cut words that would fill a screen."""
    return re.sub(
        rf"\S{{{LONGEST_WORD},}}",
        lambda word: f"{word[0][:60]}...({len(word[0])} characters)",
        message,
    )


def _explain(error: OSError) -> tuple[str, int]:
    """Return message and exit code of an error of the system that a user can mend.

    Raises:
        OSError: it is of another kind.
    """
    if error.errno in OF_PATHS and error.filename is not None:
        reason = f"{error.filename} cannot be read or written ({error.strerror}); name another path"
        return f"error: {_shorten(reason)}", EXIT_USAGE
    # what is written by other programs' code, which knows nothing of `WriteError`
    if error.errno in DISK_IS_FULL:
        return f"stopped: {_no_room(error)}", EXIT_CHECKPOINT
    raise error


def _no_room(error: OSError) -> str:
    """Return what could not be written, where a full disk was met more than once: the first."""
    first: BaseException | None = error
    while first is not None:
        if isinstance(first, WriteError | CheckpointError):
            return str(first)
        first = first.__context__
    where = error.filename or "a file"
    return f"{where} could not be written ({error.strerror}). Make room, and start again"


def _speak_plainly() -> Console:
    """Log our own messages to stdout without prefixes; loggers of libraries do not change."""
    console = Console(sys.stdout)
    console.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("verl_vla")
    ours.addHandler(console)
    ours.setLevel(logging.INFO)
    # a library that gives the root logger a handler would show our lines twice
    ours.propagate = False
    # bitsandbytes warns at every import about missing optional kernels
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not console.draws:
        os.environ["TQDM_DISABLE"] = "1"  # bars of libraries, whose carriage returns fill a log
    return console


def _one_thread_each() -> None:
    """Limit math libraries to one thread, since many small processes share the cores."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        # what the user has set stays
        if name not in os.environ:
            os.environ[name] = "1"


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.__doc__}" for name, command in COMMANDS.items()]
    return "verl-vla COMMAND ...; verl-vla COMMAND --help\n\n" + "\n".join(lines) + "\n"
