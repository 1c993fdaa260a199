"""The engine on one rank, made from recipes as veRL makes it: adapters, 4 bits, optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl_yaml import read_once

from verl_vla.config.compose import load_recipe
from verl_vla.config.grpo import LossConfig
from verl_vla.envs.registry import suite
from verl_vla.policies.normalization import ActionStatistics
from verl_vla.policies.openvla_oft.tiny import TinySizes, build_tiny_policy
from verl_vla.policies.registry import load_policy
from verl_vla.trainer.engine.divergence_guard import FiniteGuard
from verl_vla.trainer.engine.engine import VLAEngine
from verl_vla.trainer.engine.weights import local
from verl_vla.trainer.grpo.run import open_run
from verl_vla.trainer.grpo.verl_config import to_verl
from verl_vla.trainer.grpo.worker import row_loss
from verl_vla.trainer.verl_compat.process import prepare_verl

SIZES = TinySizes(
    image_size=28,
    vision_width=24,
    vision_depth=1,
    vision_heads=2,
    llm_width=64,
    llm_depth=2,
    llm_heads=2,
    llm_mlp=128,
    chunk_length=2,
    fused=True,
)
NUM, TEMPERATURE = 3, 0.8
LORA = ["policy.lora_rank=4", "optimizer.lr=1e-2"]
MODES = {
    "language model": LORA,
    "all linear": [*LORA, "policy.lora_targets=all-linear"],
    "4 bits, all linear": [*LORA, "policy.quantization=nf4", "policy.lora_targets=all-linear"],
}

Make = Callable[..., VLAEngine]


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    prepare_verl("cpu", option="cluster.device")
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    statistics = ActionStatistics(
        q01=[-1.0] * 7, q99=[1.0] * 7, mask=[True] * 6 + [False], key="mini"
    )
    instructions = [task.instruction for task in suite("mini").tasks]
    build_tiny_policy(instructions, statistics, sizes=SIZES).save_pretrained(folder)
    return folder


@pytest.fixture
def make(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """An engine for ``key=value`` words, as `ActorRolloutRefWorker` makes it."""
    read_once(monkeypatch)
    monkeypatch.setattr("verl_vla.trainer.grpo.run.open_simulators", lambda *_: nullcontext())

    def build(*words: str) -> VLAEngine:
        out, given = f"out='{tmp_path / 'run'}'", {word.split("=")[0] for word in words}
        path = [] if "policy.path" in given else [f"policy.path='{base}'"]
        with open_run(load_recipe(["recipe=quickstart", out, *path, *words])) as run:
            config = to_verl(run).actor_rollout_ref
        (tmp_path / "run" / "recipe.yaml").unlink()  # the next one may differ
        actor: Any = omega_conf_to_dataclass(config.actor)
        model: Any = omega_conf_to_dataclass(config.model)
        engine = VLAEngine(model, actor.engine, actor.optim, actor.checkpoint)
        engine.initialize()
        return engine

    return build


def seen(engine: VLAEngine) -> tuple[Tensor, list[Tensor], Tensor]:
    """Images, prompts and noise of a few policy steps."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (NUM, 1, 28, 28, 3), generator=generator, dtype=torch.uint8)
    words = [task.instruction for task in suite("mini").tasks[:NUM]]
    noise = torch.rand(NUM, 14, generator=generator, dtype=torch.float64)
    return images, [engine.processor.prompt(text) for text in words], noise


def choose(engine: VLAEngine) -> tuple[Tensor, Tensor]:
    images, prompts, noise = seen(engine)
    return engine.sample_actions(*engine.processor.collate(prompts), images, noise, TEMPERATURE)


