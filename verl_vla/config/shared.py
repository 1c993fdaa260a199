"""Sections that GRPO and fine-tuning recipes share, and the bases of those that differ."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt

from verl_vla.config.choices import MOST_PROCESSES, MOST_PX, MOST_SEED, MOST_SLOTS
from verl_vla.config.schema import remedy, section

LORA_ALPHA = 16
"""Default alpha (openvla-oft, ``vla-scripts/finetune.py``: ``min(lora_rank, 16)``, rank 32)."""

NEVER = remedy("set 0 for never")
"""Answer to an interval below 0."""

Betas = Annotated[
    # of any length, so that a wrong length gets the remedy below and not one about a missing item
    tuple[Annotated[StrictFloat, Field(ge=0, lt=1)], ...],
    Field(
        min_length=2,
        max_length=2,
        json_schema_extra=remedy(
            "AdamW takes two numbers of at least 0 and less than 1, e.g. [0.9,0.999]"
        ),
    ),
]
"""Type of AdamW's betas."""


@section("evaluation")
class EvaluationConfig:
    """Episodes and temperature of an evaluation."""

    episodes_per_task: StrictInt | None = Field(
        default=None,
        ge=1,
        json_schema_extra=remedy("set at least 1, or null for all held-out starts"),
    )
    """Number of episodes per task, on the first held-out starts; null plays each of them once."""
    temperature: StrictFloat = Field(
        default=0.0, ge=0, json_schema_extra=remedy("set 0 for greedy play or more")
    )
    """Sampling temperature of the action tokens; 0 decodes greedily."""
    states: Literal["held_out", "sampled"] = "held_out"
    """``held_out``: recorded init states that are never trained on, 10 per task in LIBERO's suites;
    ``sampled``: ``episodes_per_task`` starts per task, sampled from its regions."""


@section("environment")
class EnvironmentConfig:
    """The suite and tasks that are played, and the processes that simulate them."""

    suite: str
    """``mini``, ``libero_spatial``, ``libero_object``, ``libero_goal``, ``libero_10``,
    ``libero_90``, or your own suite: ``path/to/file.py:ClassName``."""
    tasks: tuple[StrictInt, ...] | None = None
    """Task ids within the suite; null plays all."""
    step_limit: Literal["published", "simplevla"] | StrictInt = "published"
    """Number of simulator steps after which an episode has failed: openvla-oft's table,
    SimpleVLA-RL's 512 for all suites, or a number."""
    render_size: StrictInt | None = Field(default=None, ge=1, le=MOST_PX)
    """Height and width of a camera's image before it is prepared for the policy, px; null takes
    the size that the policy was fine-tuned on, or openvla-oft's 256 if its folder does not say."""
    num_workers: StrictInt = Field(default=8, ge=1, le=MOST_PROCESSES)
    """Number of simulator processes on each machine that simulates."""
    num_slots: StrictInt = Field(default=64, ge=1, le=MOST_SLOTS)
    """Number of episodes that run at the same time."""
    timeout_s: StrictFloat = Field(
        default=300.0, gt=0, json_schema_extra=remedy("set the seconds to wait, e.g. 300")
    )
    """Time within which a simulator must answer a request, s, including the time to build it and
    to run an action chunk; one that does not is killed, and its episode counts as crashed."""


@section("policy")
class PolicyConfig:
    """What the policies of all recipes have."""

    lora_alpha: StrictInt = Field(default=LORA_ALPHA, ge=1)
    """Numerator of the adapters' scale, which is ``lora_alpha / lora_rank``."""
    gradient_checkpointing: StrictBool = False
    """Recompute activations in the backward pass: less memory, a third more time."""


@section("optimizer")
class OptimizerConfig:
    """AdamW as all recipes have it."""

    # no default: GRPO and fine-tuning have rates that differ by a factor of 100
    lr: StrictFloat = Field(gt=0)
    """Learning rate after warm-up."""
    warmup_steps: StrictInt = Field(default=0, ge=0)
    """Number of training steps over which the learning rate rises linearly."""
    weight_decay: StrictFloat = Field(default=0.01, ge=0)
    """AdamW's decoupled weight decay, scaled by the learning rate."""
    betas: Betas = (0.9, 0.999)
    """AdamW's decay rates of the running means of the gradient and of its square."""
    micro_batch_size: StrictInt = Field(ge=1)
    """Number of samples per forward and backward pass of one rank."""
    max_skipped_in_a_row: StrictInt = Field(default=3, ge=1)
    """Number of skipped optimizer steps in a row that ends the run. A step is skipped where loss or
    gradient is not finite: one can be due to its batch, that many in a row to the weights."""


@section("trainer")
class TrainerConfig:
    """Length and intervals of all runs."""

    total_training_steps: StrictInt = Field(ge=1)
    """Number of training steps of the run, counted over all its restarts."""
    save_every: StrictInt = Field(ge=0, json_schema_extra=NEVER)
    """Training steps between checkpoints."""
    keep_checkpoints: StrictInt = Field(default=2, ge=1)
    """Number of newest checkpoints that are kept; older ones are deleted."""
    eval_every: StrictInt = Field(ge=0, json_schema_extra=NEVER)
    """Training steps between evaluations on held-out starts; the last step is always evaluated.
    0 evaluates nothing."""


@section("cluster")
class ClusterConfig:
    """What the learner of every run has."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the learner; ``auto`` takes the GPUs if there are any."""


@section("")
class BaseRecipe:
    """What every run has."""

    out: str = Field(
        min_length=1, json_schema_extra=remedy("name a folder for the run, e.g. out=runs/first")
    )
    """Folder of the run: configuration, metrics, checkpoints. The same command resumes it."""
    seed: StrictInt = Field(default=0, ge=0, le=MOST_SEED)
    """Seed of all of the run's randomness."""

    def as_dict(self) -> dict[str, Any]:
        """Return a plain nested mapping, ready for YAML."""
        return asdict(self)
