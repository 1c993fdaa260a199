"""A fine-tuning step of the real engine on one rank, by plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file
from sft_world import sft_recipe, write_demos

from verl_vla.core.errors import DivergedError
from verl_vla.datasets.sft_dataset import Draw, SampleBatch, collate
from verl_vla.policies.registry import load_policy
from verl_vla.trainer.sft.engine import SFTEngine, SFTOutput
from verl_vla.trainer.sft.loss import smoothed_nll, soft_targets
from verl_vla.trainer.sft.run import SFTRun, open_sft_run
from verl_vla.trainer.verl_compat.process import prepare_verl

LR = 2e-3
Make = Callable[..., tuple[SFTEngine, SFTRun]]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    prepare_verl("cpu", option="cluster.device")
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demos(tmp_path_factory.mktemp("demos"))


@pytest.fixture
def make(one_rank: None, demos: Path, tmp_path: Path) -> Iterator[Make]:
    with ExitStack() as stack:

        def build(name: str, *words: str) -> tuple[SFTEngine, SFTRun]:
            recipe = sft_recipe(tmp_path / name, demos, "optimizer.warmup_steps=0", *words)
            run = stack.enter_context(open_sft_run(recipe))
            engine = SFTEngine(run)
            engine.initialize()
            return engine, run

        yield build


def batch_of(run: SFTRun, engine: SFTEngine, rows: list[int]) -> SampleBatch:
    samples = run.samples(engine.processor)
    return collate([samples[Draw(row=row, number=row)] for row in rows])


def weights(engine: SFTEngine) -> dict[str, torch.Tensor]:
    return {n: w.full_tensor().clone() for n, w in engine.module.state_dict().items()}


def scored(run: SFTRun, batch: SampleBatch) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A plain policy, its logits, and the nll [n, labels] of demonstrated bins and stop."""
    policy = load_policy(run.policy_folder)
    processor = policy.processor
    ids, mask = processor.collate([processor.prompt(text) for text in batch.instructions])
    output = policy.model(
        **processor.model_inputs(batch.images, None),
        input_ids=ids,
        attention_mask=mask,
        action_tokens=batch.action_tokens,
        with_nll=True,
    )
    return policy, output.logits, output.nll


def gradient_norm(policy: Any, loss: torch.Tensor) -> float:
    policy.model.zero_grad()
    loss.backward()
    grads = [w.grad for w in policy.model.parameters() if w.grad is not None]
    return float(torch.stack([grad.norm() for grad in grads]).norm())


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_step_is_that_of_the_whole_batch_however_it_is_cut(make: Make, size: int) -> None:
    engine, run = make("run", f"optimizer.micro_batch_size={size}", "optimizer.clip_grad=null")
    batch = batch_of(run, engine, [0, 5, 9, 13])
    policy, logits, nll = scored(run, batch)
    before = weights(engine)
    values = engine.train_step(batch)
    assert values["train/loss"] == pytest.approx(float(nll.mean()), rel=1e-4)
    right = (logits.argmax(-1) == batch.action_tokens).float().mean()
    assert values["train/accuracy"] == pytest.approx(float(right))
    assert values["train/grad_norm"] == pytest.approx(gradient_norm(policy, nll.mean()), rel=1e-3)
    assert values["train/skipped_steps"] == 0
    assert values["train/lr"] == LR
    assert any(not torch.equal(before[n], w) for n, w in weights(engine).items())
    assert engine.train_step(batch)["train/loss"] < values["train/loss"]


