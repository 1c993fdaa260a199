"""Fine-tuning from end to end: real files, the real simulator, veRL's engine, real processes."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_demos import RENDER_SIZE
from safetensors.torch import load_file
from scratch_parts import write_language, write_vision
from training_runs import TrainingRun, corrupt
from transformers import AutoModel

from verl_vla.cli.main import EXIT_DIVERGED, EXIT_USAGE, main
from verl_vla.core.errors import EXIT_SIGNAL
from verl_vla.envs.registry import suite
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.policies.openvla_oft import OpenVLAOFTModel
from verl_vla.policies.registry import load_policy, load_processor, require_valid
from verl_vla.policies.scratch_vla import ScratchVLAModel, ScratchVLAPolicy
from verl_vla.policies.scratch_vla.assembly import assemble
from verl_vla.runs.metrics import SFT_METRICS, is_reproducible, read_metrics
from verl_vla.trainer.checkpoint import complete_steps, step_folder
from verl_vla.trainer.sft.engine import SFTEngine, SFTOutput

pytestmark = [pytest.mark.smoke, pytest.mark.sim]

RANKS_DIFFER = 1e-5
"""How far two ranks' weights may be from one's: float32 sums in another order."""
SMALL = (
    "recipe=sft_mini",
    "demos.images=stored",
    "demos.num_loaders=0",
    "environment.tasks=[0,1]",
    "environment.num_workers=1",
    "environment.render_size=112",
    "environment.step_limit=8",
    "evaluation.episodes_per_task=1",
    "optimizer.batch_size=4",
    "optimizer.micro_batch_size=2",
    "optimizer.warmup_steps=2",
    "optimizer.decay_at=[5]",
    "trainer.total_training_steps=6",
    "trainer.save_every=2",
    "trainer.test_every=1",
    "trainer.eval_every=0",
    "trainer.keep_checkpoints=9",
)
DRAWN_AGAIN = "demos.images=rerendered"
PLAYED_AT_THE_END = "trainer.eval_every=100"
MORE_THAN_THERE_ARE = ("evaluation.episodes_per_task=99",)
"""No matter where nothing is played."""
BRIEF = ("trainer.total_training_steps=2", "trainer.test_every=0")


class FineTuning(TrainingRun):
    """One ``sft recipe=...`` and its run folder."""

    def __init__(self, folder: Path, demos: Path, *words: str) -> None:
        super().__init__(folder, [*SMALL, f"demos.folder='{demos}'", *words], verb="sft")

    def here(self, *words: str) -> FineTuning:
        """Carry it out, or go on with it, in this process, which knows veRL already."""
        assert main([*self.words, *words]) == 0
        return self

    def reproducible(self) -> list[dict[str, float]]:
        lines = read_metrics(self.folder / "metrics.jsonl")
        return [{k: v for k, v in line.items() if is_reproducible(k)} for line in lines]

    def policy(self, step: int) -> Path:
        return step_folder(self.folder / "checkpoints", step) / "policy"

    @property
    def drawn(self) -> Path:
        """The demonstrations with the images that this run has drawn again."""
        return self.folder / "demos_112px"


def in_step(number: int, act: Callable[[SFTEngine, Any], None]) -> Callable[..., dict[str, float]]:
    """The engine's ``learn``, with ``act`` before the call of that number."""
    learn, calls = SFTEngine.train_step, 0

    def acting(engine: SFTEngine, batch: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == number:
            act(engine, batch)
        return learn(engine, batch)

    return acting


def largest_difference(a: Path, b: Path) -> float:
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, mini_demos: Path) -> tuple[FineTuning, str]:
    """A run that was never interrupted, and what it said; it plays at its end."""
    words = (DRAWN_AGAIN, PLAYED_AT_THE_END)
    run = FineTuning(tmp_path_factory.mktemp("whole") / "run", mini_demos, *words)
    return run, run.finish()


