"""Find the verb and run it.

A verb's module is imported when it is called, so that ``recipes`` answers at once and ``eval``
needs neither veRL nor Ray.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

from verl_vla.core.errors import (
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
from verl_vla.core.text import nearest

VERBS = {
    "train": "improve a policy: train recipe=NAME key=value ...",
    "eval": "measure a policy on held-out starts: eval --policy DIR --suite NAME ...",
    "compare": "say which of two evaluated policies is better: compare A B",
    "replay": "make a video of an episode that was played: replay RUN --episode ID",
    "report": "write report.html of a training run: report RUN",
    "dashboard": "a local page on runs, also those that are going: dashboard RUNS_DIR",
    "doctor": "say whether this machine, or a checkpoint, can train: doctor [--checkpoint DIR] "
    "[--libero]",
    "check-suite": "build every task of a suite and count what fails: check-suite --suite NAME",
    "demos": "record demonstrations of scripted experts: demos --suite NAME --out PLACE ...",
    "sft": "fine-tune on demonstrations: sft recipe=NAME ..., or sft --demos FILE ...",
    "new-policy": "put a policy together: new-policy --language DIR --vision DIR --demos DIR ...",
    "reward-bench": "measure rewards before training on them: reward-bench --rewards A,B --out DIR",
    "quickstart": "train the embedded policy and show what it learned",
    "soak": "play thousands of episodes while simulators crash, and see that nothing grows",
    "bench": "measure the speed of a part: bench env|pool|rollout|update|step|gpu|images ...",
    "recipes": "list the recipes that come with the project",
    "plan": "say whether a recipe fits and how long it takes: plan recipe=NAME --gpu a100-80 ...",
    "explain": "say what every option of a recipe is, and why: explain recipe=NAME key=value ...",
}
"""Verb to its one-line help; each is a module of `verl_vla.cli`."""

EXIT_USAGE = 2
"""Something was asked for that cannot be; nothing was started."""

EXIT_STARVED = 3
"""Training stopped because nothing could be learned."""

EXIT_COLD_START = 4
"""Training did not begin: the policy succeeds too seldom to learn from its own episodes."""

EXIT_REWARD = 5
"""The reward raised, or gave an answer that cannot be trained on."""

EXIT_CHECKPOINT = 6
"""A checkpoint could not be written, or none is sound."""

EXIT_DIVERGED = 7
"""Training stopped because losses or gradients were no longer finite."""

EXIT_LEARNER_LOST = 8
"""Training stopped because a process of the learner died."""

STOPPED = {
    StarvedError: EXIT_STARVED,
    ColdStartError: EXIT_COLD_START,
    RewardError: EXIT_REWARD,
    CheckpointError: EXIT_CHECKPOINT,
    DivergedError: EXIT_DIVERGED,
    LearnerLostError: EXIT_LEARNER_LOST,
}
"""What ends a command for a reason that its message explains; each with its exit code."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code of the process."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    _speak_plainly()
    _one_thread_each()
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0 if argv else EXIT_USAGE
    try:
        if argv[0] not in VERBS:
            raise ConfigError(f"{argv[0]!r} is no verb; {nearest(argv[0], list(VERBS))}")
        verb = importlib.import_module(f"verl_vla.cli.{argv[0].replace('-', '_')}")
        return verb.run(argv[1:])
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USAGE
    except tuple(STOPPED) as error:
        sys.stderr.write(f"stopped: {error}\n")
        return next(code for kind, code in STOPPED.items() if isinstance(error, kind))
    except Interrupted as error:
        sys.stderr.write(f"stopped: {error}\n")
        return EXIT_SIGNAL + error.signal_number
    except KeyboardInterrupt:
        sys.stderr.write("stopped: SIGINT\n")
        return EXIT_SIGNAL + signal.SIGINT


def _speak_plainly() -> None:
    """Our own lines go to the console as they are; libraries keep their own ways."""
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("verl_vla")
    ours.addHandler(console)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    # it says at every import which of its faster kernels is missing
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _one_thread_each() -> None:
    """Many small processes share the cores; more threads in each only get in the way."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        if name not in os.environ:
            os.environ[name] = "1"


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()]
    return "python -m verl_vla VERB ...\n\n" + "\n".join(lines) + "\n"
