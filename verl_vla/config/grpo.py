"""A GRPO recipe: every option with its default and its bounds. Imports nothing that is slow."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool, StrictFloat, StrictInt, model_validator

from verl_vla.config.choices import MOST_EPISODES, MOST_PROCESSES, Dtype, LoraTargets
from verl_vla.config.schema import remedy, section
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


@section("sampling")
class SamplingConfig:
    """Number and size of a training step's groups, and the filter that they must pass."""

    groups_per_step: StrictInt = Field(default=64, ge=1)
    """Number of informative groups wanted per training step (SimpleVLA-RL: 64)."""
    group_size: StrictInt = Field(
        default=8,
        ge=2,
        json_schema_extra=remedy("GRPO compares episodes within a group, so it needs at least 2"),
    )
    """Number of episodes that share one init state and are compared with each other."""
    temperature: StrictFloat = Field(
        default=1.6,
        gt=0,
        json_schema_extra=remedy(
            "GRPO needs episodes that differ, so set a positive number (greedy play is for "
            "evaluation)"
        ),
    )
    """Sampling temperature of the action tokens, in rollout and update (SimpleVLA-RL: 1.6)."""
    dynamic: StrictBool = True
    """Dynamic sampling: replace uninformative groups by new ones, played with the same weights."""
    filter_on: Literal["outcome", "reward"] = "outcome"
    """Quantity that must differ within an informative group. ``reward`` also keeps groups in which
    all episodes fail, or all succeed, if their rewards differ."""
    max_rounds: StrictInt = Field(default=4, ge=1)
    """Largest number of rollout rounds in one training step, the first included; then the step
    uses the informative groups that it has, and the run stops if it has none."""

    @model_validator(mode="after")
    def _check_episodes(self) -> SamplingConfig:
        if self.groups_per_step * self.group_size > MOST_EPISODES:
            raise ConfigError(
                f"sampling.groups_per_step is {self.groups_per_step} and sampling.group_size "
                f"{self.group_size}; a step has at most {MOST_EPISODES:,} episodes, so set less"
            )
        return self


IN_CLIP_RANGE = remedy(
    "a ratio is clipped between 0 and 2, so choose a number between 0 and 1, e.g. 0.2"
)
"""Answer to a bound of the probability ratio that is no share."""


@section("loss.clip")
class ClipRange:
    """Range of the probability ratio outside which its gradient is cut off."""

    low: StrictFloat = Field(default=0.2, gt=0, lt=1, json_schema_extra=IN_CLIP_RANGE)
    """Distance of the probability ratio's lower bound below 1: the bound is ``1 - low``."""
    high: StrictFloat = Field(default=0.28, gt=0, lt=1, json_schema_extra=IN_CLIP_RANGE)
    """Distance of the ratio's upper bound above 1; larger than ``low``, so that rare actions can
    still become likelier (DAPO, arXiv:2503.14476, section 3.1; SimpleVLA-RL has the same pair)."""


@section("loss.kl")
class KLConfig:
    """KL term of the loss, which keeps the learner near the reference policy, as in SRPO.

    SRPO's published objective has it; the paper gives no coefficient, its release none above 0.
    """

    coefficient: StrictFloat = Field(
        default=0.0,
        ge=0,
        json_schema_extra=remedy("set 0 for no KL term, or a small positive number, e.g. 0.01"),
    )
    """Weight of the KL divergence in the loss. 0 computes none and loads no reference policy."""

    @property
    def is_on(self) -> bool:
        """True where a reference policy is needed."""
        return self.coefficient > 0


def _off(value: object) -> object:
    """Return "off" for false, which is how YAML reads an unquoted off."""
    return "off" if value is False else value


@section("cold_start")
class ColdStartConfig:
    """Check before training that the policy succeeds often enough for GRPO to learn anything."""

    # a validator that runs before the type is checked, or false would be refused as no string
    mode: Annotated[Literal["stop", "off"], BeforeValidator(_off)] = "stop"
    """``stop`` ends the run if the policy succeeds too seldom; ``off`` skips the check, which is
    needed where a dense reward is to learn from failures."""
    threshold: StrictFloat = Field(
        default=0.15,
        gt=0,
        le=1,
        json_schema_extra=remedy(
            "it is a share of episodes, above 0 up to 1 (cold_start.mode=off lets every policy "
            "pass)"
        ),
    )
    """Lowest success rate that is trained. Source: set by the authors of a VLA from scratch for
    LIBERO-Spatial, which solved 0 of 15 episodes; GRPO without the check taught it nothing."""
    episodes: StrictInt = Field(
        default=32,
        ge=1,
        le=MOST_EPISODES,
        json_schema_extra=remedy(f"set 1 to {MOST_EPISODES:,}, or cold_start.mode=off"),
    )
    """Number of probe episodes in a round, spread evenly over the tasks; up to four rounds are
    played while the interval of the success rate holds the threshold."""