def update(engine: VLAEngine, action_tokens: Tensor) -> Tensor:
    """Make the chosen bins of the first policy step likelier; return [NUM, T] log_probs before."""
    images, prompts, _ = seen(engine)
    rows = {"prompts": prompts, "responses": list(action_tokens)}
    nested = {k: torch.nested.as_nested_tensor(v, layout=torch.jagged) for k, v in rows.items()}
    batch = TensorDict({**nested, "images": images, "proprio": torch.zeros(NUM, 8)}, batch_size=NUM)
    tu.assign_non_tensor(batch, temperature=TEMPERATURE)
    kept: list[Tensor] = []

    def loss(
        *, log_probs: Tensor, entropy: Tensor, data: TensorDict
    ) -> tuple[Tensor, dict[str, Any]]:
        kept.append(log_probs.detach())
        return -log_probs[0].mean(), {}

    with engine.train_mode():
        engine.optimizer_zero_grad()
        engine.forward_step(batch, loss, forward_only=False)[0].backward()
        engine.optimizer_step()
        engine.lr_scheduler_step()
    return kept[0]


def weights(engine: VLAEngine) -> dict[str, Tensor]:
    return {name: local(w.data).clone() for name, w in engine.module.named_parameters()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("words", MODES.values(), ids=MODES)
def test_adapters_learn_are_resumed_and_merged(
    make: Make, base: Path, words: list[str], tmp_path: Path
) -> None:
    engine = make(*words)
    before = weights(engine)
    adapters = {name for name in before if ".lora_" in name}
    action_tokens, log_probs = choose(engine)
    assert torch.equal(update(engine, action_tokens), log_probs), (
        "rollout and update score the same weights"
    )
    saved = tmp_path / "saved"
    engine.save_checkpoint(str(saved), global_step=1)
    update(engine, action_tokens)
    assert moved(before, weights(engine)) == adapters
    with engine.disable_adapter():
        assert torch.equal(choose(engine)[1], log_probs), "the reference policy, for the KL term"
    in_all = any("vision" in name for name in adapters) and any("lm_head" in n for n in adapters)
    assert in_all == ("policy.lora_targets=all-linear" in words)

    assert not list(saved.glob("model_*")), "the frozen base is not saved"
    again = make(*words)
    again.load_checkpoint(str(saved), del_local_after_load=False)
    update(again, action_tokens)
    assert moved(weights(engine), weights(again)) == set()

    engine.export(tmp_path / "policy")
    merged = load_policy(tmp_path / "policy")
    assert not any("lora" in name or "quant" in name for name in merged.model.state_dict())
    images, prompts, _ = seen(engine)
    mine, first = (
        policy.log_prob(images, prompts, action_tokens, temperature=TEMPERATURE)
        for policy in (merged, load_policy(base))
    )
    learned = update(engine, action_tokens)
    assert torch.allclose(mine, learned, atol=1e-4)
    assert not torch.allclose(first, learned, atol=1e-2)
    assert learned[0].mean() > log_probs[0].mean()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_is_frozen_is_held_in_fewer_bits(make: Make, quantization: str) -> None:
    words = [*LORA, f"policy.quantization={quantization}", "policy.dtype=bfloat16"]
    engine = make(*words, "policy.gradient_checkpointing=true")
    types = {name: weight.dtype for name, weight in weights(engine).items()}
    assert {t for name, t in types.items() if ".lora_" in name} == {torch.float32}
    frozen = {name: t for name, t in types.items() if ".lora_" not in name}
    small = {name for name, t in frozen.items() if t == torch.uint8}
    assert {t for name, t in frozen.items() if name not in small} == {torch.bfloat16}
    assert all(name.startswith("language_model.model.layers.") for name in small)
    assert len(small) == (SIZES.llm_depth * 7 if quantization == "nf4" else 0)
    action_tokens, log_probs = choose(engine)
    assert torch.equal(update(engine, action_tokens), log_probs)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("adamw_8bit", []),
        ("paged_adamw_8bit", LORA),
        pytest.param(
            "deepspeed_cpu_adam",
            [],
            marks=pytest.mark.skipif(
                find_spec("deepspeed") is None, reason="deepspeed is not installed"
            ),
        ),
    ],
)
def test_another_optimizer_learns_as_adamw_and_goes_on_exactly(
    make: Make, name: str, mode: list[str], tmp_path: Path
) -> None:
    words = [*mode, "optimizer.lr=1e-3"]
    plain, engine = make(*words), make(*words, f"optimizer.name={name}")
    action_tokens, _ = choose(engine)
    before = weights(engine)
    for one in (plain, engine):
        update(one, action_tokens)
    mine, theirs = weights(engine), weights(plain)
    assert moved(before, mine) == moved(before, theirs)
    for weight in moved(before, theirs):
        step = (theirs[weight] - before[weight]).abs().max()
        assert (mine[weight] - theirs[weight]).abs().max() < 0.1 * step, weight
    assert engine.optimizer is not None
    types = {v.dtype for s in engine.optimizer.state.values() for v in s.values() if is_big(v)}
    assert (torch.uint8 in types) == ("8bit" in name and not mode), "small ones stay in float32"

    engine.save_checkpoint(str(tmp_path / "saved"), global_step=1)
    again = make(*words, f"optimizer.name={name}")
    again.load_checkpoint(str(tmp_path / "saved"), del_local_after_load=False)
    for one in (engine, again):
        update(one, action_tokens)
    assert moved(weights(engine), weights(again)) == set()


