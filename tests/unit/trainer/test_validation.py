"""The evaluations after a training step: both are kept, and a kill between them loses none."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from one_chunk_world import NotingPolicy, OneChunkSimulators

from verl_vla.config.grpo import GRPOEvaluationConfig, GRPOPolicyConfig, Recipe
from verl_vla.config.shared import EnvironmentConfig
from verl_vla.core.episode import Observation
from verl_vla.core.tables import ActionChunk
from verl_vla.evaluation.cold_start import Rates
from verl_vla.runs.episode_log import read_header
from verl_vla.runs.metrics import MetricsFile, read_metrics
from verl_vla.runs.run_dir import evaluated_steps
from verl_vla.trainer.grpo.run import Run, open_run
from verl_vla.trainer.grpo.trainer import VLATrainer

STEP = 3


class Killed(BaseException):
    """Stands for the end of the process."""


class KilledPolicy(NotingPolicy):
    """Does not live to the second, sampled evaluation."""

    def act(
        self, observations: Sequence[Observation], noise: torch.Tensor, *, temperature: float
    ) -> ActionChunk:
        if temperature > 0:
            raise Killed
        return super().act(observations, noise, temperature=temperature)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Run]:
    monkeypatch.setattr("verl_vla.trainer.grpo.run.open_simulators", lambda *_: nullcontext())
    # a GL context is not what this is about
    monkeypatch.setattr("verl_vla.evaluation.conditions._renderer", lambda: "none")
    recipe = Recipe(
        out=str(tmp_path / "run"),
        policy=GRPOPolicyConfig(path="bases/mini"),
        environment=EnvironmentConfig(suite="mini", tasks=(0, 4), num_workers=1, num_slots=1),
        evaluation=GRPOEvaluationConfig(episodes_per_task=3, also_sampled="always"),
    )
    with open_run(recipe) as opened:
        yield opened


def trainer_of(run: Run, policy: NotingPolicy, step: int) -> VLATrainer:
    """A trainer without veRL's workers, as it stands before an evaluation."""
    trainer = object.__new__(VLATrainer)
    vars(trainer).update(
        run=run,
        recipe=run.recipe,
        policy=policy,
        simulators=OneChunkSimulators(),
        recorder=run.open_recorder(),
        global_steps=step,
        _greedy_before=None,
    )
    return trainer


def records(run: Run) -> dict[str, str]:
    """How the kept evaluations were sampled, by the names of their files."""
    files = (run.folder / "evaluations").iterdir()
    return {file.name: json.loads(file.read_text())["sampling"] for file in files}


BOTH = {f"step_{STEP}.json": "greedy", f"step_{STEP}_sampled.json": "temperature 1.6"}


def test_both_are_kept_and_say_how_they_were_sampled(run: Run) -> None:
    values = trainer_of(run, NotingPolicy(), STEP)._validate()
    assert records(run) == BOTH
    assert evaluated_steps(run.folder) == [STEP], "the sampled one is no other step"
    greedy, sampled = (json.loads((run.folder / "evaluations" / n).read_text()) for n in BOTH)
    starts = [
        [(e["task"], e["init_state"]) for e in record["episodes"]] for record in (greedy, sampled)
    ]
    assert starts[0] == starts[1] == [(s.task_id, s.init_state_id) for s in run.evaluation_starts]
    assert (greedy["seed"], sampled["seed"]) == (None, run.recipe.seed)
    assert values["val/success_rate"] == greedy["total"]["rate"]
    assert values["val/success_rate_sampled"] == sampled["total"]["rate"]


def test_each_is_shown_with_what_tells_it_from_the_other(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="verl_vla.runs.console")
    trainer_of(run, NotingPolicy(), STEP)._validate()
    shown = [said.split(":")[0] for said in caplog.messages if "held-out" in said]
    after = f"held-out after step {STEP}"
    assert shown == [after, f"{after}, temperature 1.6"]


def test_the_episode_log_says_how_training_episodes_were_sampled(run: Run) -> None:
    run.open_recorder()
    assert read_header(run.folder)["sampling"] == "temperature 1.6"


def test_the_cold_start_check_gets_the_greedy_rates(run: Run) -> None:
    trainer = trainer_of(run, NotingPolicy(), step=0)
    trainer._validate()
    (line,) = read_metrics(run.folder / "metrics.jsonl")
    assert {"val/success_rate", "val/success_rate_sampled", "timing_s/testing"} <= line.keys()
    assert trainer._greedy_before is not None
    assert trainer._greedy_before.total.rate == line["val/success_rate"]


@pytest.mark.parametrize(("step", "kept"), [(0, ["held_out"]), (STEP, [])])
def test_only_the_greedy_rates_before_training_are_kept_for_the_check(
    run: Run, monkeypatch: pytest.MonkeyPatch, step: int, kept: list[str]
) -> None:
    MetricsFile(run.folder / "metrics.jsonl").append(STEP, {"env/success_rate": 0.5})
    splits: list[str] = []
    monkeypatch.setattr(Rates, "of", lambda result, split: splits.append(split))
    trainer_of(run, NotingPolicy(), step)._validate()
    assert splits == kept


def test_what_a_kill_between_the_two_left_out_is_made_again(run: Run) -> None:
    metrics = MetricsFile(run.folder / "metrics.jsonl")
    metrics.append(STEP, {"env/success_rate": 0.5})
    with pytest.raises(Killed):
        trainer_of(run, KilledPolicy(), STEP)._validate()
    assert list(records(run)) == [f"step_{STEP}.json"]
    assert not run.was_evaluated(STEP), "one of two is not all"
    again = trainer_of(run, NotingPolicy(), STEP)
    again.recorder.add_to_last_step(again._validate())
    assert records(run) == BOTH
    assert run.was_evaluated(STEP)
    assert not run.was_evaluated(STEP - 1)


def test_a_kill_before_the_metrics_are_written_is_one_too(run: Run) -> None:
    MetricsFile(run.folder / "metrics.jsonl").append(STEP, {"env/success_rate": 0.5})
    trainer_of(run, NotingPolicy(), STEP)._validate()
    assert not run.was_evaluated(STEP)
