"""The loop of a fine-tuning run on one and two ranks: steps, tests, evaluations, checkpoints."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_chunk_world import OneChunkSimulators
from sft_world import NotingEngine, levels, sft_recipe, write_demos
from thread_ranks import ThreadRanks

from verl_vla.core.errors import Interrupted
from verl_vla.core.signals import StopRequest
from verl_vla.envs.registry import suite
from verl_vla.runs.metrics import read_metrics
from verl_vla.trainer.checkpoint import complete_steps, load_run_state, step_folder
from verl_vla.trainer.sft.run import SFTRun, open_sft_run
from verl_vla.trainer.sft.trainer import SFTTrainer
from verl_vla.trainer.verl_compat.process import prepare_verl

BATCH = 4
RANKS = [(1, 0), (2, 0), (2, 1)]
"""Number of ranks, and the one that moves first between two collectives."""


class Simulators(OneChunkSimulators):
    """Gives images of the policy's size, and the prompts of real tasks."""

    def _answer(self, slot: int) -> Any:
        answer = super()._answer(slot)
        if not hasattr(answer, "image"):
            return answer
        spec = self._specs[slot]
        image = answer.image.repeat(56, axis=1).repeat(56, axis=2) + np.uint8(spec.episode_id)
        instruction = suite("mini").tasks[spec.task_id].instruction
        return type(answer)(image=image, proprio=answer.proprio, instruction=instruction)


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demos(tmp_path_factory.mktemp("demos"))


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu() -> None:
    prepare_verl("cpu", option="cluster.device")


@pytest.fixture(autouse=True)
def no_renderer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl_vla.evaluation.conditions._renderer", lambda: "none")


@pytest.fixture
def train(
    tmp_path: Path, demos: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[SFTRun, list[NotingEngine]]]:
    """Train on some ranks until the end, or until ``act`` says otherwise in a step."""

    def run_it(
        num_ranks: int,
        *words: str,
        first: int = 0,
        stop: StopRequest | None = None,
        act: Callable[[NotingEngine], None] = lambda _: None,
    ) -> tuple[SFTRun, list[NotingEngine]]:
        group = ThreadRanks(num_ranks, first)
        group.stand_in(monkeypatch)
        folder = tmp_path / f"run_{num_ranks}"
        recipe = sft_recipe(folder, demos, f"cluster.num_ranks={num_ranks}", *words)
        with open_sft_run(recipe) as run:
            engines = [NotingEngine(run.load_processor()) for _ in range(num_ranks)]
            for engine in engines:
                learn = engine.train_step
                engine.train_step = lambda batch, engine=engine, learn=learn: (
                    act(engine),
                    learn(batch),
                )[1]

            def work(rank: int) -> Callable[[], None]:
                is_first = rank == 0
                simulators = Simulators() if is_first else None
                given: Any = engines[rank]
                return lambda: SFTTrainer(
                    run, given, simulators, stop if is_first else None
                ).train()

            group.run(*map(work, range(num_ranks)))
        return run, engines

    return run_it


def lines_of(run: SFTRun) -> list[dict[str, float]]:
    return read_metrics(run.folder / "metrics.jsonl")


