"""A fine-tuning recipe: every option with its default and its bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, model_validator

from verl_vla.config.choices import MOST_PROCESSES, Dtype
from verl_vla.config.compose import RECIPES_FOLDER, compose_recipe
from verl_vla.config.schema import parse, remedy, section
from verl_vla.config.shared import (
    NEVER,
    BaseRecipe,
    ClusterConfig,
    EnvironmentConfig,
    EvaluationConfig,
    OptimizerConfig,
    PolicyConfig,
    TrainerConfig,
)
from verl_vla.core.errors import ConfigError

SFT_RECIPES_FOLDER = RECIPES_FOLDER / "sft"
"""Folder of the fine-tuning recipes with a plain name."""
WARMUP_FLOOR = 0.1
"""Share of the learning rate that a warm-up starts from (openvla-oft ``finetune.py``)."""
DECAY = 0.1
"""``MultiStepLR``'s factor (openvla-oft ``finetune.py:944``)."""

Wording = Literal["task_name", "problem_info"]


@section("demos.choice")
class DemoChoice:
    """The demonstrations of each task that are read."""

    per_task: Literal["all"] | Annotated[StrictInt, Field(ge=1)] = Field(
        default="all", json_schema_extra=remedy("set 'all' or at least 1")
    )
    """Number of first episodes of each task to train on; 1 is SimpleVLA-RL's one-trajectory set."""
    held_out_per_task: StrictInt = Field(default=0, ge=0)
    """Number of last episodes of each task that are only tested on; openvla-oft holds out none."""
    filter_noops: StrictBool = True
    """Leave out steps without motion, as openvla-oft's ``_no_noops`` data do; a replay does not
    execute them either."""
    wording: Wording = "task_name"
    """Source of the instruction: ``task_name`` is the file's name, as in openvla-oft's data and in
    every evaluation; ``problem_info`` is the BDDL file's sentence, stored in the file, which
    differs in 29 of LIBERO's 130 tasks, including all of Spatial and Object."""


@section("policy")
class SFTPolicyConfig(PolicyConfig):
    """The policy that is fine-tuned: its checkpoint, adapters, precision and attention."""

    path: str | None = None
    """Folder of a checkpoint, OpenVLA-OFT or scratch VLA; null makes a tiny policy from scratch. A
    relative path starts at the project's root."""
    architecture: str = "openvla"
    """``model_type`` of the tiny policy that is made where ``path`` is null: ``openvla``, which is
    OpenVLA-OFT's, or ``scratch_vla``."""
    lora_rank: StrictInt | None = Field(default=None, ge=1)
    """Rank of new LoRA adapters: on all linear layers of OpenVLA-OFT, on those of a scratch VLA's
    language model; null trains the weights that are trainable in the checkpoint itself. Adapters
    are merged into the weights of the policy that is saved."""
    dtype: Dtype = "bfloat16"
    """Dtype of the arithmetic and of the saved weights; the head is always float32."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Back end of the language model's attention, which is bidirectional in both."""


@section("demos")
class DemosConfig:
    """The demonstrations that are learned, and the images made of them."""

    folder: str = Field(
        min_length=1, json_schema_extra=remedy("name the folder of LIBERO's HDF5 files")
    )
    """Folder of LIBERO's demonstrations, one file ``<task name>_demo.hdf5`` per task."""
    choice: DemoChoice = DemoChoice()
    images: Literal["rerendered", "stored"] = "rerendered"
    """``rerendered`` renders new ones at ``environment.render_size``, once per run; ``stored``
    reads LIBERO's own images, which have 128 px."""
    replay: StrictBool = True
    """For ``rerendered``: execute the recorded actions again and learn only demonstrations that are
    solved then, as in openvla-oft's data; ``false`` renders the recorded states of all."""
    augment: StrictBool = True
    """Augment images at random, as published; evaluations then crop the centre."""
    num_loaders: StrictInt = Field(default=2, ge=0, le=MOST_PROCESSES)
    """Number of processes per rank that read and prepare images; 0 reads between the steps."""


