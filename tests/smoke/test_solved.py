"""A run whose episodes all succeed has learned its tasks, and ends like one that did all steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from documented_suite import two_armed_policy, write_documented_suite
from training_runs import TrainingRun

from verl_vla.cli.main import EXIT_STARVED
from verl_vla.envs.registry import suite
from verl_vla.runs.html.reader import read_run
from verl_vla.runs.html.report import status
from verl_vla.runs.metrics import read_metrics
from verl_vla.trainer.checkpoint import complete_steps

pytestmark = pytest.mark.smoke

CHUNK = 5

LEARNED = """
from dataclasses import replace

from verl_vla.core.episode import Outcome

FAILURES = {failures}


class LearnedEnv(FakeEnv):
    ended = 0

    def step_chunk(self, actions):
        result = super().step_chunk(actions)
        LearnedEnv.ended += 1
        outcome = Outcome.TIMEOUT if LearnedEnv.ended <= FAILURES else Outcome.SUCCESS
        return replace(result, outcome=outcome, observation=None)


class Learned(TwoArms):
    def make_env(self, config):
        return LearnedEnv(super().make_env(config)._config)
"""
"""Behind the suite of the documentation: episodes of one chunk, and only the first few fail."""


def solved_run(folder: Path, failures: int) -> TrainingRun:
    file, _ = write_documented_suite(folder).split(":")
    with Path(file).open("a") as code:
        code.write(LEARNED.format(failures=failures))
    name = f"{file}:Learned"
    instructions = [task.instruction for task in suite(name).tasks]
    two_armed_policy(instructions, chunk_length=CHUNK).save_pretrained(folder / "policy")
    return TrainingRun(
        folder / "run",
        [
            "recipe=robotwin",
            "profile=two_cores",
            f"policy.path='{folder / 'policy'}'",
            f"environment.suite='{name}'",
            "environment.tasks=[0]",
            "environment.num_workers=1",
            "environment.num_slots=2",
            "sampling.groups_per_step=1",
            "sampling.group_size=2",
            "sampling.max_rounds=2",
            "optimizer.num_mini_batches=1",
            "evaluation.episodes_per_task=3",
            "cold_start.mode=off",
            "trainer.total_training_steps=9",
            "trainer.save_every=5",
            "trainer.eval_before=false",
            "trainer.eval_every=9",
        ],
    )


def test_a_run_in_which_nothing_fails_any_more_is_saved_and_evaluated(tmp_path: Path) -> None:
    run = solved_run(tmp_path, failures=1)
    said = run.finish()
    assert "every episode of step 2 of 9 was solved. Training step 1 was saved" in said
    assert "held-out after step 1: 100.0% of 3 episodes" in said
    (line,) = read_metrics(run.folder / "metrics.jsonl")
    assert (line["step"], line["env/success_rate"]) == (1, 0.5)
    assert (line["val/success_rate"], line["val/episodes"]) == (1.0, 3)
    assert line["timing_s/testing"] > 0
    assert complete_steps(run.folder / "checkpoints") == [1]
    evaluation = run.folder / "evaluations" / "step_1.json"
    assert json.loads(evaluation.read_text())["total"]["successes"] == 3
    assert (run.folder / "curve.png").exists()
    assert status(read_run(run.folder)) == "ended after 1 training steps, all solved"


def test_tasks_that_are_solved_from_the_start_are_refused(tmp_path: Path) -> None:
    run = solved_run(tmp_path, failures=0)
    assert "the tasks are solved: choose harder ones" in run.finish(EXIT_STARVED)
    assert complete_steps(run.folder / "checkpoints") == []
