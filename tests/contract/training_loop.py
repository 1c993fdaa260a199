"""veRL's own training loop in this process: its real trainer, without Ray, queue and processes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from one_chunk_world import OneChunkSimulators
from ranks import PlayingRanks
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl_yaml import read_once

from verl_vla.config.grpo import (
    ColdStartConfig,
    GRPOClusterConfig,
    GRPOEvaluationConfig,
    GRPOPolicyConfig,
    GRPOTrainerConfig,
    Recipe,
    SamplingConfig,
)
from verl_vla.config.shared import EnvironmentConfig
from verl_vla.core.episode import EpisodeSpec, Outcome
from verl_vla.core.signals import StopRequest
from verl_vla.trainer.grpo import cluster_policy
from verl_vla.trainer.grpo.run import Run, open_run
from verl_vla.trainer.grpo.trainer import VLATrainer
from verl_vla.trainer.grpo.verl_config import to_verl

GROUP_SIZE = 2
Groups = Mapping[int, Sequence[Outcome]]
"""Outcomes of the episodes of each group, by its number in the run."""


def loop_recipe(folder: Path, **sections: Any) -> Recipe:
    """Three steps of two groups of two; saved and evaluated after steps 2 and 3."""
    given = {
        "environment": EnvironmentConfig(suite="mini", tasks=(0, 4), num_workers=1, num_slots=1),
        "sampling": SamplingConfig(
            groups_per_step=2, group_size=GROUP_SIZE, temperature=1.0, max_rounds=2
        ),
        "cold_start": ColdStartConfig(mode="off"),
        "trainer": GRPOTrainerConfig(
            total_training_steps=3, save_every=2, eval_every=2, loggers=(), keep_groups=0
        ),
        "evaluation": GRPOEvaluationConfig(episodes_per_task=1, also_sampled="never"),
        "cluster": GRPOClusterConfig(device="cpu"),
    }
    return Recipe(out=str(folder), policy=GRPOPolicyConfig(path="bases/mini"), **(given | sections))


def planned(groups: Groups, run: Run, evaluated: Outcome) -> Callable[[EpisodeSpec], Outcome]:
    """Let training episodes end by their group, and those of evaluations all alike."""
    held_out = {(start.task_id, start.init_state_id) for start in run.evaluation_starts}

    def outcome_of(spec: EpisodeSpec) -> Outcome:
        if (spec.task_id, spec.init_state_id) in held_out:
            return evaluated
        return groups[spec.group_id][spec.episode_id % GROUP_SIZE]

    return outcome_of


@contextmanager
def training(
    recipe: Recipe,
    groups: Groups,
    monkeypatch: pytest.MonkeyPatch,
    *,
    evaluated: Outcome = Outcome.SUCCESS,
    stop: StopRequest | None = None,
) -> Generator[VLATrainer]:
    """Yield a trainer as it stands before its first step, resumed where the folder says so."""
    monkeypatch.setattr("verl_vla.trainer.grpo.run.open_simulators", lambda *_: nullcontext())
    # a GL context is not what this is about
    monkeypatch.setattr("verl_vla.evaluation.conditions._renderer", lambda: "none")
    read_once(monkeypatch)
    monkeypatch.setattr(PPOTrainer, "_setup", set_up)
    monkeypatch.setattr(cluster_policy.ray, "wait", lambda ranks, **_: (ranks, []))
    with open_run(recipe) as run:
        shape = run.processor.shape
        ranks = PlayingRanks(recipe, num_tokens=shape.num_tokens, action_dim=shape.action_dim)
        ranks.stand_in(monkeypatch)
        simulators = OneChunkSimulators(planned(groups, run, evaluated))
        trainer = VLATrainer(to_verl(run), run, simulators, stop or StopRequest())
        vars(trainer).update(actor_rollout_wg=ranks)
        trainer.init()
        yield trainer


def set_up(trainer: Any) -> None:
    """veRL's ``_setup`` without processes: what its loop reads, then its own checkpoint."""
    trainer.tokenizer = SimpleNamespace(eos_token_id=0)
    trainer.total_training_steps = trainer.config.trainer.total_training_steps
    trainer.steps_per_epoch = 1
    trainer.train_dataloader = SimpleNamespace(state_dict=dict, load_state_dict=lambda _: None)
    trainer.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=[])
    nothing = lambda *_: None  # noqa: E731
    trainer.checkpoint_manager = SimpleNamespace(update_weights=nothing, sleep_replicas=nothing)
    trainer._init_dump_executor()
    OmegaConf.set_struct(trainer.config, True)
    trainer._load_checkpoint()