@section("optimizer")
class SFTOptimizerConfig(OptimizerConfig):
    """AdamW, its learning-rate schedule, and the sizes of batch and micro-batch."""

    lr: StrictFloat = Field(default=5e-4, gt=0)
    """Learning rate between warm-up and decay (openvla-oft ``vla-scripts/finetune.py:89``)."""
    warmup_steps: StrictInt = Field(default=0, ge=0)
    """Number of training steps over which the learning rate rises linearly from a tenth."""
    lr_scheduler_type: Literal["multistep", "cosine"] = "multistep"
    """Decay after the warm-up: ``multistep`` at ``decay_at``, as openvla-oft; ``cosine`` down to
    ``min_lr_ratio`` at the last step."""
    decay_at: tuple[StrictInt, ...] = (100_000,)
    """Steps from which on ``multistep`` takes a tenth of the learning rate (``finetune.py:91``)."""
    min_lr_ratio: StrictFloat = Field(default=0.0, ge=0, le=1)
    """Share of ``lr`` that ``cosine`` ends with."""
    smoothing: StrictFloat = Field(default=0.0, ge=0)
    """Standard deviation of the target around the demonstrated bin, in bins, for values that move.
    Neighbouring bins are nearly the same motion: a target that says so is learned faster, and
    leaves GRPO something to choose from. 0 asks for the demonstrated bin alone, as openvla-oft."""
    clip_grad: StrictFloat | None = Field(
        default=None,
        gt=0,
        json_schema_extra=remedy("set more than 0, or null not to clip"),
    )
    """Upper bound of the gradient's norm; null does not clip, as openvla-oft."""
    batch_size: StrictInt = Field(default=64, ge=1)
    """Number of samples per step, over all ranks (openvla-oft: 8 on each of 8)."""
    micro_batch_size: StrictInt = Field(default=8, ge=1)

    def lr_factor(self, step: int, total_steps: int) -> float:
        """Return the share of ``lr`` at a step, counted from 0, of ``total_steps``.

        >>> optimizer = SFTOptimizerConfig(warmup_steps=9, decay_at=(20, 30))
        >>> [round(optimizer.lr_factor(step, 40), 3) for step in (0, 8, 19, 20, 30)]
        [0.2, 1.0, 1.0, 0.1, 0.01]
        >>> cosine = SFTOptimizerConfig(lr_scheduler_type="cosine", min_lr_ratio=0.1)
        >>> [round(cosine.lr_factor(step, 100), 3) for step in (49, 99)]
        [0.55, 0.1]
        """
        # step + 1: the last step of the warm-up has the whole rate
        if step < self.warmup_steps:
            return WARMUP_FLOOR + (1 - WARMUP_FLOOR) * (step + 1) / self.warmup_steps
        if self.lr_scheduler_type == "multistep":
            return DECAY ** sum(step >= milestone for milestone in self.decay_at)
        progress = (step + 1 - self.warmup_steps) / (total_steps - self.warmup_steps)
        fall = (1 + math.cos(math.pi * progress)) / 2
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * fall


@section("trainer")
class SFTTrainerConfig(TrainerConfig):
    """Length of a run, and the intervals of checkpoints, tests and evaluations."""

    total_training_steps: StrictInt = Field(default=150_000, ge=1)
    save_every: StrictInt = Field(default=1000, ge=1)
    """Training steps between checkpoints. The first step is always saved, so that a run that cannot
    save fails at once; so are the last step and the one at which SIGINT or SIGTERM ends the run."""
    test_every: StrictInt = Field(default=0, ge=0, json_schema_extra=NEVER)
    """Training steps between open-loop tests on held-out episodes; 0 never tests, as there are none
    unless ``demos.choice.held_out_per_task`` asks for some."""
    eval_every: StrictInt = Field(default=10_000, ge=0, json_schema_extra=NEVER)
    show_every: StrictInt = Field(default=20, ge=1)
    """Training steps between lines on the console."""


@section("cluster")
class SFTClusterConfig(ClusterConfig):
    """Processes of the learner: all on one machine, one per rank."""

    num_ranks: StrictInt = Field(default=1, ge=1, le=MOST_PROCESSES)
    """Number of data-parallel processes, one GPU each."""


@section("")
class SFTRecipe(BaseRecipe):
    """All options of a fine-tuning run."""

    demos: DemosConfig
    environment: EnvironmentConfig
    """Suite and tasks that are learned and evaluated."""
    policy: SFTPolicyConfig = SFTPolicyConfig()
    optimizer: SFTOptimizerConfig = SFTOptimizerConfig()
    trainer: SFTTrainerConfig = SFTTrainerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: SFTClusterConfig = SFTClusterConfig()

    @model_validator(mode="after")
    def _check_shares(self) -> SFTRecipe:
        # FSDP averages gradients over ranks, which is the mean of the batch for equal shares only
        if self.optimizer.batch_size % self.cluster.num_ranks:
            raise ConfigError(
                f"optimizer.batch_size is {self.optimizer.batch_size}, which "
                f"{self.cluster.num_ranks} ranks cannot share evenly; set a multiple"
            )
        if self.trainer.test_every and not self.demos.choice.held_out_per_task:
            raise ConfigError(
                f"trainer.test_every is {self.trainer.test_every}, but "
                "demos.choice.held_out_per_task is 0; hold some out, or set trainer.test_every=0"
            )
        return self


def load_sft_recipe(arguments: Sequence[str]) -> SFTRecipe:
    """Compose and check a recipe from ``recipe=NAME key=value ...``.

    ``recipe`` is a name in `SFT_RECIPES_FOLDER` or a path to a YAML file; other keys override it.

    Raises:
        ConfigError: no recipe named, unknown recipe or key, or an impossible value.
    """
    return parse(SFTRecipe, compose_recipe(arguments, SFT_RECIPES_FOLDER).values)
