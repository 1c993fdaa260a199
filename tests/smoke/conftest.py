"""Training runs that several tests look at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from documented_reward import write_documented_reward
from training_runs import PROJECT, TrainingRun


@pytest.fixture(scope="session")
def base_of_two_datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded policy, with the action statistics of another data set beside its own."""
    folder = tmp_path_factory.mktemp("base") / "policy"
    shutil.copytree(PROJECT / "bases" / "mini", folder)
    file = folder / "dataset_statistics.json"
    statistics = json.loads(file.read_text())
    file.write_text(json.dumps({"another": statistics["mini"]} | statistics))
    return folder


@pytest.fixture(scope="session")
def small_words(base_of_two_datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A training run of four short steps on the mini suite, with a reward of the user's own."""
    return [
        "recipe=quickstart",
        f"policy.path='{base_of_two_datasets}'",
        "policy.unnorm_key=mini",
        "seed=21",  # in its third step one round is enough, as a test needs it
        f"reward='{write_documented_reward(tmp_path_factory.mktemp('reward'))}'",
        "loss.kl.coefficient=0.01",
        "cold_start.episodes=8",
        "cold_start.threshold=0.1",
        "environment.tasks=[0,6]",
        "sampling.groups_per_step=3",
        "sampling.group_size=6",
        "sampling.max_rounds=3",
        "optimizer.num_mini_batches=1",
        "trainer.total_training_steps=4",
        "trainer.save_every=1",
        "trainer.keep_checkpoints=4",
        "trainer.eval_every=4",
        "trainer.eval_before=false",
        "evaluation.episodes_per_task=4",
        "evaluation.also_sampled=always",
    ]


@pytest.fixture(scope="session")
def complete_run(tmp_path_factory: pytest.TempPathFactory, small_words: list[str]) -> TrainingRun:
    """That run, never interrupted."""
    run = TrainingRun(tmp_path_factory.mktemp("whole") / "run", small_words)
    run.finish()
    return run
