"""Evaluations during a GRPO run: at one temperature, and sampled as in training besides.

The first gives the curve, ``val/success_rate``. It is greedy by default, as published numbers are.
GRPO improves the sampled policy, so the second one shows what training itself sees: a run can gain
when sampled and stand still greedily, or the other way round. Both are of the same starts.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from verl_vla.config.grpo import GRPOTrainerConfig, Recipe
from verl_vla.evaluation.conditions import sampling_of
from verl_vla.runs.metrics import SAMPLED

logger = logging.getLogger(__name__)

MAX_SHARE = 0.1
"""Share of the training episodes that all evaluations must stay below for ``also_sampled=auto`` to
make both. Chosen: a tenth of a run is a price that nobody needs to be asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationKind:
    """One of the evaluations that are made after the same training step."""

    temperature: float
    suffix: str
    """Last part of its metrics' names and of its record's: empty, or `SAMPLED`."""

    @property
    def label(self) -> str:
        """Addition to the training step on the console; empty for the evaluation of the curve."""
        return f", {sampling_of(self.temperature)}" if self.suffix else ""


def evaluation_kinds(recipe: Recipe, num_starts: int) -> tuple[EvaluationKind, ...]:
    """Return the kinds of evaluation of a run, and log how they were chosen.

    Args:
        recipe: recipe of the run.
        num_starts: number of starts of one evaluation.
    """
    config, trained_at = recipe.evaluation, recipe.sampling.temperature
    curve = EvaluationKind(temperature=config.temperature, suffix="")
    both = curve, EvaluationKind(temperature=trained_at, suffix=SAMPLED)
    number = num_evaluations(recipe.trainer)
    if config.also_sampled == "always":
        return both
    if config.also_sampled == "never" or not number:
        return (curve,)
    if config.temperature > 0:
        logger.info("evaluations: %s alone, since that is sampled", sampling_of(config.temperature))
        return (curve,)
    episodes = len(both) * number * num_starts
    trained_on = num_training_episodes(recipe)
    is_cheap = episodes < MAX_SHARE * trained_on
    logger.info(
        "evaluations: greedy %s; %d evaluations of %d episodes each way make %d, %s %.0f%% of the "
        "%d in training (evaluation.also_sampled)",
        f"and sampled at temperature {trained_at:g}" if is_cheap else "alone",
        number,
        num_starts,
        episodes,
        "less than" if is_cheap else "not less than",
        100 * MAX_SHARE,
        trained_on,
    )
    return both if is_cheap else (curve,)


def num_evaluations(trainer: GRPOTrainerConfig) -> int:
    """Return after how many training steps, step 0 included, a run is evaluated."""
    before = int(trainer.eval_before)
    if not trainer.eval_every:
        return before
    # the last step is always evaluated
    return before - (-trainer.total_training_steps // trainer.eval_every)


def num_training_episodes(recipe: Recipe) -> int:
    """Return the episodes of a run with one rollout round a step; further rounds are not known."""
    sampling = recipe.sampling
    return recipe.trainer.total_training_steps * sampling.groups_per_step * sampling.group_size
