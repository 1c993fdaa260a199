"""Errors that can end a run or an episode, one class for each person who has to act.

``ConfigError``       the person who wrote the recipe or started the command
``ContractError``     the person who wrote the code on one side of a boundary
``RewardError``       the person who wrote the reward
``EpisodeCrashed``    no one yet: one simulator died; the run continues and counts it
``ColdStartError``    the person who chose the policy: it succeeds too seldom to be trained
``StarvedError``      the person who chose the tasks: no group was informative
``SolvedError``       no one, once something was trained: every episode of a step was solved
``CheckpointError``   the person who looks after the disk: cannot write, or no valid checkpoint
``WriteError``        the person who looks after the disk: a record of a run cannot be written
``DivergedError``     the person who chose the rates: losses or gradients are no longer finite
``LearnerLostError``  the person who looks after the machine: a learner process died
``Interrupted``       no one: the run was asked to stop, and it did
"""

EXIT_SIGNAL = 128
"""Base of the exit code of a process that a signal ended: this plus its number, as in shells."""

EXIT_USAGE = 2
"""Exit code of an invalid request; nothing was started."""

EXIT_STARVED = 3
"""Exit code if training stopped because nothing could be learned."""

EXIT_COLD_START = 4
"""Exit code if training did not begin: the policy succeeds too rarely to learn from it."""

EXIT_REWARD = 5
"""Exit code if the reward raised, took too long, or gave scores that cannot be trained on."""

EXIT_CHECKPOINT = 6
"""Exit code if a checkpoint or a record could not be written, or no checkpoint is valid."""

EXIT_DIVERGED = 7
"""Exit code if training stopped because losses or gradients were no longer finite."""

EXIT_LEARNER_LOST = 8
"""Exit code if training stopped because a process of the learner died."""


class ConfigError(ValueError):
    """A request that cannot be met; raised before anything is trained."""


class ContractError(TypeError):
    """A wrong shape, dtype or key in a table or message; raised where it is made."""


class RewardError(ContractError):
    """A reward or its encoder that raised, or returned values that cannot be trained on."""


class EpisodeCrashed(RuntimeError):  # noqa: N818 -- an event, named for what happened
    """The loss of one simulator, which raised, hung or died; the message names the true cause."""


class ColdStartError(RuntimeError):
    """A policy that succeeds too seldom to be trained; see `verl_vla.evaluation.cold_start`."""


class StarvedError(RuntimeError):
    """A training step without an informative group: each group's episodes all scored the same."""


class SolvedError(StarvedError):
    """A training step in which every episode that did not crash was solved: nothing to learn."""


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or no valid one among those that were."""


class WriteError(RuntimeError):
    """A record of a run or an evaluation that could not be written; the message has its path."""


class DivergedError(RuntimeError):
    """Too many optimizer steps skipped in a row, since loss or gradient was not finite."""


class LearnerLostError(RuntimeError):
    """The death of a learner process; checkpoints saved before it are complete."""


class Interrupted(RuntimeError):  # noqa: N818 -- an event, named for what happened
    """An end that a signal asked for; the work was saved and can be resumed."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
