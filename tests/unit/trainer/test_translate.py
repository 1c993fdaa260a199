"""A recipe in veRL's words."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from omegaconf import DictConfig
from verl.trainer.ppo.utils import need_reference_policy

from verl_vla.config.compose import load_recipe
from verl_vla.core.errors import ConfigError
from verl_vla.trainer.grpo.run import open_run
from verl_vla.trainer.grpo.verl_config import to_verl


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


def test_a_knob_that_verl_does_not_have_is_refused(translate):
    with pytest.raises(ConfigError, match="the recipe's verl section does not fit veRL 0.9.1"):
        translate("verl.trainer.no_such_knob=1")
