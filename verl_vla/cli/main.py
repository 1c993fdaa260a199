"""Entry point of the command line: find the verb and run it.

A verb's module is imported only when it is called, so that ``recipes`` is fast and ``eval`` works
without veRL and Ray.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

from verl_vla.cli.arguments import COMMANDS, parse
from verl_vla.core.errors import (
    EXIT_LEARNER_LOST,
    EXIT_SIGNAL,
    CheckpointError,
    ColdStartError,
    ConfigError,
    DivergedError,
    Interrupted,
    LearnerLostError,
    RewardError,
    StarvedError,
)
from verl_vla.core.scratch import scratch_folder
from verl_vla.core.text import nearest, shorten
from verl_vla.runs.terminal import Console

EXIT_USAGE = 2
"""Exit code of an invalid request; nothing was started."""

PATH_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.ENOTDIR)
"""Errors of the system that are about the path that was named, rather than about the disk."""

EXIT_STARVED = 3
"""Exit code if training stopped because nothing could be learned."""

EXIT_COLD_START = 4
"""Exit code if training did not begin: the policy succeeds too rarely to learn from it."""

EXIT_REWARD = 5
"""Exit code if the reward raised, or gave scores that cannot be trained on."""

EXIT_CHECKPOINT = 6
"""Exit code if a checkpoint could not be written, or none is valid."""

EXIT_DIVERGED = 7
"""Exit code if training stopped because losses or gradients were no longer finite."""

STOPPED = {
    StarvedError: EXIT_STARVED,
    ColdStartError: EXIT_COLD_START,
    RewardError: EXIT_REWARD,
    CheckpointError: EXIT_CHECKPOINT,
    DivergedError: EXIT_DIVERGED,
    LearnerLostError: EXIT_LEARNER_LOST,
}
"""Exit codes of errors that end a command and whose message explains the reason."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code of the process."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    console = _speak_plainly()
    _one_thread_each()
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0 if argv else EXIT_USAGE
    try:
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
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USAGE
    except OSError as error:
        # whoever looks at a path may raise these, and there are many
        if error.errno not in PATH_ERRORS or error.filename is None:
            raise
        sys.stderr.write(f"error: {_cannot_be_used(error)}\n")
        return EXIT_USAGE
    except tuple(STOPPED) as error:
        sys.stderr.write(f"stopped: {error}\n")
        # isinstance, since SolvedError has the exit code of the StarvedError that it is
        return next(code for kind, code in STOPPED.items() if isinstance(error, kind))
    except Interrupted as error:
        sys.stderr.write(f"stopped: {error}\n")
        return EXIT_SIGNAL + error.signal_number
    except KeyboardInterrupt:
        sys.stderr.write("stopped: SIGINT\n")
        return EXIT_SIGNAL + signal.SIGINT


def _cannot_be_used(error: OSError) -> str:
    path = shorten(str(error.filename))
    return f"{path} cannot be used ({error.strerror}); choose another path, or its permissions"


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
