"""A fine-tuning recipe: every option with its default and its check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from verl_vla.config.choices import Dtype
from verl_vla.config.compose import RECIPES_FOLDER, compose_recipe
from verl_vla.config.grpo import LORA_ALPHA, EnvironmentConfig, EvaluationConfig
from verl_vla.core.errors import ConfigError
from verl_vla.core.schema import parse

Wording = Literal["task_name", "problem_info"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoChoice:
    """The demonstrations of each task that are read."""

    per_task: Literal["all"] | int = "all"
    """Number of first episodes of each task to train on; 1 is SimpleVLA-RL's one-trajectory set."""
    held_out_per_task: int = 1
    """Number of last episodes of each task that are only tested on."""
    filter_noops: bool = True
    """Leave out steps without motion, as openvla-oft's ``_no_noops`` data do."""
    wording: Wording = "task_name"
    """Source of the instruction: ``task_name`` is the file's name, as in openvla-oft's data and in
    every evaluation; ``problem_info`` is the BDDL file's sentence, stored in the file, which
    differs in 29 of LIBERO's 130 tasks, including all of Spatial and Object."""

    def __post_init__(self) -> None:
        if self.per_task != "all" and self.per_task < 1:
            raise ConfigError(f"demos.choice.per_task is {self.per_task}; set 'all' or at least 1")
        if self.held_out_per_task < 0:
            raise ConfigError(
                f"demos.choice.held_out_per_task is {self.held_out_per_task}; set 0 or more"
            )