def test_a_run_reports_every_declared_metric(whole: tuple[FineTuning, str]) -> None:
    run, said = whole
    lines = read_metrics(run.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    seen = set().union(*lines) - {"step"}
    assert {name for name in seen if not name.startswith("val/task/")} == set(SFT_METRICS)
    assert lines[-1]["val/episodes"] == 2
    assert lines[0]["train/loss"] > lines[-1]["train/loss"] > 0
    assert lines[0]["train/lr"] == pytest.approx(2e-3 * 0.55)
    assert lines[-1]["train/lr"] == pytest.approx(2e-4)
    assert "step 6/6" in said
    assert "held-out after step 6" in said
    assert (run.folder / "curve.png").stat().st_size > 0
    assert json.loads((run.folder / "evaluations" / "step_6.json").read_text())["suite"] == "mini"


def test_what_it_leaves_behind_can_be_played_and_trained(whole: tuple[FineTuning, str]) -> None:
    run, said = whole
    assert str(run.policy(6)) in said
    require_valid(run.policy(6), "mini")
    policy = load_policy(run.policy(6), unnorm_key="mini")
    assert policy.processor.codec.statistics.key == "mini_no_noops"
    assert largest_difference(run.policy(6), run.policy(1)) > 1e-4


def test_an_epoch_lost_without_step_checkpoints(whole: tuple[FineTuning, str]) -> None:
    """A run saves from its first step on, so that what fails later can cost no more than a few."""
    assert complete_steps(whole[0].folder / "checkpoints") == [1, 2, 4, 6]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    whole: tuple[FineTuning, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (PLAYED_AT_THE_END, "demos.num_loaders=1")
    run = FineTuning(tmp_path / "run", whole[0].drawn, *words)
    checkpoints = run.folder / "checkpoints"
    unfinished = checkpoints / "unfinished" / "global_step_4"
    run.kill_when(lambda: unfinished.exists() or complete_steps(checkpoints)[-1:] == [4])
    newest = step_folder(checkpoints, complete_steps(checkpoints)[-1])
    corrupt(next(newest.glob("ranks/optim*.pt")))
    run.here()
    said = capsys.readouterr().out
    assert f"CORRUPT CHECKPOINT {newest}" in said
    assert "resumed after step" in said
    assert run.reproducible() == whole[0].reproducible()
    assert largest_difference(run.policy(6), whole[0].policy(6)) == 0


def test_two_ranks_learn_as_one(whole: tuple[FineTuning, str], tmp_path: Path) -> None:
    words = ("trainer.total_training_steps=1", "trainer.eval_every=1", "cluster.num_ranks=2")
    both = FineTuning(tmp_path / "two", whole[0].drawn, *words).here()
    one, (two,) = whole[0].reproducible()[0], both.reproducible()
    assert two["train/loss"] == pytest.approx(one["train/loss"], abs=RANKS_DIFFER)
    assert two["val/loss"] == pytest.approx(one["val/loss"], abs=1e-3)
    assert two["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-4)
    assert two["val/episodes"] == 2
    # at the first step, Adam moves every weight by its rate in the direction of its gradient's sign
    assert largest_difference(whole[0].policy(1), both.policy(1)) < 2.1 * two["train/lr"]


def test_micro_batches_in_bfloat16_add_up_on_every_rank(
    whole: tuple[FineTuning, str], tmp_path: Path
) -> None:
    words = (
        "policy.dtype=bfloat16",
        "cluster.num_ranks=2",
        "optimizer.batch_size=12",
        "trainer.total_training_steps=1",
        "trainer.test_every=0",
    )
    norms = {
        size: FineTuning(tmp_path / str(size), whole[0].drawn, *words)
        .here(f"optimizer.micro_batch_size={size}")
        .reproducible()[0]["train/grad_norm"]
        for size in (2, 6)
    }
    # the sums are float32; products differ by bfloat16's 8 bits
    assert norms[2] == pytest.approx(norms[6], rel=2**-7)


def test_smoothing_and_the_cosine_change_what_is_learned_and_not_what_is_reported(
    whole: tuple[FineTuning, str], tmp_path: Path
) -> None:
    words = (
        "optimizer.smoothing=4.0",
        "optimizer.lr_scheduler_type=cosine",
        "optimizer.min_lr_ratio=0.5",
        "trainer.total_training_steps=3",
    )
    smooth = FineTuning(tmp_path / "smooth", whole[0].drawn, *words).here()
    hard, soft = whole[0].reproducible(), smooth.reproducible()
    assert soft[0]["train/loss"] == hard[0]["train/loss"], "both without smoothing"
    assert soft[0]["train/grad_norm"] != hard[0]["train/grad_norm"]
    assert soft[2]["train/lr"] == pytest.approx(1e-3)
    assert largest_difference(smooth.policy(1), whole[0].policy(1)) > 0


def test_adapters_learn_are_resumed_and_merged(
    mini_demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "policy.lora_rank=4",
        "policy.gradient_checkpointing=true",
        "trainer.total_training_steps=4",
    )
    run = FineTuning(tmp_path / "whole", mini_demos, *words).here()
    losses = [line["train/loss"] for line in run.reproducible()]
    assert losses[-1] < losses[0]
    model = AutoModel.from_pretrained(run.policy(4), trust_remote_code=False)
    assert isinstance(model, OpenVLAOFTModel)
    first = load_file(run.folder / "first_policy" / "model.safetensors")
    last = model.state_dict()
    assert not any("lora" in name for name in last)
    still = {name for name in first if torch.equal(first[name], last[name])}
    assert "language_model.model.embed_tokens.weight" in still
    assert "language_model.lm_head.weight" not in still
    processor = load_processor(run.policy(4))
    assert processor.codec.statistics.key == "mini_no_noops"
    assert processor.render_size == RENDER_SIZE
    again = FineTuning(tmp_path / "again", mini_demos, *words)
    with monkeypatch.context() as patch:
        learn = in_step(3, lambda engine, batch: os.kill(os.getpid(), signal.SIGINT))
        patch.setattr(SFTEngine, "train_step", learn)
        assert main(again.words) == EXIT_SIGNAL + signal.SIGINT
    assert complete_steps(again.folder / "checkpoints") == [1, 2, 3]
    again.here()
    assert [line["train/loss"] for line in again.reproducible()] == losses
    assert largest_difference(run.policy(4), again.policy(4)) == 0


def test_a_step_that_is_not_finite_is_left_out_and_too_many_end_the_run(
    mini_demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FineTuning(tmp_path / "run", mini_demos, "trainer.test_every=0")
    imitate, calls = SFTEngine._sft_forward, 0

    def spoilt(engine: SFTEngine, batch: Any, rows: slice) -> SFTOutput:
        nonlocal calls
        calls += 1
        output = imitate(engine, batch, rows)
        step = math.ceil(calls / 2)  # of two micro-batches
        return replace(output, loss=output.loss * (math.nan if step in (2, 4, 5, 6) else 1))

    monkeypatch.setattr(SFTEngine, "_sft_forward", spoilt)
    assert main(run.words) == EXIT_DIVERGED
    lines = read_metrics(run.folder / "metrics.jsonl")
    assert [line["train/skipped_steps"] for line in lines] == [0, 1, 0, 1, 1]
    assert largest_difference(run.policy(1), run.policy(2)) == 0
    assert 0 < largest_difference(run.policy(2), run.policy(4)) < math.inf
    kept = torch.load(run.folder / "diverged" / "batch_rank_0.pt", weights_only=True)
    assert kept["images"].dtype == torch.uint8
    assert len(kept["images"]) == len(kept["action_tokens"]) == len(kept["instructions"]) == 4
    assert largest_difference(run.policy(4), run.folder / "diverged" / "policy") == 0


def new_policy(folder: Path, **choices: Any) -> ScratchVLAPolicy:
    """What ``new-policy`` makes, in small, with the action ranges of some other data."""
    instructions = [task.instruction for task in suite("mini").tasks]
    policy = assemble(
        write_language(folder / "language", instructions),
        [write_vision(folder / "vision")],
        ActionStatistics(q01=[-9.0] * 7, q99=[9.0] * 7, mask=[True] * 6 + [False], key="x"),
        dtype=torch.float32,
        chunk_length=2,
        **choices,
    )
    policy.save_pretrained(folder / "new")
    return policy


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"num_views": 2}, [PLAYED_AT_THE_END]),
        ({}, ["policy.lora_rank=4", *MORE_THAN_THERE_ARE]),
        ({"decoding": "autoregressive", "lora_rank": 4}, [PLAYED_AT_THE_END]),
    ],
    ids=["whole, with two cameras", "adapters of the recipe", "adapters of the policy"],
)
def test_a_scratch_vla_is_fine_tuned(
    choices: dict[str, Any], words: list[str], mini_demos: Path, tmp_path: Path
) -> None:
    before = new_policy(tmp_path, **choices).model.state_dict()
    path = f"policy.path='{tmp_path / 'new'}'"
    run = FineTuning(tmp_path / "run", mini_demos, path, *BRIEF, *words).here()
    first, last = run.reproducible()
    # One token after the other, a new model repeats the last one, since its head is a copy of its
    # embedding; hands that rest repeat tokens too, so it guesses better than one of 256.
    repeats = "decoding" in choices
    assert (0.94 if repeats else 0.97) < first["train/loss"] / math.log(256) < 1.03, (
        "as by guessing"
    )
    if PLAYED_AT_THE_END in words:
        assert last["val/episodes"] == 2
    folder = run.policy(2)
    assert main(["doctor", "--policy", str(folder)]) == 0
    assert load_policy(folder).processor.codec.statistics.key == "mini_no_noops"
    model = AutoModel.from_pretrained(folder)
    assert isinstance(model, ScratchVLAModel)
    assert model.config.lora_rank == 0
    plain = {name.replace(".base_layer.", "."): weight for name, weight in before.items()}
    after = model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], plain[name])}
    assert {"projector.fc1.weight", "action_tokens.head.weight"} <= moved
    assert "language_model.layers.0.mlp.up_proj.weight" in moved
    assert not any(name.startswith("vision_towers.") for name in moved)
    has_adapters = "lora_rank" in choices or "policy.lora_rank=4" in words
    assert ("language_model.norm.weight" in moved) != has_adapters