@pytest.mark.parametrize(("num_ranks", "first"), RANKS)
def test_every_step_is_written_down_and_some_are_saved_tested_and_played(
    train, num_ranks: int, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run, engines = train(num_ranks, first=first)
    lines = lines_of(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [engine.num_steps for engine in engines] == [6] * num_ranks
    found = {
        name: [line["step"] for line in lines if name in line]
        for name in ("timing_s/save_checkpoint", "val/loss", "val/success_rate", "timing_s/data")
    }
    assert found == {
        "timing_s/save_checkpoint": [1, 4, 6],
        "val/loss": [3, 6],
        "val/success_rate": [5, 6],
        "timing_s/data": [1, 2, 3, 4, 5, 6],
    }
    assert complete_steps(run.checkpoints) == [4, 6], "two are kept"
    for step in (4, 6):
        folder = step_folder(run.checkpoints, step)
        for rank in range(num_ranks):
            assert (folder / "ranks" / f"rank_{rank}").read_text() == f"{step} {step}"
        assert load_run_state(folder)["values"]["train/loss"] == 1 / step
        assert (folder / "policy").is_dir()
    assert [line["train/loss"] for line in lines] == [1 / step for step in range(1, 7)]
    assert (run.folder / "curve.png").stat().st_size > 0
    assert f"the policy is in {step_folder(run.checkpoints, 6) / 'policy'}" in caplog.messages
    for line in lines:
        timed = [value for name, value in line.items() if name.startswith("timing_s/")]
        assert all(0 < value < 60 for value in timed)


def test_two_ranks_learn_the_samples_of_one(train) -> None:
    _, (one,) = train(1, "trainer.eval_every=0")
    _, two = train(2, "trainer.eval_every=0")
    assert all(len(step) == BATCH // 2 for engine in two for step in engine.learned)
    both = [sorted(a + b) for a, b in zip(*(engine.learned for engine in two), strict=True)]
    assert both == [sorted(step) for step in one.learned]
    seen = {level for step in one.learned for level in step}
    # a step of an epoch repeats nothing
    assert len(seen) > BATCH and seen <= set(levels([0]))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_test_weighs_every_held_out_sample_once(train, num_ranks: int) -> None:
    held_out = list(levels([1]))
    run, engines = train(num_ranks, "trainer.eval_every=0", "optimizer.micro_batch_size=4")
    for which in range(2):
        tested = [one for engine in engines for one in engine.tested[which]]
        assert sorted(level for level, weight in tested if weight) == sorted(held_out)
        assert {weight for _, weight in tested} <= {0.0, 1.0}
        assert {level for level, weight in tested if not weight} <= {held_out[-1]}
        sizes, numbers = zip(*(engine.num_tested[which] for engine in engines), strict=True)
        assert set(numbers) == {len(held_out)}
        assert len(set(map(tuple, sizes))) == 1, "as many passes on every rank"
        assert set(sizes[0]) == {4}
        assert len(sizes[0]) == -(-len(held_out) // (4 * num_ranks))
    assert [line["val/accuracy"] for line in lines_of(run) if "val/accuracy" in line] == [0.25] * 2


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_evaluation_plays_the_held_out_starts_on_all_ranks(
    train, num_ranks: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    words = ("evaluation.temperature=0.5", "trainer.test_every=0")
    run, engines = train(num_ranks, *words)
    assert len(run.starts) == 4
    record = json.loads((run.folder / "evaluations" / "step_5.json").read_text())
    assert record["sampling"] == "temperature 0.5"
    assert record["seed"] == run.recipe.seed
    assert [episode["task"] for episode in record["episodes"]] == [0, 0, 4, 4]
    last = lines_of(run)[-1]
    assert last["val/episodes"] == record["total"]["episodes"]
    assert last["val/success_rate"] == record["total"]["rate"]
    assert last["timing_s/testing"] > 0
    assert sum(said.startswith("held-out after step 5: ") for said in caplog.messages) == 1
    assert {temperature for engine in engines for _, temperature in engine.asked} == {0.5}
    # three slots play four episodes of one policy step; rows fill up to the number of ranks
    shares = [sum(len(rows) for rows, _ in engine.asked) for engine in engines]
    assert len(set(shares)) == 1
    assert all(engine.tested == [] for engine in engines)


@pytest.mark.parametrize(("num_ranks", "first"), RANKS)
def test_a_signal_ends_every_rank_after_the_same_saved_step(
    train, num_ranks: int, first: int
) -> None:
    stop = StopRequest()

    def ask(engine: NotingEngine) -> None:
        if engine.num_steps == 1:
            stop.signal_number = signal.SIGTERM

    with pytest.raises(Interrupted, match="SIGTERM after step 2"):
        train(num_ranks, first=first, stop=stop, act=ask)
    run, engines = train(num_ranks, first=first)
    assert [len(engine.learned) for engine in engines] == [4] * num_ranks
    assert [line["step"] for line in lines_of(run)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("first", [0, 1])
def test_no_rank_learns_on_before_a_checkpoint_is_complete(
    train, tmp_path: Path, first: int
) -> None:
    found: list[list[int]] = []

    def look(engine: NotingEngine) -> None:
        if engine.num_steps == 1:
            found.append(complete_steps(tmp_path / "run_2" / "checkpoints"))

    train(2, "trainer.total_training_steps=2", "trainer.eval_every=0", first=first, act=look)
    assert found == [[1], [1]]


class Killed(BaseException):
    """Stands for the end of the process."""


def at_step(number: int) -> Callable[[NotingEngine], None]:
    def act(engine: NotingEngine) -> None:
        if engine.num_steps == number - 1:
            raise Killed

    return act


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    train, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    whole, (engine,) = train(1)
    lines = lines_of(whole)
    shutil.rmtree(whole.folder)
    with pytest.raises(Killed):
        train(1, act=at_step(6))
    resumed, (again,) = train(1)
    assert again.learned == engine.learned[4:], "from the checkpoint of step 4"
    assert "resumed after step 4" in caplog.messages
    for mine, right in zip(lines_of(resumed), lines, strict=True):
        assert mine.keys() == right.keys()
        assert {k: v for k, v in mine.items() if not k.startswith("timing")} == {
            k: v for k, v in right.items() if not k.startswith("timing")
        }


@pytest.mark.parametrize(("num_ranks", "first"), RANKS)
def test_a_step_that_was_saved_and_not_finished_is_finished_by_the_next_process(
    train, num_ranks: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in an evaluation cannot cost the step that it follows."""
    finish = SFTTrainer._finish

    def die(trainer: SFTTrainer, step: int, values: dict[str, float]) -> None:
        if step == 6:
            raise Killed
        finish(trainer, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, "_finish", die)
        with pytest.raises(Killed):
            train(num_ranks, first=first)
    run, engines = train(num_ranks, first=first)
    assert [engine.learned for engine in engines] == [[]] * num_ranks, "nothing is left to learn"
    last = lines_of(run)[-1]
    assert last["step"] == 6
    assert last["train/loss"] == 1 / 6, "as it was when it was saved"
    assert {"val/loss", "val/success_rate", "timing_s/step"} <= last.keys()
    again, _ = train(num_ranks, first=first)
    assert len(lines_of(again)) == 6, "a finished one is not finished twice"


def test_a_run_that_died_before_its_first_checkpoint_begins_again(train) -> None:
    with pytest.raises(Killed):
        train(1, act=at_step(1))
    run, (engine,) = train(1)
    assert len(engine.learned) == 6
    assert [line["step"] for line in lines_of(run)] == [1, 2, 3, 4, 5, 6]


def test_nothing_is_tested_or_played_where_the_recipe_says_never(train) -> None:
    run, (engine,) = train(1, "trainer.eval_every=0", "trainer.test_every=0")
    assert run.starts == ()
    assert (engine.tested, engine.asked) == ([], [])
    assert not any(name.startswith("val/") for line in lines_of(run) for name in line)
