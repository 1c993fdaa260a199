"""What a recipe can say of low-rank adapters, apart from what makes them, which imports slowly."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from verl_vla.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """What an evaluation plays."""

    episodes_per_task: int | None = None
    """Held-out starts per task, from the first on; null plays all of them once."""
    temperature: float = 0.0
    """0 plays greedily."""
    states: Literal["held_out", "sampled"] = "held_out"
    """``held_out``: recorded init states that are never trained on, 10 a task of LIBERO's suites;
    ``sampled``: starts sampled from the tasks' regions, as many as ``episodes_per_task`` says."""

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
    """How many groups make a training step, and how long to look for them."""

    groups_per_step: int = 64
    """Informative groups wanted per training step (SimpleVLA-RL: 64)."""
    group_size: int = 8
    """Episodes that share one init state and are compared with each other."""
    temperature: float = 1.6
    """Of the action tokens, in the rollout and in the update alike (SimpleVLA-RL: 1.6)."""
    dynamic: bool = True
    """Replace groups that agree with themselves by new ones played under the same weights."""
    filter_on: Literal["outcome", "reward"] = "outcome"
    """What a group must disagree in. ``reward`` also keeps groups in which all fail, or all
    succeed, where the reward tells them apart."""
    max_rounds: int = 4
    """Rounds of rollout in one training step, the first included; then the step goes on with
    the informative groups it has, and stops if it has none."""

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
    """How far the probability ratio may move before its gradient stops."""

    low: float = 0.2
    """The ratio's lower bound is ``1 - low``."""
    high: float = 0.28
    """The upper bound is ``1 + high``: wider upward, so that rare actions can still grow
    (DAPO, arXiv:2503.14476, section 3.1; SimpleVLA-RL uses the same pair)."""

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("high", self.high)):
            if not 0 < value < 1:
                raise ConfigError(
                    f"loss.clip.{name} is {value}; a ratio is clipped between 0 and 2, "
                    "so choose a number between 0 and 1, e.g. 0.2"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class KLConfig:
    """How strongly the learner is held to the reference policy; SRPO's published objective does so.

    The paper gives no coefficient, and its release none above 0.
    """

    coefficient: float = 0.0
    """Of the divergence in the loss. 0 builds no second model and computes nothing."""

    def __post_init__(self) -> None:
        if self.coefficient < 0:
            raise ConfigError(
                f"loss.kl.coefficient is {self.coefficient}; set 0 for no KL term, or a small "
                "positive number, e.g. 0.01"
            )

    @property
    def is_on(self) -> bool:
        """Whether a reference policy is needed."""
        return self.coefficient > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStartConfig:
    """Whether and when training is refused to a policy that hardly ever succeeds."""

    mode: Literal["stop", "off"] = "stop"
    """``off`` trains whatever the policy can do; needed where a dense reward teaches failures."""
    threshold: float = 0.15
    """Least success rate. Source: a VLA built from scratch for LIBERO-Spatial, whose authors set
    this threshold; it solved 0 of 15 episodes, and GRPO without the check taught it nothing."""
    episodes: int = 32
    """How many episodes are sampled, spread evenly over the tasks; fewer where there are fewer
    training starts."""

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


LoraTargets = Literal["language_model", "all-linear"]
"""Where a policy gets its adapters; see `verl_vla.policies.token_model.TokenModel.add_adapters`."""

LORA_ALPHA = 16
"""Over a rank of 32. Source: openvla-oft, ``vla-scripts/finetune.py``, ``min(lora_rank, 16)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """Which policy is improved, and how it is held."""

    path: str
    """Folder of a checkpoint, OpenVLA-OFT or scratch VLA: weights, config, tokenizer and
    statistics. A relative path starts at the project's root."""
    unnorm_key: str | None = None
    """Which entry of ``dataset_statistics.json``; null where there is only one."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the arithmetic, the head's excepted, and of frozen weights under adapters; what is trained
    is held in float32, and the head is always computed in it."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Back end of the language model's attention, bidirectional in all. The last one needs a CUDA
    device and the package flash-attn."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    lora_rank: int | None = None
    """Rank of low-rank adapters, the only weights that then are trained; null trains them all. A
    checkpoint of the run holds adapters alone, an exported policy has them merged."""
    lora_alpha: int = LORA_ALPHA
    """The adapters' product is scaled by ``lora_alpha / lora_rank``."""
    lora_targets: LoraTargets = "language_model"
    """``language_model`` puts them on its layers; ``all-linear`` also on head, projector and vision
    towers, as openvla-oft fine-tunes. A scratch VLA has them on its language model in both."""
    quantization: Literal["none", "nf4"] = "none"
    """``nf4`` holds the language model's layers under their adapters in 4 bits (QLoRA), on one
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
    """Which simulators are played, and by how many processes."""

    suite: str
    """``mini``, ``libero_spatial``, ``libero_object``, ``libero_goal``, ``libero_10``,
    ``libero_90``, or one of your own: ``path/to/file.py:ClassName``."""
    tasks: tuple[int, ...] | None = None
    """Task ids within the suite; null plays all."""
    step_limit: Literal["published", "simplevla"] | int = "published"
    """Steps after which an episode has failed: openvla-oft's table, SimpleVLA-RL's 512 for all,
    or a number."""
    render_size: int | None = None
    """Height and width of a camera's image before it is prepared for the policy, pixels; null
    takes what the policy was fine-tuned on, and openvla-oft's 256 where its folder does not say."""
    num_workers: int = 8
    """Simulator processes of each machine that simulates."""
    num_slots: int = 64
    """Episodes under way at the same time."""
    timeout_s: float = 300.0
    """A simulator that does not answer within this time is killed and its episode lost. Covers
    the building of a simulator and all its chunk."""

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
    """AdamW in float32; with its state in 8 bits, which the paged one moves to host memory where
    the device has none left (extra ``qlora``); or DeepSpeed's on the CPU, with weights, gradients
    and state in host memory (extra ``deepspeed``)."""
    lr: float = 5e-6
    """Constant after warm-up (SimpleVLA-RL: 5e-6, full fine-tuning)."""
    warmup_steps: int = 0
    """Training steps over which the rate rises linearly."""
    weight_decay: float = 0.01
    """AdamW's, independent of the gradient; scaled by the rate."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """How slowly AdamW forgets the mean of the gradients, and of their squares."""
    clip_grad: float = 1.0
    """Bound on the gradient's norm."""
    num_mini_batches: int = 1
    """Optimizer steps per training step."""
    micro_batch_size: int = 16
    """Policy steps per forward and backward pass of one rank."""
    max_skipped_in_a_row: int = 3
    """Optimizer steps are left out where the loss or the gradient is not finite. One can be the
    fault of one batch; that many in a row are the fault of the weights, and end the run."""

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
    """The policy-gradient loss. As it stands there is no KL term and no second model."""

    clip: ClipRange = field(default_factory=ClipRange)
    kl: KLConfig = field(default_factory=KLConfig)
    recompute_log_probs: bool = False
    """Recompute the log-probs of the rollout with the learner before the update. Needed only
    where ``actor/ratio_first_deviation`` shows that the two differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """How long to train, what to keep and where to report."""

    total_training_steps: int = 100
    """Of the whole run, over all its restarts."""
    save_every: int = 20
    """Training steps between checkpoints; the last step is always saved, and the step at which
    SIGINT or SIGTERM ends the run. 0 saves only then."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    eval_every: int = 10
    """Training steps between held-out evaluations; the last step is always evaluated.
    0 evaluates nothing."""
    eval_before: bool = True
    """Evaluate the policy before the first step."""
    keep_groups: int = 1
    """Of how many groups a training step the actions and a video of every episode are kept, some
    20 kB each; ``replay`` plays them again. 0 keeps none."""
    loggers: tuple[str, ...] = ("tensorboard",)
    """Besides the console and ``metrics.jsonl``: any of veRL's tracking back ends."""
    project: str = "verl_vla"
    """Name of the project in those back ends."""

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
    """Where the learner's ranks run."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """``auto`` takes the GPUs where there are any."""
    num_nodes: int = 1
    """Machines that hold ranks."""
    ranks_per_node: int = 1
    """Data-parallel learner processes on each node, one GPU each."""
    gather_once: bool = True
    """Several ranks gather the weights once for a rollout and hold them all while they play, in
    ``policy.dtype``; false gathers them for every policy step and needs room for two layers. An
    optimizer that keeps weights in host memory always does the latter."""
    address: str | None = None
    """Of a running Ray cluster; null starts one on this machine."""
    env_nodes: int = 0
    """How many nodes of that cluster simulate, of those that were started with
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
    """Everything that decides a run."""

    out: str
    """Folder of the run: configuration, metrics, checkpoints. The same command resumes it."""
    seed: int = 0
    """The only source of randomness of a run."""
    policy: PolicyConfig
    environment: EnvironmentConfig
    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: str = "binary"
    """A file of ``rewards/``, or ``path/to/file.py:ClassName``."""
    reward_args: dict[str, Any] = field(default_factory=dict[str, Any])
    """Arguments of the reward's constructor."""
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    verl: dict[str, Any] = field(default_factory=dict[str, Any])
    """Overrides of veRL's own configuration, handed on as they are; veRL refuses what it does
    not know."""

    def __post_init__(self) -> None:
        if not self.out:
            raise ConfigError("out is empty; name a folder for the run, e.g. out=runs/first")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; set 0 or more")
        if self.policy.quantization == "nf4":
            self._check_one_rank()

    def _check_one_rank(self) -> None:
        """Weights in 4 bits are not sharded."""
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
        """Plain nested mapping, ready for YAML."""
        return asdict(self)
