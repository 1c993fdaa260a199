"""A fine-tuning run, as its author writes it: every option, its default and its check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from verl_vla.config.compose import RECIPES_FOLDER, compose_recipe
from verl_vla.config.grpo import LORA_ALPHA, EnvironmentConfig, EvaluationConfig
from verl_vla.core.errors import ConfigError
from verl_vla.core.schema import parse

Wording = Literal["task_name", "problem_info"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoChoice:
    """Which episodes of each task are read."""

    per_task: Literal["all"] | int = "all"
    """Episodes of each task to learn, the first ones; 1 is SimpleVLA-RL's one-trajectory set."""
    held_out_per_task: int = 1
    """Episodes of each task that are only tested, the last ones."""
    filter_noops: bool = True
    """Leave out steps without motion, as openvla-oft's ``_no_noops`` data do."""
    wording: Wording = "task_name"
    """``task_name`` spells the instruction by the file's name, as openvla-oft's data and every
    evaluation do; ``problem_info`` takes the sentence inside the file, which is the BDDL file's and
    differs in 29 of LIBERO's 130 tasks, all of Spatial and Object among them."""

    def __post_init__(self) -> None:
        if self.per_task != "all" and self.per_task < 1:
            raise ConfigError(f"demos.choice.per_task is {self.per_task}; set 'all' or at least 1")
        if self.held_out_per_task < 0:
            raise ConfigError(
                f"demos.choice.held_out_per_task is {self.held_out_per_task}; set 0 or more"
            )


SFT_RECIPES_FOLDER = RECIPES_FOLDER / "sft"
"""Where fine-tuning recipes with a plain name live."""
WARMUP_FLOOR = 0.1
"""Share of the rate that a warm-up starts from (openvla-oft ``finetune.py``)."""
DECAY = 0.1
"""``MultiStepLR``'s factor (openvla-oft ``finetune.py:944``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """Which policy is fine-tuned, how much of it, and how it is held."""

    path: str | None = None
    """Folder of a checkpoint, OpenVLA-OFT or scratch VLA; null makes a tiny policy from scratch. A
    relative path starts at the project's root."""
    lora_rank: int | None = None
    """Rank of new adapters: on all linear layers of OpenVLA-OFT, on those of a scratch VLA's
    language model; null trains what the checkpoint itself trains. Adapters are merged into the
    weights of the policy that is saved."""
    lora_alpha: int = LORA_ALPHA
    """The adapters' product is scaled by ``lora_alpha / lora_rank``."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the arithmetic and of the saved weights; the head is always float32."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Back end of the language model's attention, bidirectional in both."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""

    def __post_init__(self) -> None:
        for name in ("lora_rank", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"policy.{name} is {value}; set at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemosConfig:
    """Which demonstrations are learned, and what is seen of them."""

    folder: str
    """Of LIBERO's files, one ``<task name>_demo.hdf5`` a task."""
    choice: DemoChoice = field(default_factory=DemoChoice)
    images: Literal["rerendered", "stored"] = "rerendered"
    """``rerendered`` renders the recorded states at ``environment.render_size``, once for a run;
    LIBERO's own images have 128 px."""
    augment: bool = True
    """Change images at random, as published; evaluations then crop the centre."""
    num_loaders: int = 2
    """Processes that read and prepare images on each rank; 0 reads between the steps."""

    def __post_init__(self) -> None:
        if not self.folder:
            raise ConfigError("demos.folder is empty; name the folder of LIBERO's HDF5 files")
        if self.num_loaders < 0:
            raise ConfigError(f"demos.num_loaders is {self.num_loaders}; set 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """AdamW, its rate over the steps, and how a step's batch is cut."""

    lr: float = 5e-4
    """openvla-oft ``vla-scripts/finetune.py:89``."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly from a tenth."""
    decay_at: tuple[int, ...] = (100_000,)
    """Steps after which the rate falls to a tenth (``finetune.py:91``)."""
    weight_decay: float = 0.01
    betas: tuple[float, ...] = (0.9, 0.999)
    clip_grad: float | None = None
    """Bound on the gradient's norm; null does not clip, as openvla-oft."""
    batch_size: int = 64
    """Samples of a step, all ranks together (openvla-oft: 8 on each of 8)."""
    micro_batch_size: int = 8
    """Samples per forward and backward pass of one rank."""
    max_skipped_in_a_row: int = 3
    """Optimizer steps are left out where the loss or the gradient is not finite. One can be the
    fault of one batch; that many in a row are the fault of the weights, and end the run."""

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
        """Share of ``lr`` that a step takes, counted from 0 (``finetune.py``, warm-up and decay).

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
    """How long to learn, what to keep and how often to look."""

    total_steps: int = 150_000
    save_every: int = 1000
    """Steps between checkpoints; the first and the last step are always saved, so that a run that
    cannot save says so at once, and so is the step at which SIGINT or SIGTERM ends the run."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    test_every: int = 1000
    """Steps between open-loop tests on held-out episodes; 0 never tests."""
    play_every: int = 10_000
    """Steps between closed-loop evaluations on held-out init states; the last step is always
    played. 0 never plays."""
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
    """Where the ranks run: on one machine, one process each."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """``auto`` takes the GPUs where there are any."""
    num_ranks: int = 1
    """Data-parallel processes, one GPU each."""

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise ConfigError(f"ranks.num_ranks is {self.num_ranks}; set at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTRecipe:
    """Everything that decides a fine-tuning run."""

    out: str
    """Folder of the run: configuration, metrics, checkpoints. The same command resumes it."""
    seed: int = 0
    """The only source of randomness of a run."""
    demos: DemosConfig
    environment: EnvironmentConfig
    """The suite and tasks that are learned and played."""
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
        """Plain nested mapping, ready for YAML."""
        return asdict(self)


def load_sft_recipe(arguments: Sequence[str]) -> SFTRecipe:
    """Compose and check a recipe from ``recipe=NAME key=value ...``.

    ``recipe`` is a name in `SFT_RECIPES_FOLDER` or a path to a YAML file; other keys override it.

    Raises:
        ConfigError: no recipe named, unknown recipe or key, or a value that cannot be.
    """
    return parse(SFTRecipe, compose_recipe(arguments, SFT_RECIPES_FOLDER).values)
