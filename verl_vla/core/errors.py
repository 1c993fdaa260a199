"""The ways a run can go wrong, told apart by who has to act.

``ConfigError``       the person who wrote the recipe or started the command
``ContractError``     the person who wrote the code on one side of a boundary
``RewardError``       the person who wrote the reward
``EpisodeCrashed``    nobody yet: one simulator died; the run goes on and counts it
``ColdStartError``    the person who chose the policy: it succeeds too seldom to be trained
``StarvedError``      the person who chose the tasks: no group taught anything
``SolvedError``       nobody, once something was trained: every episode of a step was solved
``CheckpointError``   the person who looks after the disk: nothing sound to write to or go on from
``DivergedError``     the person who chose the rates: losses or gradients are no longer finite
``LearnerLostError``  the person who looks after the machine: a learner process died
``Interrupted``       nobody: somebody asked the run to stop, and it did
"""

EXIT_SIGNAL = 128
"""A process that ends because of signal n exits with this plus n, as shells report it."""


class ConfigError(ValueError):
    """Something impossible was asked for; raised before any worker starts."""


class ContractError(TypeError):
    """A table or message has a wrong shape, dtype or key; raised where it is made."""


class RewardError(ContractError):
    """A reward or its encoder raised, or gave an answer that cannot be trained on."""


class EpisodeCrashed(RuntimeError):  # noqa: N818 -- an event, named for what happened
    """One simulator raised, hung or died; the message carries the true cause."""


class ColdStartError(RuntimeError):
    """The policy succeeds too seldom to be trained; see `verl_vla.evaluation.cold_start`."""


class StarvedError(RuntimeError):
    """Every group played in a training step agreed with itself, so nothing can be learned."""


class SolvedError(StarvedError):
    """Every episode that survived a training step was solved, so nothing is left to learn."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none that was written is sound."""


class DivergedError(RuntimeError):
    """One optimizer step after the other was left out, since nothing finite came of it."""


class LearnerLostError(RuntimeError):
    """A process of the learner died; what was saved before is whole."""


class Interrupted(RuntimeError):  # noqa: N818 -- an event, named for what happened
    """A signal asked for the end, and the work is in a state to go on from."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
