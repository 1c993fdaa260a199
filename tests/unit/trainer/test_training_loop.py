"""Training steps under veRL's own loop: what is counted, saved, resumed, stopped and refused."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from one_chunk_world import CRASH, SUCCESS, TIMEOUT
from training_loop import GROUP_SIZE, Groups, loop_recipe, training

from verl_vla.config.grpo import ColdStartConfig, GRPOTrainerConfig, LossConfig, SamplingConfig
from verl_vla.core.errors import ColdStartError, Interrupted, RewardError, SolvedError, StarvedError
from verl_vla.core.signals import StopRequest
from verl_vla.evaluation import cold_start
from verl_vla.rewards import TrajectoryReward
from verl_vla.rewards.loading import load_reward
from verl_vla.runs.metrics import MetricsFile, read_metrics
from verl_vla.runs.run_dir import evaluated_steps, solved_after
from verl_vla.trainer.checkpoint import complete_steps, load_run_state, step_folder
from verl_vla.trainer.grpo.trainer import VLATrainer
from verl_vla.trainer.grpo.worker import VLAWorker
from verl_vla.trainer.verl_compat.placement import RankPoolManager
from verl_vla.trainer.verl_compat.process import prepare_verl

MIXED, FAILED, SOLVED = (SUCCESS, TIMEOUT), (TIMEOUT, TIMEOUT), (SUCCESS, SUCCESS)
HALF_LOST = (SUCCESS, CRASH)
MINUTE_S = 60
"""More than anything here takes."""
GROUPS: Groups = {
    # step 1: one refill
    0: MIXED,
    1: FAILED,
    2: MIXED,
    # step 2: a lone survivor is compared with nobody
    3: HALF_LOST,
    4: MIXED,
    5: MIXED,
    # step 3: at the cap of two rounds with one group
    6: MIXED,
    7: FAILED,
    8: SOLVED,
}


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu() -> None:
    prepare_verl("cpu", option="cluster.device")


def metrics_of(trainer: VLATrainer) -> list[dict[str, float]]:
    return read_metrics(trainer.run.folder / "metrics.jsonl")


def checkpoints_of(trainer: VLATrainer) -> list[int]:
    return complete_steps(trainer.run.checkpoints)


def saved(trainer: VLATrainer, step: int) -> dict[str, Any]:
    return load_run_state(step_folder(trainer.run.checkpoints, step))


def groups_of(keys: list[str]) -> set[str]:
    return {key.split("_")[0] for key in keys}


class Learning(TrajectoryReward):
    """Scores successes with 1 and remembers how often it learned; may refuse to score."""

    requires = frozenset()

    def __init__(self, refuses_at: int = 99) -> None:
        self.times_learned = 0
        self.refuses_at = refuses_at
        self.binary = load_reward("binary", {})

    def __call__(self, batch: Any) -> Any:
        if self.times_learned == self.refuses_at:
            raise RewardError("no scores today")
        return self.binary(batch)

    def update(self, batch: Any) -> dict[str, float]:
        self.times_learned += 1
        return {}

    def state_dict(self) -> dict[str, int]:
        return {"times_learned": self.times_learned}

    def load_state_dict(self, state: Any) -> None:
        self.times_learned = state["times_learned"]


@pytest.fixture
def with_reward(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrajectoryReward], None]:
    def give(reward: TrajectoryReward) -> None:
        monkeypatch.setattr("verl_vla.trainer.grpo.run.load_reward", lambda *_, **__: reward)

    return give


def test_steps_are_counted_and_learned_from(tmp_path: Path, monkeypatch) -> None:
    with training(loop_recipe(tmp_path / "run"), GROUPS, monkeypatch) as trainer:
        trainer.train()
    ranks = trainer.actor_rollout_wg
    before, *lines = metrics_of(trainer)
    assert [line["step"] for line in (before, *lines)] == [0, 1, 2, 3]
    columns = {
        "sampling/groups_played": [3, 3, 3],
        "sampling/groups_kept": [2, 2, 1],
        "sampling/rounds": [2, 2, 2],
        "env/episodes": [6, 6, 6],
        "env/crashes": [0, 1, 0],
        "env/success_rate": [2 / 6, 3 / 5, 3 / 6],
        "critic/score/mean": [2 / 6, 3 / 5, 3 / 6],
        "env/steps": [12, 10, 12],
        "env/policy_steps": [6, 5, 6],
        "env/policy_steps_after_end": [0, 0, 0],
        "actor/rows": [4, 4, 2],
        "actor/rows_left_out": [0, 0, 0],
        "actor/padding_rows": [0, 0, 0],
        "actor/ratio_first": [1, 1, 1],
        "perf/max_process_memory_gb": [3, 3, 3],
        "perf/max_memory_allocated_gb": [2, 2, 2],
        "perf/max_memory_reserved_gb": [4, 4, 4],
    }
    for name, values in columns.items():
        assert [line[name] for line in lines] == values, name
    assert [groups_of(step) for step in ranks.steps] == [{"g0", "g2"}, {"g4", "g5"}, {"g6"}]
    assert ranks.num_trajectories == [4, 4, 2]
    assert not ranks.rows and not ranks.tags, "a step leaves nothing in the store"
    for line in lines:
        assert 0 < line["timing_s/update"] < line["timing_s/step"]
        assert 0 < line["timing_s/gen"] < line["timing_s/step"]
        assert line["timing_s/reward"] > 0 and line["timing_s/transfer"] > 0
        assert 0 < line["perf/policy_share"] < 1 and 0 < line["perf/env_wait_share"] < 1
        assert line["perf/policy_steps_per_s"] * line["timing_s/gen"] == pytest.approx(
            line["env/policy_steps"]
        )


def test_the_start_of_a_run_is_evaluated_and_so_is_every_second_step_and_the_last(
    tmp_path: Path, monkeypatch
) -> None:
    with training(loop_recipe(tmp_path / "run"), GROUPS, monkeypatch) as trainer:
        trainer.train()
    rates = {line["step"]: line for line in metrics_of(trainer) if "val/success_rate" in line}
    assert list(rates) == [0, 2, 3] == evaluated_steps(trainer.run.folder)
    assert {line["val/success_rate"] for line in rates.values()} == {1.0}
    assert all(0 < line["timing_s/testing"] < MINUTE_S for line in rates.values())
    # greedy evaluations, sampled training
    asked = [float(request["temperature"]) for request in trainer.actor_rollout_wg.requests]
    assert set(asked) == {0.0, 1.0}


def test_a_checkpoint_of_a_step_is_written_after_its_metrics(tmp_path: Path, monkeypatch) -> None:
    on_disk: list[list[float]] = []
    with training(loop_recipe(tmp_path / "run"), GROUPS, monkeypatch) as trainer:
        trainer.actor_rollout_wg.before_save = lambda: on_disk.append(
            [line["step"] for line in metrics_of(trainer)]
        )
        trainer.train()
    assert on_disk == [[0, 1, 2], [0, 1, 2, 3]]
    assert checkpoints_of(trainer) == [2, 3]
    for step, num_groups in ((2, 6), (3, 9)):
        folder = step_folder(trainer.run.checkpoints, step)
        assert (folder / "actor" / "updates").read_text() == str(step)
        assert (folder / "policy" / "weights").read_text() == str(step)
        assert saved(trainer, step) == {"num_groups_sampled": num_groups, "reward": {}}
    _, first, second, third = metrics_of(trainer)
    assert first["timing_s/save_checkpoint"] == second["timing_s/save_checkpoint"] == 0
    assert 0 < third["timing_s/save_checkpoint"] < MINUTE_S, "the one before"


def test_the_oldest_checkpoints_are_removed(tmp_path: Path, monkeypatch) -> None:
    steps = GRPOTrainerConfig(
        total_training_steps=3, save_every=1, eval_every=0, keep_checkpoints=1, loggers=()
    )
    recipe = loop_recipe(tmp_path / "run", trainer=replace(steps, eval_before=False))
    with training(recipe, GROUPS, monkeypatch) as trainer:
        trainer.train()
    assert checkpoints_of(trainer) == [3]
    assert evaluated_steps(trainer.run.folder) == []


def test_a_resumed_run_goes_on_with_the_groups_that_come_next(
    tmp_path: Path, monkeypatch, with_reward
) -> None:
    with_reward(Learning())
    recipe = loop_recipe(tmp_path / "run")
    with training(recipe, GROUPS, monkeypatch) as whole:
        whole.train()
    lines = metrics_of(whole)
    # as if the run had died in its third step
    (whole.run.checkpoints / "latest").unlink()
    for path in sorted(step_folder(whole.run.checkpoints, 3).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    step_folder(whole.run.checkpoints, 3).rmdir()
    with_reward(resumed_reward := Learning())
    with training(recipe, GROUPS, monkeypatch) as resumed:
        assert resumed.global_steps == 2
        assert resumed.actor_rollout_wg.num_updates == 2
        assert resumed_reward.times_learned == 4, "two rounds in each of two steps"
        assert [line["step"] for line in metrics_of(resumed)] == [0, 1, 2]
        resumed.train()
    assert [groups_of(step) for step in resumed.actor_rollout_wg.steps] == [{"g6"}]
    again = metrics_of(resumed)
    assert [line["step"] for line in again] == [0, 1, 2, 3], "step 0 is not evaluated again"
    for name in ("env/success_rate", "actor/rows", "val/success_rate", "sampling/groups_kept"):
        assert again[-1][name] == lines[-1][name]
    assert checkpoints_of(resumed) == [2, 3]
    assert saved(resumed, 3) == {"num_groups_sampled": 9, "reward": {"times_learned": 6}}


def test_a_run_that_died_before_its_first_checkpoint_begins_from_nothing(
    tmp_path: Path, monkeypatch
) -> None:
    recipe = loop_recipe(tmp_path / "run")
    with training(recipe, GROUPS, monkeypatch) as first:
        MetricsFile(first.run.folder / "metrics.jsonl").append(0, {"val/success_rate": 0.5})
        MetricsFile(first.run.folder / "metrics.jsonl").append(1, {"env/success_rate": 0.5})
    with training(recipe, GROUPS, monkeypatch) as again:
        assert metrics_of(again) == []
        assert again.global_steps == 0
        assert again.config.trainer.resume_mode == "disable"
        assert again.config.trainer.val_before_train


def test_ranks_are_given_the_loss_and_the_guard_of_the_recipe(tmp_path: Path, monkeypatch) -> None:
    recipe = loop_recipe(tmp_path / "run")
    with training(recipe, GROUPS, monkeypatch) as trainer:
        ranks, shape = trainer.actor_rollout_wg, trainer.run.processor.shape
        assert ranks.loss == (recipe.loss, shape.action_dim)
        assert ranks.guard == (str(tmp_path / "run" / "diverged"), 3)


def test_a_signal_ends_the_run_after_its_step_is_saved(tmp_path: Path, monkeypatch) -> None:
    stop = StopRequest()
    with training(loop_recipe(tmp_path / "run"), GROUPS, monkeypatch, stop=stop) as trainer:
        learn = trainer.actor_rollout_wg.update_actor

        def learn_and_ask(batch: Any) -> Any:
            stop.signal_number = signal.SIGTERM
            return learn(batch)

        trainer.actor_rollout_wg.update_actor = learn_and_ask
        with pytest.raises(Interrupted, match="SIGTERM after step 1; the same command goes on"):
            trainer.train()
    assert checkpoints_of(trainer) == [1], "no multiple of save_every"
    assert trainer.actor_rollout_wg.num_updates == 1
    with (
        training(loop_recipe(tmp_path / "run"), GROUPS, monkeypatch, stop=stop) as again,
        pytest.raises(Interrupted, match="SIGTERM after step 1"),
    ):
        again.train()


def test_a_signal_before_anything_is_saved_waits_for_the_first_step(
    tmp_path: Path, monkeypatch
) -> None:
    """There would be nothing to resume from."""
    stop = StopRequest()
    stop.signal_number = signal.SIGINT
    with (
        training(loop_recipe(tmp_path / "run"), GROUPS, monkeypatch, stop=stop) as trainer,
        pytest.raises(Interrupted, match="SIGINT after step 0"),
    ):
        trainer.train()
    assert trainer.actor_rollout_wg.num_updates == 0


def test_a_step_that_solves_everything_ends_the_run_with_the_steps_before(
    tmp_path: Path, monkeypatch
) -> None:
    groups = {**GROUPS, **{group: SOLVED for group in range(3, 7)}}
    with training(loop_recipe(tmp_path / "run"), groups, monkeypatch) as trainer:
        trainer.train()
    assert solved_after(trainer.run.folder) == 1
    assert checkpoints_of(trainer) == [1]
    assert saved(trainer, 1)["num_groups_sampled"] == 3, "those of the solved step are none of it"
    before, line = metrics_of(trainer)
    assert line["step"] == 1
    assert line["val/success_rate"] == 1
    assert line["timing_s/testing"] > 0
    assert evaluated_steps(trainer.run.folder) == [0, 1]


def test_a_solved_run_without_evaluations_makes_none(tmp_path: Path, monkeypatch) -> None:
    groups = {**GROUPS, **{group: SOLVED for group in range(3, 7)}}
    steps = GRPOTrainerConfig(
        total_training_steps=3, save_every=1, eval_every=0, eval_before=False, loggers=()
    )
    with training(loop_recipe(tmp_path / "run", trainer=steps), groups, monkeypatch) as trainer:
        trainer.train()
    assert solved_after(trainer.run.folder) == 1
    assert evaluated_steps(trainer.run.folder) == []


def test_a_run_whose_first_step_solves_everything_is_refused(tmp_path: Path, monkeypatch) -> None:
    groups = {group: SOLVED for group in range(4)}
    with (
        training(loop_recipe(tmp_path / "run"), groups, monkeypatch) as trainer,
        pytest.raises(SolvedError, match="8 episodes solved, 0 failed"),
    ):
        trainer.train()
    assert checkpoints_of(trainer) == []
    assert solved_after(trainer.run.folder) is None


def test_a_step_that_teaches_nothing_ends_the_run(tmp_path: Path, monkeypatch) -> None:
    groups = {group: FAILED for group in range(4)}
    with (
        training(loop_recipe(tmp_path / "run"), groups, monkeypatch) as trainer,
        pytest.raises(StarvedError, match="4 groups .8 episodes. were played in 2 rounds"),
    ):
        trainer.train()


@pytest.mark.parametrize(
    ("save_every", "says", "steps"),
    [
        (9, "Training step 1 was saved", [1]),
        (1, "No training step is lost", [1]),
        (0, "The training steps before are lost, since trainer.save_every is 0", []),
    ],
)
def test_a_refused_reward_costs_no_step_and_no_episode(
    tmp_path: Path, monkeypatch, with_reward, save_every: int, says: str, steps: list[int]
) -> None:
    config = GRPOTrainerConfig(
        total_training_steps=2, save_every=save_every, eval_every=0, eval_before=False, loggers=()
    )
    recipe = loop_recipe(tmp_path / "run", trainer=config)
    with_reward(Learning(refuses_at=2))
    with (
        training(recipe, GROUPS, monkeypatch) as trainer,
        pytest.raises(RewardError, match=f"{says}; the episodes of step 2 are kept"),
    ):
        trainer.train()
    assert checkpoints_of(trainer) == steps
    assert (trainer.run.folder / "unscored_step_2.npz").exists()
    if not steps:
        return
    assert saved(trainer, 1) == {"num_groups_sampled": 3, "reward": {"times_learned": 2}}
    with_reward(Learning())
    with training(recipe, GROUPS, monkeypatch) as corrected:
        corrected.train()
        played = {spec.group_id for spec in corrected.simulators.specs}
    assert played == {5}, "groups 3 and 4 are scored as they were played"
    assert [line["step"] for line in metrics_of(corrected)] == [1, 2]
    assert metrics_of(corrected)[-1]["env/episodes"] == 6


def test_a_refused_first_round_costs_nothing(tmp_path: Path, monkeypatch, with_reward) -> None:
    with_reward(Learning(refuses_at=0))
    with (
        training(loop_recipe(tmp_path / "run"), GROUPS, monkeypatch) as trainer,
        pytest.raises(RewardError, match="No training step is lost; the episodes of step 1"),
    ):
        trainer.train()
    assert checkpoints_of(trainer) == []


CHECKED = ColdStartConfig(threshold=0.5, episodes=2)


def test_the_cold_start_check_is_made_once_before_the_first_step(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    recipe = loop_recipe(tmp_path / "run", cold_start=CHECKED)
    groups = {**GROUPS, 0: SOLVED, 1: SOLVED}
    with training(recipe, groups, monkeypatch) as trainer:
        trainer.global_steps = 1
        trainer.on_train_begin()
        probed = [spec.episode_id for spec in trainer.simulators.specs]
        assert len(probed) == 2
        assert {float(r["temperature"]) for r in trainer.actor_rollout_wg.requests} == {1.0}
        assert cold_start.was_passed(trainer.run.folder)
        record = json.loads((trainer.run.folder / cold_start.COLD_START_FILE).read_text())
        assert record["sampled"]["total"]["successes"] == 2
        trainer.on_train_begin()
        assert len(trainer.simulators.specs) == 2, "it has passed"


def test_a_policy_that_cannot_learn_is_refused_with_its_greedy_rate(
    tmp_path: Path, monkeypatch
) -> None:
    recipe = loop_recipe(tmp_path / "run", cold_start=CHECKED)
    groups = {group: FAILED for group in range(99)}
    with (
        training(recipe, groups, monkeypatch, evaluated=TIMEOUT) as trainer,
        pytest.raises(ColdStartError, match="greedily 0 of 2 held-out ones"),
    ):
        trainer.train()
    assert trainer.actor_rollout_wg.num_updates == 0
    record = json.loads((trainer.run.folder / cold_start.COLD_START_FILE).read_text())
    assert not record["passed"]


def test_a_resumed_run_is_not_checked_again(tmp_path: Path, monkeypatch) -> None:
    recipe = loop_recipe(tmp_path / "run", cold_start=CHECKED)
    with training(recipe, GROUPS, monkeypatch) as trainer:
        trainer.global_steps = 2
        trainer.on_train_begin()
        assert trainer.simulators.specs == []
    off = replace(recipe, cold_start=ColdStartConfig(mode="off"))
    with training(off, GROUPS, monkeypatch) as trainer:
        trainer.global_steps = 1
        trainer.on_train_begin()
        assert trainer.simulators.specs == []


def test_log_probs_of_the_rollout_are_those_of_the_update_unless_asked_otherwise(
    tmp_path: Path, monkeypatch
) -> None:
    recipe = loop_recipe(tmp_path / "run", loss=LossConfig(recompute_log_probs=True))
    with (
        training(recipe, GROUPS, monkeypatch) as trainer,
        pytest.raises(AttributeError, match="compute_log_prob"),
    ):
        trainer.train()


def test_every_role_that_holds_the_policy_is_ours(tmp_path: Path, monkeypatch) -> None:
    with training(loop_recipe(tmp_path / "run"), GROUPS, monkeypatch) as trainer:
        trainer._init_resource_pool_mgr()
    (worker,) = trainer.role_worker_mapping.values()
    assert worker.__ray_metadata__.modified_class.__mro__[1] is VLAWorker
    manager = trainer.resource_pool_manager
    assert isinstance(manager, RankPoolManager)
    assert manager.resource_pool_spec == {"global_pool": [1]}
    assert manager.use_gpu is False
    assert set(trainer.role_worker_mapping) <= set(manager.mapping)


class Notes:
    """A recorder that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, dict[str, float]]] = []
        self.refreshed = 0

    def add_step(self, step: int, values: dict[str, float]) -> None:
        self.steps.append((step, dict(values)))

    def refresh_report(self) -> None:
        self.refreshed += 1


