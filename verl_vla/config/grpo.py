"""A GRPO recipe: every option with its default and its check. Imports nothing that is slow."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from verl_vla.config.choices import Dtype, LoraTargets
from verl_vla.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Episodes and temperature of an evaluation."""

    episodes_per_task: int | None = None
    """Number of episodes per task, on the first held-out starts; null plays each of them once."""
    temperature: float = 0.0
    """Sampling temperature of the action tokens; 0 decodes greedily."""
    states: Literal["held_out", "sampled"] = "held_out"
    """``held_out``: recorded init states that are never trained on, 10 per task in LIBERO's suites;
    ``sampled``: ``episodes_per_task`` starts per task, sampled from its regions."""

    def __post_init__(self) -> None:
        if self.episodes_per_task is not None and self.episodes_per_task < 1:
            raise ConfigError(
                f"evaluation.episodes_per_task is {self.episodes_per_task}; "
                "set at least 1, or null for all held-out starts"
            )
        if self.temperature < 0:
            raise ConfigError(
                f"evaluation.temperature is {self.temperature}; set 0 for greedy play or more"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """Number and size of a training step's groups, and the filter that they must pass."""

    groups_per_step: int = 64
    """Number of informative groups wanted per training step (SimpleVLA-RL: 64)."""
    group_size: int = 8
    """Number of episodes that share one init state and are compared with each other."""
    temperature: float = 1.6
    """Sampling temperature of the action tokens, in rollout and update (SimpleVLA-RL: 1.6)."""
    dynamic: bool = True
    """Dynamic sampling: replace uninformative groups by new ones, played with the same weights."""
    filter_on: Literal["outcome", "reward"] = "outcome"
    """Quantity that must differ within an informative group. ``reward`` also keeps groups in which
    all episodes fail, or all succeed, if their rewards differ."""
    max_rounds: int = 4
    """Largest number of rollout rounds in one training step, the first included; then the step
    uses the informative groups that it has, and the run stops if it has none."""

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ConfigError(
                f"sampling.group_size is {self.group_size}; GRPO compares episodes within a "
                "group, so it needs at least 2"
            )
        for name in ("groups_per_step", "max_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sampling.{name} is {getattr(self, name)}; set at least 1")
        if self.temperature <= 0:
            raise ConfigError(
                f"sampling.temperature is {self.temperature}; GRPO needs episodes that differ, "
                "so set a positive number (greedy play is for evaluation)"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipRange:
    """Range of the probability ratio outside which its gradient is cut off."""

    low: float = 0.2
    """Distance of the probability ratio's lower bound below 1: the bound is ``1 - low``."""
    high: float = 0.28
    """Distance of the ratio's upper bound above 1; larger than ``low``, so that rare actions can
    still become likelier (DAPO, arXiv:2503.14476, section 3.1; SimpleVLA-RL has the same pair)."""

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("high", self.high)):
            if not 0 < value < 1:
                raise ConfigError(
                    f"loss.clip.{name} is {value}; a ratio is clipped between 0 and 2, "
                    "so choose a number between 0 and 1, e.g. 0.2"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class KLConfig:
    """KL term of the loss, which keeps the learner near the reference policy, as in SRPO.

    SRPO's published objective has it; the paper gives no coefficient, its release none above 0.
    """

    coefficient: float = 0.0
    """Weight of the KL divergence in the loss. 0 computes none and loads no reference policy."""

    def __post_init__(self) -> None:
        if self.coefficient < 0:
            raise ConfigError(
                f"loss.kl.coefficient is {self.coefficient}; set 0 for no KL term, or a small "
                "positive number, e.g. 0.01"
            )

    @property
    def is_on(self) -> bool:
        """True where a reference policy is needed."""
        return self.coefficient > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStartConfig:
    """Check before training that the policy succeeds often enough for GRPO to learn anything."""

    mode: Literal["stop", "off"] = "stop"
    """``stop`` ends the run if the policy succeeds too seldom; ``off`` skips the check, which is
    needed where a dense reward is to learn from failures."""
    threshold: float = 0.15
    """Lowest success rate that is trained. Source: set by the authors of a VLA from scratch for
    LIBERO-Spatial, which solved 0 of 15 episodes; GRPO without the check taught it nothing."""
    episodes: int = 32
    """Number of probe episodes in a round, spread evenly over the tasks; up to four rounds are
    played while the interval of the success rate holds the threshold."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ConfigError(
                f"cold_start.threshold is {self.threshold}; it is a share of episodes, above 0 "
                "up to 1 (cold_start.mode=off lets every policy pass)"
            )
        if self.episodes < 1:
            raise ConfigError(
                f"cold_start.episodes is {self.episodes}; set at least 1, or cold_start.mode=off"
            )


LORA_ALPHA = 16
"""Default alpha (openvla-oft, ``vla-scripts/finetune.py``: ``min(lora_rank, 16)``, rank 32)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """The policy that is trained: its checkpoint, precision, attention and adapters."""

    path: str
    """Folder of a checkpoint, OpenVLA-OFT or scratch VLA: weights, config, tokenizer and
    statistics. A relative path starts at the project's root."""
    unnorm_key: str | None = None
    """Entry of ``dataset_statistics.json`` to normalize with; null where there is only one."""
    dtype: Dtype = "bfloat16"
    """Dtype of the arithmetic and of frozen weights under adapters. Trained weights are kept in
    float32, and the head is always computed in float32."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Back end of the language model's attention, which is bidirectional in all three.
    ``flash_attention_2`` needs a CUDA device and the package flash-attn."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    lora_rank: int | None = None
    """Rank of LoRA adapters, which then are the only trained weights (of a scratch VLA, besides its
    projector and action rows); null trains all weights. The run's checkpoints hold only trained
    weights; an exported policy has the adapters merged."""
    lora_alpha: int = LORA_ALPHA
    """Numerator of the adapters' scale, which is ``lora_alpha / lora_rank``."""
    lora_targets: LoraTargets = "language_model"
    """Layers with adapters: ``language_model`` its own; ``all-linear`` also head, projector and
    vision towers, as openvla-oft fine-tunes. A scratch VLA: always its language model's only."""
    quantization: Literal["none", "nf4"] = "none"
    """``nf4`` keeps the language model's layers under their adapters in 4 bits (QLoRA), on one
    rank. Rollout and update use the same 4-bit weights. Needs the extra ``qlora``."""

    def __post_init__(self) -> None:
        for name in ("lora_rank", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"policy.{name} is {value}; set at least 1")
        if self.quantization == "nf4" and self.lora_rank is None:
            raise ConfigError(
                "policy.quantization is 'nf4', and weights in 4 bits cannot be trained; set "
                "policy.lora_rank, e.g. to 16, or policy.quantization=none"
            )
        if self.attention == "flash_attention_2" and self.dtype == "float32":
            raise ConfigError(
                "policy.attention is 'flash_attention_2', which computes in 16 bits, and "
                "policy.dtype is 'float32'; set policy.dtype=bfloat16 or policy.attention=sdpa"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentConfig:
    """The suite and tasks that are played, and the processes that simulate them."""

    suite: str
    """``mini``, ``libero_spatial``, ``libero_object``, ``libero_goal``, ``libero_10``,
    ``libero_90``, or your own suite: ``path/to/file.py:ClassName``."""
    tasks: tuple[int, ...] | None = None
    """Task ids within the suite; null plays all."""
    step_limit: Literal["published", "simplevla"] | int = "published"
    """Number of simulator steps after which an episode has failed: openvla-oft's table,
    SimpleVLA-RL's 512 for all suites, or a number."""
    render_size: int | None = None
    """Height and width of a camera's image before it is prepared for the policy, px; null takes
    the size that the policy was fine-tuned on, or openvla-oft's 256 if its folder does not say."""
    num_workers: int = 8
    """Number of simulator processes on each machine that simulates."""
    num_slots: int = 64
    """Number of episodes that run at the same time."""
    timeout_s: float = 300.0
    """Time within which a simulator must answer a request, s, including the time to build it and
    to run an action chunk; one that does not is killed, and its episode counts as crashed."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "num_slots", "render_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"environment.{name} is {value}; set at least 1")
        if self.timeout_s <= 0:
            raise ConfigError(
                f"environment.timeout_s is {self.timeout_s}; set the seconds to wait, e.g. 300"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW, and how a training step is cut into optimizer steps and micro-batches."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "deepspeed_cpu_adam"] = "adamw"
    """``adamw``: float32. ``adamw_8bit``: state in 8 bits; ``paged_adamw_8bit`` moves it to host
    memory where the device has none left (both: extra ``qlora``). ``deepspeed_cpu_adam``: on the
    CPU, with weights, gradients and state in host memory (extra ``deepspeed``)."""
    lr: float = 5e-6
    """Learning rate, constant after warm-up (SimpleVLA-RL: 5e-6, full fine-tuning)."""
    warmup_steps: int = 0
    """Number of training steps over which the learning rate rises linearly."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, scaled by the learning rate."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """AdamW's decay rates of the running means of the gradient and of its square."""
    clip_grad: float = 1.0
    """Upper bound of the gradient's norm."""
    num_mini_batches: int = 1
    """Number of optimizer steps per training step."""
    micro_batch_size: int = 16
    """Number of policy steps per forward and backward pass of one rank."""
    max_skipped_in_a_row: int = 3
    """Number of skipped optimizer steps in a row that ends the run. A step is skipped where loss or
    gradient is not finite: one can be due to its batch, that many in a row to the weights."""

    def __post_init__(self) -> None:
        for name in ("num_mini_batches", "micro_batch_size", "max_skipped_in_a_row"):
            if getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}; set at least 1")
        for name in ("lr", "clip_grad"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}; set more than 0")
        for name in ("warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}; set 0 or more")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"optimizer.betas is {list(self.betas)}; AdamW takes two numbers of at least 0 "
                "and less than 1, e.g. [0.9,0.999]"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """The policy-gradient loss. By default it has no KL term and needs no reference policy."""

    clip: ClipRange = field(default_factory=ClipRange)
    kl: KLConfig = field(default_factory=KLConfig)
    recompute_log_probs: bool = False
    """Recompute the rollout's log-probs with the learner before the update. Needed only where
    ``actor/ratio_first_deviation`` shows that rollout and learner differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """Length of a run, and the intervals of checkpoints, evaluations and recordings."""

    total_training_steps: int = 100
    """Number of training steps of the run, counted over all its restarts."""
    save_every: int = 20
    """Training steps between checkpoints; the last step is always saved, and the step at which
    SIGINT or SIGTERM ends the run. 0 saves only these."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints that are kept; older ones are deleted."""
    eval_every: int = 10
    """Training steps between held-out evaluations; the last step is always evaluated.
    0 evaluates nothing."""
    eval_before: bool = True
    """Evaluate the policy before the first training step."""
    keep_groups: int = 1
    """Number of groups per training step of which every episode's actions and a video are kept,
    some 20 kB per episode, for ``replay``. 0 keeps none."""
    loggers: tuple[str, ...] = ("tensorboard",)
    """veRL's tracking back ends to log to, in addition to the console and ``metrics.jsonl``."""
    project: str = "verl_vla"
    """Project name in the tracking back ends."""

    def __post_init__(self) -> None:
        if self.total_training_steps < 1:
            raise ConfigError(
                f"trainer.total_training_steps is {self.total_training_steps}; set at least 1"
            )
        for name in ("save_every", "eval_every", "keep_groups"):
            if getattr(self, name) < 0:
                raise ConfigError(f"trainer.{name} is {getattr(self, name)}; set 0 for never")
        if self.keep_checkpoints < 1:
            raise ConfigError(
                f"trainer.keep_checkpoints is {self.keep_checkpoints}; keep at least 1, or set "
                "trainer.save_every=0 to save none"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Machines and processes of the learner, and the machines that simulate."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the learner; ``auto`` takes the GPUs if there are any."""
    num_nodes: int = 1
    """Number of machines that run learner processes (ranks)."""
    ranks_per_node: int = 1
    """Number of data-parallel learner processes on each node, one GPU each."""
    gather_once: bool = True
    """Gather the sharded weights once per rollout, in ``policy.dtype``, so that each rank holds
    all of them; false gathers them at every policy step and needs memory for two layers only.
    Always false with an optimizer that keeps weights in host memory."""
    address: str | None = None
    """Address of a running Ray cluster; null starts one on this machine."""
    env_nodes: int = 0
    """Number of the cluster's nodes that simulate, out of those that were started with
    ``--resources '{"env_node": 1}'``; 0 simulates on this machine."""

    def __post_init__(self) -> None:
        if self.env_nodes < 0:
            raise ConfigError(f"cluster.env_nodes is {self.env_nodes}; set 0 or more")
        if self.env_nodes and self.address is None:
            raise ConfigError(
                f"cluster.env_nodes is {self.env_nodes}, but cluster.address names no Ray cluster; "
                "set it, e.g. cluster.address=auto, or cluster.env_nodes=0"
            )
        for name in ("num_nodes", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"cluster.{name} is {getattr(self, name)}; set at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All options of a GRPO run."""

    out: str
    """Folder of the run: configuration, metrics, checkpoints. The same command resumes it."""
    seed: int = 0
    """Seed of all of the run's randomness."""
    policy: PolicyConfig
    environment: EnvironmentConfig
    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: str = "binary"
    """Name of a file in ``rewards/``, or ``path/to/file.py:ClassName``."""
    reward_args: dict[str, Any] = field(default_factory=dict[str, Any])
    """Arguments of the reward's constructor."""
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    verl: dict[str, Any] = field(default_factory=dict[str, Any])
    """Overrides of veRL's own configuration, passed on unchanged; veRL refuses unknown keys."""

    def __post_init__(self) -> None:
        if not self.out:
            raise ConfigError("out is empty; name a folder for the run, e.g. out=runs/first")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; set 0 or more")
        if self.policy.quantization == "nf4":
            self._check_one_rank()

    def _check_one_rank(self) -> None:
        """Refuse several ranks or offloading, since weights in 4 bits are not sharded."""
        num_ranks = self.cluster.num_nodes * self.cluster.ranks_per_node
        if num_ranks > 1:
            raise ConfigError(
                f"policy.quantization is 'nf4', which runs on one rank, and the cluster has "
                f"{num_ranks}; set cluster.num_nodes=1 and cluster.ranks_per_node=1, or "
                "policy.quantization=none"
            )
        if self.optimizer.name == "deepspeed_cpu_adam":
            raise ConfigError(
                "optimizer.name is 'deepspeed_cpu_adam', which keeps weights in host memory, and "
                "policy.quantization is 'nf4', which keeps them on the device; choose another one"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return a plain nested mapping, ready for YAML."""
        return asdict(self)
