"""What a trainer hands to the parts of a run when it starts, and the checkpoint that it tries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from one_chunk_world import SUCCESS, TIMEOUT
from training_loop import loop_recipe, training

from verl_vla.config.grpo import GRPOTrainerConfig
from verl_vla.runs.terminal import track_encoding
from verl_vla.trainer.checkpoint import complete_steps
from verl_vla.trainer.grpo import trainer as trainer_module
from verl_vla.trainer.verl_compat.process import prepare_verl


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu() -> None:
    prepare_verl("cpu", option="cluster.device")


def test_the_ranks_compute_the_encoders_of_the_reward_and_a_bar_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[Any] = []
    tracked: list[Any] = []
    monkeypatch.setattr(
        trainer_module, "place_encoders", lambda *given, **more: placed.append((*given, more))
    )
    monkeypatch.setattr(trainer_module, "track_batches", lambda *given: tracked.append(given))
    with training(loop_recipe(tmp_path / "run"), {}, monkeypatch) as trainer:
        reward = trainer.run.reward
        assert placed == [(reward, trainer.actor_rollout_wg, {"num_ranks": 1})]
        assert tracked == [(reward, track_encoding)]


RANK_METHODS = ("save_checkpoint", "export_policy", "load_checkpoint", "peak_memory")
TRY = [
    # the larger part of a rank's files is the optimizer's, which has no state yet
    "make_optimizer_state",
    "save_checkpoint",
    "export_policy",
    "drop_optimizer_state",
    "load_checkpoint",
    "drop_optimizer_state",
    # a peak counts from the last time that it was asked for
    "peak_memory",
]


def noted(ranks: Any) -> list[str]:
    """Return the names of the methods that are called from now on."""
    calls: list[str] = []

    def noting(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def method(*given: Any, **more: Any) -> Any:
            calls.append(name)
            return act(*given, **more)

        return method

    for name in RANK_METHODS:
        setattr(ranks, name, noting(name, getattr(ranks, name)))
    for name in ("make_optimizer_state", "drop_optimizer_state"):
        setattr(ranks, name, noting(name, lambda: None))
    return calls


@pytest.mark.parametrize("is_asked_for", [True, False])
def test_a_run_tries_its_checkpoint_before_its_first_step_and_no_other_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_asked_for: bool
) -> None:
    steps = GRPOTrainerConfig(
        total_training_steps=1,
        save_every=1,
        eval_every=0,
        eval_before=False,
        loggers=(),
        check_save=is_asked_for,
    )
    recipe = loop_recipe(tmp_path / "run", trainer=steps)
    groups = {0: (SUCCESS, TIMEOUT), 1: (SUCCESS, TIMEOUT)}
    with training(recipe, groups, monkeypatch) as trainer:
        calls = noted(trainer.actor_rollout_wg)
        trainer.train()
        step = ["peak_memory", "save_checkpoint", "export_policy"]
        assert calls == [*(TRY if is_asked_for else []), *step]
        assert complete_steps(trainer.run.checkpoints) == [1]
    with training(recipe, groups, monkeypatch) as resumed:
        calls = noted(resumed.actor_rollout_wg)
        resumed.fit = lambda _: None
        resumed.train()
        assert calls == []


def test_a_try_changes_nothing_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def draw() -> dict[str, float]:
        return {"drawn": float(torch.rand(1))}

    with training(loop_recipe(tmp_path / "run"), {}, monkeypatch) as trainer:
        noted(trainer.actor_rollout_wg)
        # as veRL's data loader does when it is asked for its state
        trainer.train_dataloader = SimpleNamespace(state_dict=draw, load_state_dict=lambda _: None)
        state, rng = trainer.loop.state_dict(), torch.get_rng_state()
        trainer._check_save()
        assert torch.equal(torch.get_rng_state(), rng)
        assert trainer.loop.state_dict() == state
        assert trainer.global_steps == 0
        assert list(trainer.run.checkpoints.iterdir()) == []