@section("policy")
class GRPOPolicyConfig(PolicyConfig):
    """The policy that is trained: its checkpoint, precision, attention and adapters."""

    # required here: GRPO starts from a policy, and fine-tuning may make one
    path: str
    """Folder of a checkpoint, OpenVLA-OFT or scratch VLA: weights, config, tokenizer and
    statistics. A relative path starts at the project's root."""
    unnorm_key: str | None = None
    """Entry of ``dataset_statistics.json`` to normalize with; null takes the only one, or the
    suite's."""
    dtype: Dtype = "bfloat16"
    """Dtype of the arithmetic and of frozen weights under adapters. Trained weights are kept in
    float32, and the head is always computed in float32."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Back end of the language model's attention, which is bidirectional in all three.
    ``flash_attention_2`` needs a CUDA device and the package flash-attn."""
    lora_rank: StrictInt | None = Field(default=None, ge=1)
    """Rank of LoRA adapters, which then are the only trained weights (of a scratch VLA, besides its
    projector and action rows); null trains all weights. The run's checkpoints hold only trained
    weights; an exported policy has the adapters merged."""
    lora_targets: LoraTargets = "language_model"
    """Layers with adapters: ``language_model`` its own; ``all-linear`` also head, projector and
    vision towers, as openvla-oft fine-tunes. A scratch VLA: always its language model's only."""
    quantization: Literal["none", "nf4"] = "none"
    """``nf4`` keeps the language model's layers under their adapters in 4 bits (QLoRA), on one
    rank. Rollout and update use the same 4-bit weights. Needs the extra ``qlora``."""

    @model_validator(mode="after")
    def _check_precision(self) -> GRPOPolicyConfig:
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
        return self


@section("optimizer")
class GRPOOptimizerConfig(OptimizerConfig):
    """AdamW, and how a training step is cut into optimizer steps and micro-batches."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "deepspeed_cpu_adam"] = "adamw"
    """``adamw``: float32. ``adamw_8bit``: state in 8 bits; ``paged_adamw_8bit`` moves it to host
    memory where the device has none left (both: extra ``qlora``). ``deepspeed_cpu_adam``: on the
    CPU, with weights, gradients and state in host memory (extra ``deepspeed``)."""
    lr: StrictFloat = Field(default=5e-6, gt=0)
    """Learning rate, constant after warm-up (SimpleVLA-RL: 5e-6, full fine-tuning)."""
    clip_grad: StrictFloat = Field(default=1.0, gt=0)
    """Upper bound of the gradient's norm."""
    num_mini_batches: StrictInt = Field(default=1, ge=1)
    """Number of optimizer steps per training step, each of whole groups; fewer where fewer groups
    have a gradient. The loss of each is the mean over its own episodes."""
    micro_batch_size: StrictInt = Field(default=16, ge=1)
    """Number of policy steps per forward and backward pass of one rank."""


@section("loss")
class LossConfig:
    """The policy-gradient loss. By default it has no KL term and needs no reference policy."""

    clip: ClipRange = ClipRange()
    kl: KLConfig = KLConfig()
    recompute_log_probs: StrictBool = False
    """Recompute the rollout's log-probs with the learner before the update. Needed only where
    ``actor/ratio_first_deviation`` shows that rollout and learner differ."""


@section("trainer")
class GRPOTrainerConfig(TrainerConfig):
    """Length of a run, and the intervals of checkpoints, evaluations and recordings."""

    total_training_steps: StrictInt = Field(default=100, ge=1)
    save_every: StrictInt = Field(default=20, ge=0, json_schema_extra=NEVER)
    """Training steps between checkpoints; the last step is always saved, and the step at which
    SIGINT or SIGTERM ends the run. 0 saves only these."""
    keep_checkpoints: StrictInt = Field(
        default=2,
        ge=1,
        json_schema_extra=remedy(
            "keep at least 1, or set trainer.save_every=0 to save only the last"
        ),
    )
    check_save: StrictBool = False
    """Before the first training step, write a checkpoint of the run's size, read it back and remove
    it, so that a disk or a memory that is too small stops the run within minutes. It takes as long
    as saving and resuming do; the profiles with GPUs switch it on."""
    eval_every: StrictInt = Field(default=10, ge=0, json_schema_extra=NEVER)
    eval_before: StrictBool = True
    """Evaluate the policy before the first training step."""
    keep_groups: StrictInt = Field(default=1, ge=0, json_schema_extra=NEVER)
    """Number of groups per training step of which every episode's actions and a video are kept,
    some 20 kB per episode, for ``replay``. 0 keeps none."""
    loggers: tuple[str, ...] = ("tensorboard",)
    """veRL's tracking back ends to log to, in addition to the console and ``metrics.jsonl``."""
    project: str = "verl_vla"
    """Project name in the tracking back ends."""