def test_adapters_are_not_put_on_adapters(
    mini_demos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new_policy(tmp_path, lora_rank=4)
    words = [f"policy.path='{tmp_path / 'new'}'", "policy.lora_rank=2"]
    assert main(FineTuning(tmp_path / "run", mini_demos, *words).words) == EXIT_USAGE
    assert "has adapters of rank 4 already" in capsys.readouterr().err


def test_images_that_a_view_lacks_are_refused(
    whole: tuple[FineTuning, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A policy of one view has had none of the wrist camera drawn."""
    new_policy(tmp_path, num_views=2)
    path = f"policy.path='{tmp_path / 'new'}'"
    assert main(FineTuning(tmp_path / "run", whole[0].drawn, path).words) == EXIT_USAGE
    said = capsys.readouterr().err
    assert "takes 2 images, but demo_0" in said
    assert "images of agentview alone; set demos.images=rerendered" in said


def test_other_demonstrations_do_not_continue_a_run(
    whole: tuple[FineTuning, str], mini_demos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (DRAWN_AGAIN, PLAYED_AT_THE_END, "demos.choice.per_task=1")
    changed = FineTuning(whole[0].folder, mini_demos, *words)
    assert main(changed.words) == EXIT_USAGE
    assert "demos.choice.per_task: 'all' -> 1" in capsys.readouterr().err
