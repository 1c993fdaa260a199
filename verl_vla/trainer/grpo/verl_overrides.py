"""Checks of a recipe's ``verl`` section: which of veRL's options a recipe may override."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl_vla.core.errors import ConfigError

Options = dict[str, Any]

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
CONSTANT = "leave it out: the learning rate is constant after optimizer.warmup_steps"
REPLACED = {
    f"{ACTOR}.clip_ratio": "set loss.clip.low and loss.clip.high",
    f"{ACTOR}.clip_ratio_low": "set loss.clip.low",
    f"{ACTOR}.clip_ratio_high": "set loss.clip.high",
    f"{ACTOR}.clip_ratio_c": "leave it out: the loss has no third bound",
    f"{ACTOR}.loss_agg_mode": "leave it out: every trajectory has the same weight",
    f"{ACTOR}.entropy_coeff": "leave it out: the loss has no entropy term",
    f"{ACTOR}.kl_loss_coef": "set loss.kl.coefficient",
    f"{ACTOR}.kl_loss_type": "leave it out: the estimator is k3 (rl/loss.py, divergence)",
    f"{ACTOR}.policy_loss": "leave it out: the loss is rl/loss.py, policy_loss",
    f"{ACTOR}.ppo_epochs": "leave it out: an update is one pass over the rows",
    f"{ACTOR}.ppo_micro_batch_size": "set optimizer.micro_batch_size",
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": "set optimizer.micro_batch_size",
    f"{ACTOR}.grad_clip": "set optimizer.clip_grad",
    f"{ACTOR}.optim.lr_warmup_steps_ratio": "set optimizer.warmup_steps",
    f"{ACTOR}.optim.lr_scheduler_type": CONSTANT,
    f"{ACTOR}.optim.min_lr_ratio": CONSTANT,
    f"{ACTOR}.optim.num_cycles": CONSTANT,
    "algorithm.gamma": "leave it out: an episode has one score, at its end",
    "algorithm.lam": "leave it out: an episode has one score, at its end",
    "algorithm.kl_ctrl": "set loss.kl.coefficient",
    "algorithm.kl_penalty": "set loss.kl.coefficient",
    "algorithm.norm_adv_by_std_in_grpo": "leave it out: advantages are divided by the deviation",
    f"{ROLLOUT}.val_kwargs": "set evaluation.temperature, evaluation.also_sampled or "
    "evaluation.episodes_per_task",
    f"{ROLLOUT}.top_k": "leave it out: action tokens are sampled from all bins",
    f"{ROLLOUT}.top_p": "leave it out: action tokens are sampled from all bins",
    "trainer.max_actor_ckpt_to_keep": "set trainer.keep_checkpoints",
    "trainer.resume_mode": "leave it out: the same command resumes",
    "trainer.balance_batch": "leave it out: rows are always balanced over the ranks",
}
"""Options of veRL that the project's own code replaces, so that setting them would change nothing,
each with the remedy. A name stands for its whole section."""

SET_BY = {
    f"{ACTOR}.optim.optimizer": "optimizer.name",
    f"{ACTOR}.optim.lr": "optimizer.lr",
    f"{ACTOR}.optim.lr_warmup_steps": "optimizer.warmup_steps",
    f"{ACTOR}.optim.weight_decay": "optimizer.weight_decay",
    f"{ACTOR}.optim.betas": "optimizer.betas",
    f"{ACTOR}.optim.clip_grad": "optimizer.clip_grad",
    f"{ACTOR}.ppo_max_token_len_per_gpu": "optimizer.micro_batch_size",
    f"{ACTOR}.ppo_mini_batch_size": "optimizer.num_mini_batches",
    f"{ACTOR}.use_kl_loss": "loss.kl.coefficient",
    "actor_rollout_ref.model.path": "policy.path",
    "actor_rollout_ref.model.enable_gradient_checkpointing": "policy.gradient_checkpointing",
    "actor_rollout_ref.model.lora_rank": "policy.lora_rank",
    "actor_rollout_ref.model.lora_alpha": "policy.lora_alpha",
    "actor_rollout_ref.model.target_modules": "policy.lora_targets",
    f"{ROLLOUT}.n": "sampling.group_size",
    f"{ROLLOUT}.temperature": "sampling.temperature",
    "data.train_batch_size": "sampling.groups_per_step",
    "data.seed": "seed",
    "trainer.nnodes": "cluster.num_nodes",
    "trainer.n_gpus_per_node": "cluster.ranks_per_node",
    "trainer.device": "cluster.device",
    "trainer.logger": "trainer.loggers",
    "trainer.project_name": "trainer.project",
    "trainer.total_training_steps": "trainer.total_training_steps",
    "trainer.save_freq": "trainer.save_every",
    "trainer.test_freq": "trainer.eval_every",
    "trainer.val_before_train": "trainer.eval_before",
    "trainer.default_local_dir": "out",
}
"""Options of veRL that an option of the recipe sets."""


def check_overrides(section: Mapping[str, Any], folder: Path, options: Options) -> None:
    """Refuse overrides that would change nothing, contradict the recipe, or leave the run's folder.

    Args:
        section: the recipe's ``verl`` section, nested.
        folder: the run's folder.
        options: what the project sets, by dotted name.

    Raises:
        ConfigError: names the option, its value and the remedy.
    """
    for key, value in _flat(section).items():
        # with the dots, or `clip_ratio` would also match `clip_ratio_low`
        replaced = next((name for name in REPLACED if f"{key}.".startswith(f"{name}.")), None)
        if replaced is not None:
            raise ConfigError(
                f"verl.{key} is {value!r}, but this project does not use veRL's own "
                f"implementation of it; {REPLACED[replaced]}"
            )
        # in any section it would run code that lies beside the weights
        if key in options or key.endswith("trust_remote_code"):
            remedy = f"set {SET_BY[key]} instead" if key in SET_BY else "leave it out"
            raise ConfigError(
                f"verl.{key} is {value!r}, but the project decides this option; {remedy}"
            )
        is_folder = key.endswith(("_dir", "_folder")) and isinstance(value, str)
        if is_folder and not Path(value).resolve().is_relative_to(folder):
            raise ConfigError(
                f"verl.{key} is {value!r}, which is not in the run's folder; name a folder in "
                f"{folder}"
            )


def _flat(values: Mapping[str, Any], path: str = "") -> Options:
    """Return nested options by their dotted names."""
    found: Options = {}
    for name, value in values.items():
        key = f"{path}{name}"
        found |= _flat(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return found
