"""Fine-tuning from end to end: real files, the real simulator, veRL's engine, real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from verl_vla.finetuning.metrics import SFT_METRICS
from verl_vla.metrics import is_reproducible, read_metrics
from verl_vla.policies.openvla_oft import OpenVLAOFTPolicy
from verl_vla.policies.openvla_oft.doctor import require_sound
from verl_vla.trainer.checkpoint import complete_steps, step_folder

pytestmark = [pytest.mark.smoke, pytest.mark.sim]

PROJECT = Path(__file__).resolve().parents[2]
RUN_LIMIT_S = 900
RANKS_DIFFER = 1e-5
"""How far two ranks' weights may be from one's: float32 sums in another order."""


class FineTuning:
    """One ``python -m verl_vla sft recipe=...`` and its run folder."""

    def __init__(self, folder: Path, demos: Path, *words: str) -> None:
        self.folder = folder
        self._words = [
            "recipe=sft_mini",
            f"out='{folder}'",
            f"demos.folder='{demos}'",
            "demos.pictures=stored",
            "demos.num_loaders=0",
            "environment.tasks=[0,1]",
            "environment.num_workers=1",
            "optimizer.batch_size=4",
            "optimizer.micro_batch_size=2",
            "optimizer.warmup_steps=2",
            "optimizer.decay_at=[5]",
            "trainer.total_steps=6",
            "trainer.save_every=2",
            "trainer.test_every=3",
            "trainer.play_every=0",
            "trainer.keep_checkpoints=9",
            *words,
        ]

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "verl_vla", "sft", *self._words],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def finish(self) -> str:
        process = self.start()
        try:
            said, _ = process.communicate(timeout=RUN_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert process.returncode == 0, said
        return said

    def kill_when(self, condition: Callable[[], bool]) -> None:
        process = self.start()
        deadline = time.monotonic() + RUN_LIMIT_S
        while not condition():
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            assert time.monotonic() < deadline, "the moment to kill never came"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def reproducible(self) -> list[dict[str, float]]:
        lines = read_metrics(self.folder / "metrics.jsonl")
        return [{k: v for k, v in line.items() if is_reproducible(k)} for line in lines]

    def policy(self, step: int) -> Path:
        return step_folder(self.folder / "checkpoints", step) / "policy"


def largest_difference(a: Path, b: Path) -> float:
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, mini_demos: Path) -> tuple[FineTuning, str]:
    """A run that was never interrupted, and what it said; it plays at its end."""
    run = FineTuning(
        tmp_path_factory.mktemp("whole") / "run",
        mini_demos,
        "demos.pictures=rerendered",
        "environment.render_size=112",
        "environment.step_limit=8",
        "evaluation.episodes_per_task=1",
        "trainer.play_every=100",
    )
    return run, run.finish()


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, mini_demos: Path) -> FineTuning:
    """A run on the stored pictures, never interrupted."""
    run = FineTuning(tmp_path_factory.mktemp("stored") / "run", mini_demos)
    run.finish()
    return run


def test_a_run_reports_every_declared_metric(whole: tuple[FineTuning, str]) -> None:
    run, said = whole
    lines = read_metrics(run.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    seen = set().union(*lines) - {"step"}
    assert {name for name in seen if not name.startswith("eval/task/")} == set(SFT_METRICS)
    assert lines[-1]["eval/episodes"] == 2
    assert lines[0]["sft/loss"] > lines[-1]["sft/loss"] > 0
    assert lines[0]["sft/lr"] == pytest.approx(2e-3 * 0.55)
    assert lines[-1]["sft/lr"] == pytest.approx(2e-4)
    assert "step 6/6" in said
    assert "held-out after step 6" in said
    assert (run.folder / "curve.png").stat().st_size > 0
    assert json.loads((run.folder / "evaluations" / "step_6.json").read_text())["suite"] == "mini"


def test_what_it_leaves_behind_can_be_played_and_trained(whole: tuple[FineTuning, str]) -> None:
    run, said = whole
    assert str(run.policy(6)) in said
    require_sound(run.policy(6), "mini")
    policy = OpenVLAOFTPolicy.from_pretrained(run.policy(6), unnorm_key="mini")
    assert policy.processor.codec.statistics.key == "mini_no_noops"
    assert largest_difference(run.policy(6), run.policy(1)) > 1e-4


def test_an_epoch_lost_without_step_checkpoints(stored: FineTuning) -> None:
    """A run saves from its first step on, so that what fails later can cost no more than a few."""
    assert complete_steps(stored.folder / "checkpoints") == [1, 2, 4, 6]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    stored: FineTuning, mini_demos: Path, tmp_path: Path
) -> None:
    run = FineTuning(tmp_path / "run", mini_demos, "demos.num_loaders=1")
    run.kill_when(lambda: complete_steps(run.folder / "checkpoints")[-1:] == [2])
    said = run.finish()
    assert "resumed after step" in said
    assert run.reproducible() == stored.reproducible()
    assert largest_difference(run.policy(6), stored.policy(6)) == 0


def test_two_ranks_learn_as_one(stored: FineTuning, mini_demos: Path, tmp_path: Path) -> None:
    run = FineTuning(
        tmp_path / "run",
        mini_demos,
        "ranks.num_ranks=2",
        "trainer.total_steps=1",
        "trainer.play_every=1",
        "environment.step_limit=8",
        "evaluation.episodes_per_task=1",
    )
    run.finish()
    one, two = stored.reproducible()[0], run.reproducible()[0]
    assert two["sft/loss"] == pytest.approx(one["sft/loss"], abs=RANKS_DIFFER)
    assert two["sft/grad_norm"] == pytest.approx(one["sft/grad_norm"], rel=1e-4)
    assert two["eval/episodes"] == 2
    # at the first step, Adam moves every weight by its rate in the direction of its gradient's sign
    assert largest_difference(run.policy(1), stored.policy(1)) < 2.1 * two["sft/lr"]


def test_adapters_learn_and_are_merged(mini_demos: Path, tmp_path: Path) -> None:
    words = ("policy.lora_rank=4", "policy.gradient_checkpointing=true")
    whole = FineTuning(tmp_path / "whole", mini_demos, *words)
    whole.finish()
    losses = [line["sft/loss"] for line in whole.reproducible()]
    assert losses[-1] < losses[0]
    policy = OpenVLAOFTPolicy.from_pretrained(whole.policy(6))
    assert not any("lora" in name for name in policy.model.state_dict())
    first = load_file(whole.folder / "first_policy" / "model.safetensors")
    last = load_file(whole.policy(6) / "model.safetensors")
    still = {name for name in first if torch.equal(first[name], last[name])}
    assert "language_model.model.embed_tokens.weight" in still
    assert "language_model.lm_head.weight" not in still
    run = FineTuning(tmp_path / "run", mini_demos, *words)
    run.kill_when(lambda: complete_steps(run.folder / "checkpoints")[-1:] == [4])
    run.finish()
    assert run.reproducible() == whole.reproducible()


def test_other_demonstrations_do_not_continue_a_run(
    stored: FineTuning, mini_demos: Path, tmp_path: Path
) -> None:
    changed = FineTuning(stored.folder, mini_demos, "demos.choice.per_task=1")
    process = changed.start()
    said, _ = process.communicate(timeout=RUN_LIMIT_S)
    assert process.returncode == 2
    assert "demos.choice.per_task: 'all' -> 1" in said