def test_an_update_takes_the_time_of_all_its_parts() -> None:
    trainer = object.__new__(VLATrainer)
    recorder = Notes()
    vars(trainer).update(
        loop=SimpleNamespace(stats=SimpleNamespace(as_metrics=lambda: {"env/steps": 5.0})),
        actor_rollout_wg=SimpleNamespace(peak_memory=lambda: [(0, 0, 0)]),
        recorder=recorder,
        stop=StopRequest(),
        _save_is_due=False,
        _checkpoint_s=7.0,
        _evaluation_s=8.0,
    )
    parts = {"old_log_prob": 1.0, "ref": 2.0, "adv": 4.0, "update_actor": 8.0}
    metrics: dict[str, Any] = {"actor/lr": 1, "val/episodes": 2, "sampling/rounds": 3, "mfu": 4}
    batch: Any = None
    trainer._compute_metrics(batch, metrics, {"step": 50.0, "gen": 20.0} | parts, 6, epoch=5)
    ((step, values),) = recorder.steps
    assert step == 6
    assert values == metrics, "veRL logs the dictionary that it handed over"
    assert values["timing_s/update"] == 15
    assert values["timing_s/step"] == 50
    assert values["timing_s/save_checkpoint"] == 7
    assert {"actor/lr", "val/episodes", "sampling/rounds", "env/steps"} <= values.keys()
    assert "mfu" not in values and "timing_s/testing" not in values
    assert recorder.refreshed == 1
    timing = {"step": 50.0, "update_actor": 8.0, "testing": 0.1}
    trainer._compute_metrics(batch, {}, timing, 7, epoch=6)
    assert recorder.steps[1][1]["timing_s/update"] == 8
    assert recorder.steps[1][1]["timing_s/testing"] == 8
    assert not math.isnan(recorder.steps[1][1]["perf/max_memory_allocated_gb"])


def test_a_step_asks_for_its_groups_and_a_refill_for_as_many_as_it_names(
    tmp_path: Path, monkeypatch
) -> None:
    sampling = SamplingConfig(groups_per_step=3, group_size=GROUP_SIZE, temperature=1.0)
    recipe = loop_recipe(tmp_path / "run", sampling=sampling)
    with training(recipe, GROUPS, monkeypatch) as trainer:
        trainer.global_steps = 4
        batch = trainer._next_train_batch()
        assert list(batch["uid"]) == ["g0", "g1", "g2"]
        assert int(batch["global_steps"]) == 4
        assert list(trainer._next_train_batch(1)["uid"]) == ["g3"]


def test_the_state_that_is_saved_is_not_the_one_that_goes_on(
    tmp_path: Path, monkeypatch, with_reward
) -> None:
    with_reward(reward := Learning())
    with training(loop_recipe(tmp_path / "run"), GROUPS, monkeypatch) as trainer:
        state = trainer.loop.state_dict()
        reward.times_learned = 5
        assert state == {"num_groups_sampled": 0, "reward": {"times_learned": 0}}