SFT_RECIPES_FOLDER = RECIPES_FOLDER / "sft"
"""Folder of the fine-tuning recipes with a plain name."""
WARMUP_FLOOR = 0.1
"""Share of the learning rate that a warm-up starts from (openvla-oft ``finetune.py``)."""
DECAY = 0.1
"""``MultiStepLR``'s factor (openvla-oft ``finetune.py:944``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """The policy that is fine-tuned: its checkpoint, adapters, precision and attention."""

    path: str | None = None
    """Folder of a checkpoint, OpenVLA-OFT or scratch VLA; null makes a tiny policy from scratch. A
    relative path starts at the project's root."""
    lora_rank: int | None = None
    """Rank of new LoRA adapters: on all linear layers of OpenVLA-OFT, on those of a scratch VLA's
    language model; null trains the weights that are trainable in the checkpoint itself. Adapters
    are merged into the weights of the policy that is saved."""
    lora_alpha: int = LORA_ALPHA
    """Numerator of the adapters' scale, which is ``lora_alpha / lora_rank``."""
    dtype: Dtype = "bfloat16"
    """Dtype of the arithmetic and of the saved weights; the head is always float32."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Back end of the language model's attention, which is bidirectional in both."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""

    def __post_init__(self) -> None:
        for name in ("lora_rank", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"policy.{name} is {value}; set at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemosConfig:
    """The demonstrations that are learned, and the images made of them."""

    folder: str
    """Folder of LIBERO's demonstrations, one file ``<task name>_demo.hdf5`` per task."""
    choice: DemoChoice = field(default_factory=DemoChoice)
    images: Literal["rerendered", "stored"] = "rerendered"
    """``rerendered`` renders the recorded states at ``environment.render_size``, once per run;
    ``stored`` reads LIBERO's own images, which have 128 px."""
    augment: bool = True
    """Augment images at random, as published; evaluations then crop the centre."""
    num_loaders: int = 2
    """Number of processes per rank that read and prepare images; 0 reads between the steps."""

    def __post_init__(self) -> None:
        if not self.folder:
            raise ConfigError("demos.folder is empty; name the folder of LIBERO's HDF5 files")
        if self.num_loaders < 0:
            raise ConfigError(f"demos.num_loaders is {self.num_loaders}; set 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """AdamW, its learning-rate schedule, and the sizes of batch and micro-batch."""

    lr: float = 5e-4
    """Learning rate between warm-up and decay (openvla-oft ``vla-scripts/finetune.py:89``)."""
    warmup_steps: int = 0
    """Number of steps over which the learning rate rises linearly from a tenth."""
    decay_at: tuple[int, ...] = (100_000,)
    """Steps from which on the learning rate is multiplied by 0.1 (``finetune.py:91``)."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, scaled by the learning rate."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """AdamW's decay rates of the running means of the gradient and of its square."""
    clip_grad: float | None = None
    """Upper bound of the gradient's norm; null does not clip, as openvla-oft."""
    batch_size: int = 64
    """Number of samples per step, over all ranks (openvla-oft: 8 on each of 8)."""
    micro_batch_size: int = 8
    """Number of samples per forward and backward pass of one rank."""
    max_skipped_in_a_row: int = 3
    """Number of skipped optimizer steps in a row that ends the run. A step is skipped where loss or
    gradient is not finite: one can be due to its batch, that many in a row to the weights."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_size", "max_skipped_in_a_row"):
            if getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}; set at least 1")
        if self.lr <= 0:
            raise ConfigError(f"optimizer.lr is {self.lr}; set more than 0")
        for name in ("warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}; set 0 or more")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise ConfigError(
                f"optimizer.clip_grad is {self.clip_grad}; set more than 0, or null not to clip"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"optimizer.betas is {list(self.betas)}; AdamW takes two numbers of at least 0 "
                "and less than 1, e.g. [0.9,0.999]"
            )

    def lr_factor(self, step: int) -> float:
        """Return the share of ``lr`` at a step, counted from 0 (``finetune.py``: warm-up, decay).

        >>> schedule = ScheduleConfig(warmup_steps=9, decay_at=(20, 30))
        >>> [round(schedule.lr_factor(step), 3) for step in (0, 8, 19, 20, 30)]
        [0.2, 1.0, 1.0, 0.1, 0.01]
        """
        rise = 1.0
        if step < self.warmup_steps:
            rise = WARMUP_FLOOR + (1 - WARMUP_FLOOR) * (step + 1) / self.warmup_steps
        return rise * DECAY ** sum(step >= milestone for milestone in self.decay_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsConfig:
    """Length of a run, and the intervals of checkpoints, tests and evaluations."""

    total_steps: int = 150_000
    """Number of optimizer steps of the run, counted over all its restarts."""
    save_every: int = 1000
    """Steps between checkpoints. The first step is always saved, so that a run that cannot save
    fails at once; so are the last step and the one at which SIGINT or SIGTERM ends the run."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints that are kept; older ones are deleted."""
    test_every: int = 1000
    """Steps between open-loop tests on held-out episodes; 0 never tests."""
    play_every: int = 10_000
    """Steps between closed-loop evaluations on held-out init states; the last step is always
    evaluated. 0 never evaluates."""
    show_every: int = 20
    """Steps between lines on the console."""

    def __post_init__(self) -> None:
        for name in ("total_steps", "save_every", "keep_checkpoints", "show_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"trainer.{name} is {getattr(self, name)}; set at least 1")
        for name in ("test_every", "play_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"trainer.{name} is {getattr(self, name)}; set 0 for never")


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksConfig:
    """Processes of the learner: all on one machine, one per rank."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the learner; ``auto`` takes the GPUs if there are any."""
    num_ranks: int = 1
    """Number of data-parallel processes, one GPU each."""

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise ConfigError(f"ranks.num_ranks is {self.num_ranks}; set at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTRecipe:
    """All options of a fine-tuning run."""

    out: str
    """Folder of the run: configuration, metrics, checkpoints. The same command resumes it."""
    seed: int = 0
    """Seed of all of the run's randomness."""
    demos: DemosConfig
    environment: EnvironmentConfig
    """Suite and tasks that are learned and evaluated."""
    policy: LearnerConfig = field(default_factory=LearnerConfig)
    optimizer: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: StepsConfig = field(default_factory=StepsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    ranks: RanksConfig = field(default_factory=RanksConfig)

    def __post_init__(self) -> None:
        if not self.out:
            raise ConfigError("out is empty; name a folder for the run, e.g. out=runs/first")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; set 0 or more")
        if self.optimizer.batch_size % self.ranks.num_ranks:
            raise ConfigError(
                f"optimizer.batch_size is {self.optimizer.batch_size}, which "
                f"{self.ranks.num_ranks} ranks cannot share evenly; set a multiple"
            )
        if self.trainer.test_every and not self.demos.choice.held_out_per_task:
            raise ConfigError(
                f"trainer.test_every is {self.trainer.test_every}, but "
                "demos.choice.held_out_per_task is 0; hold some out, or set trainer.test_every=0"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return a plain nested mapping, ready for YAML."""
        return asdict(self)


def load_sft_recipe(arguments: Sequence[str]) -> SFTRecipe:
    """Compose and check a recipe from ``recipe=NAME key=value ...``.

    ``recipe`` is a name in `SFT_RECIPES_FOLDER` or a path to a YAML file; other keys override it.

    Raises:
        ConfigError: no recipe named, unknown recipe or key, or an impossible value.
    """
    return parse(SFTRecipe, compose_recipe(arguments, SFT_RECIPES_FOLDER).values)