@section("evaluation")
class GRPOEvaluationConfig(EvaluationConfig):
    """Episodes and temperatures of a run's evaluations."""

    also_sampled: Literal["auto", "always", "never"] = "auto"
    """Evaluate the same starts a second time, at ``sampling.temperature``, and report that as
    ``val/success_rate_sampled``. ``auto``: where ``temperature`` is 0 and all evaluations together
    are less than 10% of the training episodes."""


@section("cluster")
class GRPOClusterConfig(ClusterConfig):
    """Machines and processes of the learner, and the machines that simulate."""

    num_nodes: StrictInt = Field(default=1, ge=1)
    """Number of machines that run learner processes (ranks)."""
    ranks_per_node: StrictInt = Field(default=1, ge=1, le=MOST_PROCESSES)
    """Number of data-parallel learner processes on each node, one GPU each."""
    gather_once: StrictBool = True
    """Gather the sharded weights once per rollout, in ``policy.dtype``, so that each rank holds
    all of them; false gathers them at every policy step and needs memory for two layers only.
    Always false with an optimizer that keeps weights in host memory."""
    address: str | None = None
    """Address of a running Ray cluster; null starts one on this machine."""
    env_nodes: StrictInt = Field(default=0, ge=0)
    """Number of the cluster's nodes that simulate, out of those that were started with
    ``--resources '{"env_node": 1}'``; 0 simulates on this machine."""

    @property
    def num_ranks(self) -> int:
        """Number of learner processes of all nodes."""
        return self.num_nodes * self.ranks_per_node

    @model_validator(mode="after")
    def _check_address(self) -> GRPOClusterConfig:
        if self.env_nodes and self.address is None:
            raise ConfigError(
                f"cluster.env_nodes is {self.env_nodes}, but cluster.address names no Ray cluster; "
                "set it, e.g. cluster.address=auto, or cluster.env_nodes=0"
            )
        return self


WEEK_S = 7 * 24 * 3600


@section("")
class Recipe(BaseRecipe):
    """All options of a GRPO run."""

    policy: GRPOPolicyConfig
    environment: EnvironmentConfig
    cold_start: ColdStartConfig = ColdStartConfig()
    sampling: SamplingConfig = SamplingConfig()
    reward: str = "binary"
    """Name of a file in ``rewards/``, or ``path/to/file.py:ClassName``."""
    reward_args: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Arguments of the reward's constructor."""
    reward_timeout_s: StrictFloat = Field(
        default=3600.0,
        gt=0,
        le=WEEK_S,
        json_schema_extra=remedy("set the seconds to wait, e.g. 600, at most those of a week"),
    )
    """Time within which the reward must score the episodes of a round and learn from them, s,
    including its encoder's work; one that does not ends the run, which keeps the episodes."""
    loss: LossConfig = LossConfig()
    optimizer: GRPOOptimizerConfig = GRPOOptimizerConfig()
    trainer: GRPOTrainerConfig = GRPOTrainerConfig()
    evaluation: GRPOEvaluationConfig = GRPOEvaluationConfig()
    cluster: GRPOClusterConfig = GRPOClusterConfig()
    verl: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Overrides of veRL's own configuration, passed on unchanged; veRL refuses unknown keys."""

    @model_validator(mode="after")
    def _check_evaluation(self) -> Recipe:
        """Refuse to make the same evaluation twice."""
        config, trained_at = self.evaluation, self.sampling.temperature
        if config.also_sampled == "always" and config.temperature == trained_at:
            raise ConfigError(
                f"evaluation.also_sampled is 'always', and evaluation.temperature is {trained_at}, "
                "as in training, so both evaluations would be the same; set "
                "evaluation.temperature=0 or evaluation.also_sampled=never"
            )
        return self

    @model_validator(mode="after")
    def _check_mini_batches(self) -> Recipe:
        groups, mini_batches = self.sampling.groups_per_step, self.optimizer.num_mini_batches
        if mini_batches > groups:
            raise ConfigError(
                f"optimizer.num_mini_batches is {mini_batches}, but sampling.groups_per_step is "
                f"{groups}, and a group is never cut; set at most {groups} mini-batches, or play "
                "more groups"
            )
        return self

    @model_validator(mode="after")
    def _check_one_rank(self) -> Recipe:
        """Refuse several ranks or offloading, since weights in 4 bits are not sharded."""
        if self.policy.quantization != "nf4":
            return self
        if self.cluster.num_ranks > 1:
            raise ConfigError(
                f"policy.quantization is 'nf4', which runs on one rank, and the cluster has "
                f"{self.cluster.num_ranks}; set cluster.num_nodes=1 and cluster.ranks_per_node=1, "
                "or policy.quantization=none"
            )
        if self.optimizer.name == "deepspeed_cpu_adam":
            raise ConfigError(
                "optimizer.name is 'deepspeed_cpu_adam', which keeps weights in host memory, and "
                "policy.quantization is 'nf4', which keeps them on the device; choose another one"
            )
        return self