def decided(engine: VLAEngine, advantages: list[float], which: list[int]) -> TensorDict:
    """Policy steps of two episodes of four steps each; those in ``which`` are learned from."""
    images, prompts, _ = seen(engine)
    action_tokens, log_probs = choose(engine)
    mask = torch.ones(len(action_tokens[0]), dtype=torch.long)
    columns = {
        "prompts": prompts,
        "responses": action_tokens,
        "images": images,
        "proprio": torch.zeros(NUM, 8),
        "response_mask": [mask] * NUM,
        "loss_mask": [mask] * NUM,
        "advantages": [torch.tensor([advantage]) for advantage in advantages],
        "old_log_probs": log_probs,
        "trajectory_steps": [torch.tensor([4])] * NUM,
        "num_trajectories": [torch.tensor([2])] * NUM,
    }
    rows = {
        name: torch.nested.as_nested_tensor([column[i] for i in which], layout=torch.jagged)
        for name, column in columns.items()
    }
    values = {"temperature": TEMPERATURE, "use_dynamic_bsz": False}
    return tu.get_tensordict(rows, values | {"micro_batch_size_per_gpu": 1})


def test_an_update_is_the_same_without_the_rows_that_have_no_gradient(
    make: Make, tmp_path: Path
) -> None:
    loss = partial(row_loss, config=LossConfig(), action_dim=7, num_ranks=1)
    after, norms, idle = [], [], []
    for which in ([0, 1, 2], [0, 2]):
        engine = make("optimizer.lr=1e-2")
        engine.guard = FiniteGuard(folder=tmp_path, max_in_a_row=1)
        before = weights(engine)
        with engine.train_mode():
            found = engine.train_batch(decided(engine, [1.0, 0.0, -1.0], which), loss)["metrics"]
        assert moved(before, weights(engine))
        after.append(weights(engine))
        norms.append(found["grad_norm"])
        idle.append(sum(found["num_rows_idle"]))
    assert idle == [1, 0]
    assert norms[0] == norms[1] > 0
    assert moved(*after) == set()


