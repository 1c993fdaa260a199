"""The ways a run can go wrong, told apart by who has to act.

``ConfigError``       the person who wrote the recipe or started the command
``ContractError``     the person who wrote the code on one side of a boundary
``RewardError``       the person who wrote the reward
``EpisodeCrashed``    nobody yet: one simulator died; the run goes on and counts it
``ColdStartError``    the person who chose the policy: it succeeds too seldom to be trained
``StarvedError``      the person who chose the tasks: no group taught anything
"""


class ConfigError(ValueError):
    """Something impossible was asked for; raised before any worker starts."""


class ContractError(TypeError):
    """A table or message has a wrong shape, dtype or key; raised where it is made."""


class RewardError(ContractError):
    """A reward or its encoder raised, or gave an answer that cannot be trained on."""


class EpisodeCrashed(RuntimeError):  # noqa: N818 -- an event, named for what happened
    """One simulator raised, hung or died; the message carries the true cause."""


class ColdStartError(RuntimeError):
    """The policy does not succeed often enough before training; see `verl_vla.gate`."""


class StarvedError(RuntimeError):
    """Every group played in a training step agreed with itself, so nothing can be learned."""
