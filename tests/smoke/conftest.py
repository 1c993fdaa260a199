"""Training runs that several tests look at."""

from __future__ import annotations

import pytest
from training_runs import TrainingRun


@pytest.fixture(scope="session")
def small_words() -> list[str]:
    """A training run of four short steps on the mini suite."""
    return [
        "recipe=quickstart",
        "seed=7",
        "environment.tasks=[0,1]",
        "sampling.groups_per_step=3",
        "sampling.group_size=4",
        "sampling.max_rounds=2",
        "optimizer.num_mini_batches=1",
        "trainer.total_training_steps=4",
        "trainer.save_every=1",
        "trainer.keep_checkpoints=4",
        "trainer.eval_every=4",
        "trainer.eval_before=false",
        "evaluation.episodes_per_task=4",
    ]


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, small_words: list[str]) -> TrainingRun:
    """That run, never interrupted."""
    run = TrainingRun(tmp_path_factory.mktemp("whole") / "run", small_words)
    run.finish()
    return run
