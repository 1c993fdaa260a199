"""A recipe in veRL's words."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from omegaconf import MISSING, DictConfig, OmegaConf
from verl.trainer.ppo.utils import need_reference_policy
from verl_yaml import read_once

from verl_vla.config.compose import load_recipe
from verl_vla.core.errors import ConfigError
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.trainer.grpo.run import open_run
from verl_vla.trainer.grpo.verl_config import to_verl
from verl_vla.trainer.grpo.verl_overrides import REPLACED


@pytest.fixture
def translate(tmp_path, monkeypatch):
    """Translate the quickstart with overrides; no simulator is asked."""
    read_once(monkeypatch)
    monkeypatch.setattr("verl_vla.trainer.grpo.run.open_simulators", lambda *_: nullcontext())

    def translated(*words: str) -> DictConfig:
        recipe = load_recipe(["recipe=quickstart", f"out='{tmp_path / 'run'}'", *words])
        with open_run(recipe) as run:
            return to_verl(run)

    return translated


def test_no_second_model_is_built_unless_a_kl_term_asks_for_it(translate):
    config = translate()
    assert not need_reference_policy(config)
    assert not config.algorithm.use_kl_in_reward
    assert not config.critic.enable


def test_a_kl_term_brings_a_starting_policy_that_computes_as_the_learner_does(translate):
    config = translate("loss.kl.coefficient=0.01", "policy.dtype=bfloat16")
    assert need_reference_policy(config)
    actor, start = config.actor_rollout_ref.actor, config.actor_rollout_ref.ref
    for name in ("strategy", "model_dtype", "mixed_precision", "seed", "use_torch_compile"):
        assert start.fsdp_config[name] == actor.fsdp_config[name]
    assert start.fsdp_config.mixed_precision.param_dtype == "bf16"
    assert start.fsdp_config.forward_only
    assert start.strategy == "fsdp2"
    assert start.log_prob_use_dynamic_bsz
    assert start.log_prob_max_token_len_per_gpu == actor.ppo_max_token_len_per_gpu


@pytest.mark.parametrize("size", [1, 16])
def test_the_budget_of_a_micro_batch_counts_rows(translate, size: int) -> None:
    config = translate(f"optimizer.micro_batch_size={size}").actor_rollout_ref
    assert config.actor.ppo_max_token_len_per_gpu == size
    assert config.rollout.log_prob_max_token_len_per_gpu == size


def test_a_knob_that_verl_does_not_have_is_refused(translate):
    with pytest.raises(ConfigError, match="the recipe's verl section does not fit veRL 0.9.1"):
        translate("verl.trainer.no_such_knob=1")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("verl.actor_rollout_ref.actor.clip_ratio_high=0.3", "set loss.clip.high"),
        ("verl.actor_rollout_ref.actor.loss_agg_mode=token-mean", "the same weight"),
        ("verl.actor_rollout_ref.actor.entropy_coeff=0.01", "no entropy term"),
        ("verl.actor_rollout_ref.actor.kl_loss_coef=0.01", "set loss.kl.coefficient"),
        ("verl.actor_rollout_ref.actor.policy_loss.loss_mode=gspo", "rl/loss.py"),
        ("verl.actor_rollout_ref.actor.optim.lr=1e-4", "set optimizer.lr instead"),
        ("verl.actor_rollout_ref.actor.optim.lr_scheduler_type=cosine", "is constant after"),
        ("verl.actor_rollout_ref.rollout.temperature=1", "set sampling.temperature instead"),
        ("verl.algorithm.adv_estimator=gae", "the project decides this option; leave it out"),
    ],
)
def test_an_override_without_effect_is_refused_with_the_option_that_does_it(
    translate, word: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        translate(word)


def test_every_option_that_is_refused_is_one_of_verl(translate) -> None:
    config = translate()
    for name in REPLACED:
        assert OmegaConf.select(config, name, throw_on_missing=False) is not MISSING, name
        parent, leaf = name.rsplit(".", 1)
        assert leaf in OmegaConf.select(config, parent), name


GIVEN = {
    "seed": 9,
    "sampling.groups_per_step": 6,
    "sampling.group_size": 5,
    "sampling.temperature": 0.9,
    "sampling.dynamic": "false",
    "sampling.filter_on": "reward",
    "sampling.max_rounds": 3,
    "optimizer.num_mini_batches": 2,
    "optimizer.lr": 0.002,
    "optimizer.warmup_steps": 7,
    "optimizer.weight_decay": 0.25,
    "optimizer.betas": "[0.8,0.95]",
    "optimizer.clip_grad": 0.5,
    "optimizer.micro_batch_size": 11,
    "policy.gradient_checkpointing": "true",
    "policy.attention": "eager",
    "policy.dtype": "bfloat16",
    "policy.lora_rank": 4,
    "policy.lora_alpha": 32,
    "policy.lora_targets": "all-linear",
    "cluster.device": "cpu",
    "cluster.num_nodes": 3,
    "cluster.ranks_per_node": 2,
    "cluster.gather_once": "false",
    "trainer.total_training_steps": 33,
    "trainer.save_every": 4,
    "trainer.eval_every": 5,
    "trainer.eval_before": "false",
    "trainer.loggers": "[]",
    "trainer.project": "mine",
}
ACTOR, REF = "actor_rollout_ref.actor", "actor_rollout_ref.ref"
MODEL, ROLLOUT = "actor_rollout_ref.model", "actor_rollout_ref.rollout"
PRECISION = {"param_dtype": "bf16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
WANTED = {
    "algorithm.adv_estimator": "verl_vla_grpo",
    "algorithm.use_kl_in_reward": False,
    "algorithm.filter_groups.enable": False,
    "algorithm.rollout_correction.bypass_mode": True,
    "critic.enable": False,
    "reward.num_workers": 0,
    "trainer.v1.sampler.custom_sampler.name": "GroupReplayBuffer",
    "trainer.v1.sampler.sampler_kwargs": {
        "groups_per_step": 6,
        "group_size": 5,
        "temperature": 0.9,
        "dynamic": False,
        "filter_on": "reward",
        "max_rounds": 3,
    },
    f"{MODEL}.model_type": "vla",
    f"{MODEL}.trust_remote_code": False,
    f"{MODEL}.use_remove_padding": False,
    f"{MODEL}.enable_gradient_checkpointing": True,
    f"{MODEL}.override_config.attn_implementation": "eager",
    f"{MODEL}.override_config.quantization": "none",
    f"{MODEL}.override_config.gather_once": False,
    f"{MODEL}.lora_rank": 4,
    f"{MODEL}.lora_alpha": 32,
    f"{MODEL}.target_modules": "all-linear",
    f"{ACTOR}.strategy": "fsdp2",
    f"{ACTOR}.use_kl_loss": False,
    f"{ACTOR}.use_torch_compile": False,
    f"{ACTOR}.use_dynamic_bsz": True,
    f"{ACTOR}.ppo_max_token_len_per_gpu": 11,
    f"{ACTOR}.ppo_mini_batch_size": 6,
    f"{ACTOR}.checkpoint.save_contents": ["optimizer", "extra"],
    f"{ACTOR}.optim.optimizer": "adamw",
    f"{ACTOR}.optim.lr": 0.002,
    f"{ACTOR}.optim.lr_warmup_steps": 7,
    f"{ACTOR}.optim.weight_decay": 0.25,
    f"{ACTOR}.optim.betas": [0.8, 0.95],
    f"{ACTOR}.optim.clip_grad": 0.5,
    **{
        f"{section}.fsdp_config.{name}": value
        for section in (ACTOR, REF)
        for name, value in {
            "strategy": "fsdp2",
            "use_torch_compile": False,
            "seed": 9,
            "model_dtype": "bf16",
            "offload_policy": False,
            "mixed_precision": PRECISION,
        }.items()
    },
    f"{ROLLOUT}.name": "shared_weights",
    f"{ROLLOUT}.n": 5,
    f"{ROLLOUT}.temperature": 0.9,
    f"{ROLLOUT}.tensor_model_parallel_size": 1,
    f"{ROLLOUT}.free_cache_engine": False,
    f"{ROLLOUT}.calculate_log_probs": True,
    f"{ROLLOUT}.n_gpus_per_node": 2,
    f"{ROLLOUT}.log_prob_use_dynamic_bsz": True,
    f"{ROLLOUT}.log_prob_max_token_len_per_gpu": 11,
    "data.train_batch_size": 6,
    "data.val_batch_size": 6,
    "data.dataloader_num_workers": 0,
    "data.seed": 9,
    "transfer_queue.enable": True,
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": 3,
    "transfer_queue.backend.SimpleStorage.required_node_resource": "CPU",
    "trainer.device": "cpu",
    "trainer.nnodes": 3,
    "trainer.n_gpus_per_node": 2,
    "trainer.logger": [],
    "trainer.project_name": "mine",
    "trainer.experiment_name": "run",
    "trainer.total_training_steps": 33,
    "trainer.total_epochs": 34,
    "trainer.save_freq": 4,
    "trainer.test_freq": 5,
    "trainer.val_before_train": False,
}


def plain(config: DictConfig, name: str) -> object:
    value = OmegaConf.select(config, name, throw_on_missing=True)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def test_verl_is_told_what_the_recipe_says(translate, tmp_path) -> None:
    config = translate(*(f"{name}={value}" for name, value in GIVEN.items()))
    assert {name: plain(config, name) for name in WANTED} == WANTED
    assert plain(config, f"{MODEL}.path") == str(PROJECT_FOLDER / "bases" / "mini")
    assert plain(config, f"{MODEL}.override_config.unnorm_key")
    folder = tmp_path / "run" / "checkpoints" / "unfinished"
    assert plain(config, "trainer.default_local_dir") == str(folder)


def test_what_a_recipe_leaves_out_is_never_or_nothing(translate) -> None:
    words = ("trainer.save_every=0", "trainer.eval_every=0", "loss.recompute_log_probs=true")
    config = translate(*words, "policy.dtype=bfloat16")
    assert plain(config, "trainer.save_freq") == plain(config, "trainer.test_freq") == -1
    assert plain(config, f"{MODEL}.lora_rank") == 0
    assert plain(config, f"{ACTOR}.fsdp_config.model_dtype") == "fp32", "what is trained"
    assert plain(config, f"{ACTOR}.fsdp_config.mixed_precision") == PRECISION
    assert plain(config, f"{ACTOR}.checkpoint.save_contents") == ["model", "optimizer", "extra"]
    assert plain(config, "algorithm.rollout_correction.bypass_mode") is False


def test_weights_are_offloaded_for_an_optimizer_on_the_host_alone(translate, monkeypatch) -> None:
    monkeypatch.setattr("verl_vla.trainer.grpo.run.require_extras", lambda _: None)
    config = translate("optimizer.name=deepspeed_cpu_adam")
    assert plain(config, f"{ACTOR}.fsdp_config.offload_policy") is True
    assert plain(config, f"{ACTOR}.optim.optimizer") == "deepspeed_cpu_adam"
