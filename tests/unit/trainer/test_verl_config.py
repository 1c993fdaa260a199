"""A recipe in veRL's words."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from omegaconf import MISSING, DictConfig, OmegaConf
from verl.trainer.ppo.utils import need_reference_policy

from verl_vla.config.compose import load_recipe
from verl_vla.core.errors import ConfigError
from verl_vla.trainer.grpo.run import open_run
from verl_vla.trainer.grpo.verl_config import to_verl
from verl_vla.trainer.grpo.verl_overrides import REPLACED


@pytest.fixture
def translate(tmp_path, monkeypatch):
    """Translate the quickstart with overrides; no simulator is asked."""
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