def test_verl_is_told_what_the_recipe_says(make: Make) -> None:
    words = ("optimizer.betas=[0.8,0.9]", "optimizer.weight_decay=0.25", "seed=7")
    engine, run = make("run", *words, "policy.dtype=bfloat16")
    model, config, optimizer = engine.model_config, engine.engine_config, engine.optimizer_config
    assert model.local_path == str(run.policy_folder)
    assert not (model.trust_remote_code or model.use_remove_padding)
    assert not model.enable_gradient_checkpointing
    assert (model.lora_rank, model.target_modules) == (0, "all-linear")
    given = {"attn_implementation": "sdpa", "unnorm_key": None, "quantization": "none"}
    assert dict(model.override_config) == given | {"gather_once": True}
    assert (config.strategy, config.use_torch_compile, config.seed) == ("fsdp2", False, 7)
    assert config.model_dtype == "fp32"
    precision = {"param_dtype": "bf16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    assert dict(config.mixed_precision) == precision
    assert (optimizer.optimizer, optimizer.lr) == ("adamw", LR)
    assert (tuple(optimizer.betas), optimizer.weight_decay) == ((0.8, 0.9), 0.25)
    assert (optimizer.lr_warmup_steps, optimizer.total_training_steps) == (0, 6)
    contents = ["model", "optimizer", "extra"]
    saved = engine.checkpoint_config
    assert list(saved.save_contents) == list(saved.load_contents) == contents


def test_a_bound_clips_and_the_norm_is_that_before(make: Make) -> None:
    free, run = make("free", "optimizer.clip_grad=null")
    bound, _ = make("bound", "optimizer.clip_grad=0.001")
    batch = batch_of(run, free, [0, 5])
    norms = [engine.train_step(batch)["train/grad_norm"] for engine in (free, bound)]
    assert norms[0] == pytest.approx(norms[1])
    assert free.optimizer_config.clip_grad == math.inf
    assert bound.optimizer_config.clip_grad == 0.001


def test_smoothing_changes_what_is_learned_and_not_what_is_reported(make: Make) -> None:
    engine, run = make("run", "optimizer.smoothing=3.0", "optimizer.clip_grad=null")
    batch = batch_of(run, engine, [1, 6, 8, 12])
    policy, logits, nll = scored(run, batch)
    targets = soft_targets(batch.action_tokens, policy.processor.codec, 3.0)
    smooth = smoothed_nll(nll, logits, batch.action_tokens, targets).mean()
    values = engine.train_step(batch)
    assert values["train/loss"] == pytest.approx(float(nll.mean()), rel=1e-4)
    assert values["train/grad_norm"] == pytest.approx(gradient_norm(policy, smooth), rel=1e-3)


def test_the_rate_of_a_step_follows_the_schedule(make: Make) -> None:
    words = ("optimizer.warmup_steps=2", "optimizer.lr_scheduler_type=cosine")
    engine, run = make("run", *words, "optimizer.micro_batch_size=4")
    batch = batch_of(run, engine, [0])
    rates = [engine.train_step(batch)["train/lr"] for _ in range(6)]
    factor = run.recipe.optimizer.lr_factor
    assert rates == pytest.approx([LR * factor(step, total_steps=6) for step in range(6)])
    assert rates[-1] < rates[0] < rates[1]


def test_a_step_that_is_not_finite_is_left_out_and_too_many_end_the_run(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, run = make("run", "optimizer.max_skipped_in_a_row=2")
    batch = batch_of(run, engine, [0, 1, 2, 3])
    forward, spoils = SFTEngine._sft_forward, [False, True, True, True]

    def spoilt(self: SFTEngine, given: SampleBatch, rows: slice) -> SFTOutput:
        output = forward(self, given, rows)
        return replace(output, loss=output.loss * (math.nan if spoils.pop(0) else 1))

    monkeypatch.setattr(SFTEngine, "_sft_forward", spoilt)
    before = weights(engine)
    values = engine.train_step(batch)
    assert values["train/skipped_steps"] == 1
    assert math.isnan(values["train/grad_norm"])
    assert math.isfinite(values["train/loss"]), "nothing of it is spoilt"
    assert all(torch.equal(before[n], w) for n, w in weights(engine).items())
    with pytest.raises(DivergedError, match="2 optimizer steps in a row"):
        engine.train_step(batch)
    kept = torch.load(run.folder / "diverged" / "batch_rank_0.pt", weights_only=True)
    assert torch.equal(kept["action_tokens"], batch.action_tokens)
    assert torch.equal(kept["images"], batch.images)
    assert tuple(kept["instructions"]) == batch.instructions


def test_a_loss_that_is_not_finite_counts_though_its_gradient_is(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, run = make("run", "optimizer.micro_batch_size=4")
    forward = SFTEngine._sft_forward

    def infinite(self: SFTEngine, given: SampleBatch, rows: slice) -> SFTOutput:
        output = forward(self, given, rows)
        return replace(output, loss=output.loss + math.inf)

    monkeypatch.setattr(SFTEngine, "_sft_forward", infinite)
    before = weights(engine)
    values = engine.train_step(batch_of(run, engine, [0, 5]))
    assert values["train/skipped_steps"] == 1
    assert all(torch.equal(before[n], w) for n, w in weights(engine).items())


def test_a_test_is_the_weighted_mean_and_learns_nothing(make: Make) -> None:
    engine, run = make("run")
    batches = [batch_of(run, engine, [2, 7]), batch_of(run, engine, [11, 11])]
    chosen = [torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])]
    losses, rights = [], []
    for batch in batches:
        _, logits, nll = scored(run, batch)
        losses += nll.mean(1).tolist()
        rights += (logits.argmax(-1) == batch.action_tokens).float().mean(1).tolist()
    before = weights(engine)
    loss, accuracy = engine.test(list(zip(batches, chosen, strict=True)), 3)
    assert loss == pytest.approx(sum(losses[:3]) / 3, rel=1e-4)
    assert accuracy == pytest.approx(sum(rights[:3]) / 3)
    assert all(torch.equal(before[n], w) for n, w in weights(engine).items())


def test_a_policy_is_saved_in_the_type_of_the_recipe(make: Make, tmp_path: Path) -> None:
    engine, run = make("run", "policy.dtype=bfloat16")
    assert {w.dtype for w in engine.module.parameters()} == {torch.float32}, "for the optimizer"
    engine.export(tmp_path / "policy")
    saved = load_file(tmp_path / "policy" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    right = load_policy(run.policy_folder).model.state_dict()
    assert saved.keys() == right.keys()
    assert all(torch.equal(saved[name], right[name].bfloat16()) for name in right)
    assert load_policy(tmp_path / "policy").processor.render_size == run.render_size


def test_a_step_can_be_resumed(make: Make, tmp_path: Path) -> None:
    words = ("policy.lora_rank=2", "policy.lora_alpha=3", "policy.gradient_checkpointing=true")
    engine, run = make("first", *words)
    assert (engine.model_config.lora_rank, engine.model_config.lora_alpha) == (2, 3)
    batch = batch_of(run, engine, [0, 4])
    trained = [n for n, w in engine.module.named_parameters() if w.requires_grad]
    assert trained and all("lora" in name for name in trained)
    engine.train_step(batch)
    engine.save_checkpoint(str(tmp_path / "ranks"), global_step=1)
    assert not list((tmp_path / "ranks").glob("model_*"))
    again, _ = make("second", *words)
    again.load_checkpoint(str(tmp_path / "ranks"), del_local_after_load=False)
    values = [one.train_step(batch) for one in (engine, again)]
    assert values[0] == values[1]
    theirs = weights(again)
    assert all(torch.equal(w, theirs[n]) for n, w in weights(engine).items())


def test_sums_are_added_up_in_double_precision(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single precision loses a whole nat beside 2^24 of them."""
    engine, run = make("run", "optimizer.micro_batch_size=1")
    batch = batch_of(run, engine, [0, 1, 2, 3])
    forward = SFTEngine._sft_forward
    large = iter([2.0**24, 1.0, 1.0, 1.0] * 2)

    def scaled(self: SFTEngine, given: SampleBatch, rows: slice) -> SFTOutput:
        output = forward(self, given, rows)
        return replace(output, nll=torch.full_like(output.nll, next(large)))

    monkeypatch.setattr(SFTEngine, "_sft_forward", scaled)
    assert engine.train_step(batch)["train/loss"] == (2**24 + 3) / 4
    ones = [(batch_of(run, engine, [row]), torch.ones(1)) for row in range(4)]
    assert engine.test(ones, 4)[0] == (2**24 + 3) / 4


def test_what_is_reported_is_of_all_ranks(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, run = make("run", "optimizer.micro_batch_size=4")
    batch = batch_of(run, engine, [0, 3, 8, 12])
    tested = [(batch, torch.ones(4))]
    alone = [*engine.test(tested, 4), engine.train_step(batch)["train/loss"]]

    def all_reduce(tensor: torch.Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> None:
        if op == torch.distributed.ReduceOp.SUM:
            tensor *= 3  # as if two other ranks had the same sums

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    again, _ = make("again", "optimizer.micro_batch_size=4")
    of_all = [*again.test(tested, 4), again.train_step(batch)["train/loss"]]
    assert of_all == pytest.approx([3 * value for value in alone])


def test_new_adapters_are_those_of_the_recipes_seed(make: Make) -> None:
    first, again, other = (
        weights(make(name, "policy.lora_rank=2", f"seed={seed}")[0])
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    drawn = [name for name in first if "lora_A" in name]
    assert drawn and all(torch.equal(first[name], again[name]) for name in drawn)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