@pytest.mark.parametrize("size", [1, 2])
def test_a_micro_batch_holds_the_rows_of_the_recipe_however_long_prompts_are(
    make: Make, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    engine = make()
    # the fourth is one of those with which veRL pads a batch
    lengths = [5, 5, 20, 128, 5]
    columns = {
        "input_ids": [torch.zeros(length, dtype=torch.long) for length in lengths],
        "loss_mask": [torch.ones(14, dtype=torch.long)] * len(lengths),
    }
    rows = {k: torch.nested.as_nested_tensor(v, layout=torch.jagged) for k, v in columns.items()}
    data = tu.get_tensordict(rows, {"use_dynamic_bsz": True, "max_token_len_per_gpu": size})
    sizes: list[int] = []

    def forward_step(micro_batch: TensorDict, *_: Any, **__: Any) -> tuple[Tensor, dict[str, Any]]:
        sizes.append(len(micro_batch))
        return torch.zeros(1), {"model_output": {}, "loss": 0.0, "metrics": {}}

    monkeypatch.setattr(engine, "forward_step", forward_step)
    engine.forward_backward_batch(data, lambda **_: None, forward_only=True)
    assert sum(sizes) == len(lengths)
    assert max(sizes) == size
    assert len(sizes) == -(-len(lengths) // size)
    assert data["input_ids"].is_nested, "others read its lengths"


def test_a_checkpoint_before_the_first_update_is_gone_on_from(make: Make, tmp_path: Path) -> None:
    """The first training steps may have had no gradient."""
    words = ("optimizer.warmup_steps=4",)
    engine = make(*words)
    action_tokens, _ = choose(engine)
    lr = engine.lr_scheduler_step()
    engine.save_checkpoint(str(tmp_path / "saved"), global_step=1)
    again = make(*words)
    again.load_checkpoint(str(tmp_path / "saved"), del_local_after_load=False)
    for one in (engine, again):
        update(one, action_tokens)
    assert moved(weights(engine), weights(again)) == set()
    assert 0 < lr < engine.lr_scheduler_step() == again.lr_scheduler_step()


@pytest.mark.parametrize(
    "words",
    [(), (*LORA, "optimizer.name=paged_adamw_8bit"), ("optimizer.name=adamw_8bit",)],
    ids=["all weights", "adapters, paged", "8 bits"],
)
def test_a_checkpoint_that_is_tried_before_the_first_step_changes_nothing(
    make: Make, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """And its files are as large as those after a step."""
    words = (*words, "optimizer.weight_decay=0.1", "optimizer.warmup_steps=1")
    plain, engine = make(*words), make(*words)
    before, rng = weights(engine), torch.get_rng_state()
    engine.make_optimizer_state()
    assert moved(before, weights(engine)) == set()
    engine.save_checkpoint(str(tmp_path / "tried"), global_step=0)
    engine.drop_optimizer_state()
    engine.load_checkpoint(str(tmp_path / "tried"), del_local_after_load=False)
    assert engine.optimizer.state, "it was read"
    engine.drop_optimizer_state()
    assert torch.equal(torch.get_rng_state(), rng)
    assert moved(before, weights(engine)) == set()
    action_tokens, log_probs = choose(engine)
    assert torch.equal(choose(plain)[1], log_probs)
    for _ in range(2):
        for one in (plain, engine):
            update(one, action_tokens)
        assert moved(weights(plain), weights(engine)) == set()
    assert engine.lr_scheduler_step() == plain.lr_scheduler_step()
    engine.save_checkpoint(str(tmp_path / "saved"), global_step=1)
    (tried,), (saved,) = ((tmp_path / n).glob("optim_*") for n in ("tried", "saved"))
    assert tried.stat().st_size == pytest.approx(saved.stat().st_size, rel=0.01)


def test_the_first_training_step_of_a_warm_up_learns(make: Make) -> None:
    """veRL's own schedule begins at a rate of 0."""
    engine = make("optimizer.warmup_steps=4", "optimizer.lr=0.001")
    action_tokens, _ = choose(engine)
    rates = []
    for _ in range(6):
        rates.append(engine.optimizer.param_groups[0]["lr"])
        engine.lr_scheduler_step()
    assert rates == pytest.approx([0.0002, 0.0004, 0.0006, 0.0008, 0.001, 0.001])
    fresh = make("optimizer.warmup_steps=4", "optimizer.lr=0.001")
    before = weights(fresh)
    update(fresh, action_tokens)
    assert moved(before, weights(fresh))


def is_big(value: object) -> bool:
    return isinstance(value, Tensor) and value.numel() > SIZES.llm_width
