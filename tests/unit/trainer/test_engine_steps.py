"""The embedded policy's engine on one rank: what it holds, scores, saves and reports."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
from mini_engine import make_engine, training_worker
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy
from verl.utils import tensordict_utils as tu
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine
from verl.workers.utils.padding import response_from_nested

from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.envs.registry import suite
from verl_vla.policies.registry import load_policy
from verl_vla.trainer.engine import engine as engine_module
from verl_vla.trainer.engine.engine import VLAEngine
from verl_vla.trainer.engine.weights import SWITCH
from verl_vla.trainer.verl_compat.process import MODEL_TYPE, prepare_verl

POLICY = PROJECT_FOLDER / "bases" / "mini"
NUM_TOKENS, NUM_BINS = 56, 256
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLAEngine]:
    prepare_verl("cpu", option="cluster.device")
    folder = tmp_path_factory.mktemp("rank")
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=1)
    yield make_engine(POLICY, folder / "diverged")
    torch.distributed.destroy_process_group()


def jagged(rows: Any) -> Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def decided(engine: VLAEngine, action_tokens: Tensor) -> tuple[Any, Tensor, list[Tensor]]:
    """Rows of policy steps with prompts of different lengths, their images and prompts."""
    generator = torch.Generator().manual_seed(1)
    count = len(action_tokens)
    images = torch.randint(
        0, 256, (count, *engine.processor.shape.image_shape), generator=generator, dtype=torch.uint8
    )
    prompts = [engine.processor.prompt(t.instruction) for t in suite("mini").tasks[:count]]
    assert len({len(prompt) for prompt in prompts}) > 1
    mask = torch.ones(count, NUM_TOKENS, dtype=torch.long)
    rows = {
        "prompts": jagged(prompts),
        "responses": jagged(action_tokens),
        "images": jagged(images),
        "proprio": jagged(torch.zeros(count, 8)),
        "response_mask": jagged(mask),
        "loss_mask": jagged(mask),
        "input_ids": jagged(prompts),
    }
    return tu.get_tensordict(rows, {"temperature": TEMPERATURE}), images, prompts


def bins(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, NUM_BINS, (count, NUM_TOKENS), generator=generator)


@pytest.mark.parametrize("size", [1, 3])
def test_log_probs_and_entropies_stand_where_verl_reads_them(engine: VLAEngine, size: int) -> None:
    chosen = bins(3)
    data, images, prompts = decided(engine, chosen)
    tu.assign_non_tensor(data, compute_loss=False)
    masks = data["response_mask"]
    worker = training_worker(engine, micro_batch_size=size)
    found = worker.infer_batch(data)
    policy = load_policy(POLICY)
    logits = policy.logits(images, prompts, chosen) / TEMPERATURE
    spread = torch.log_softmax(logits, -1)
    right = spread.gather(-1, chosen[..., None]).squeeze(-1)
    mine = response_from_nested(found["log_probs"], masks)
    assert torch.allclose(torch.stack(list(mine.unbind())), right, atol=1e-4)
    entropy = -(spread.exp() * spread).sum(-1)
    mine = response_from_nested(found["entropy"], masks)
    assert torch.allclose(torch.stack(list(mine.unbind())), entropy, atol=1e-3)
    assert not found["log_probs"].requires_grad


def test_a_micro_batch_reports_its_loss_and_which_optimizer_step_it_belongs_to(
    engine: VLAEngine,
) -> None:
    data, _, _ = decided(engine, bins(2))
    seen: list[dict[str, Any]] = []

    def loss(**given: Any) -> tuple[Tensor, dict[str, float]]:
        seen.append(given)
        return given["log_probs"].sum(), {"own": 1.0}

    engine.num_optimizer_steps = 4
    engine.losses.clear()
    value, output = engine.forward_step(data, loss, forward_only=False)
    assert output["metrics"] == {"own": 1.0, "optimizer_step": 4}
    assert output["model_output"] == {}
    assert engine.losses == [output["loss"]] == [value.item()]
    assert value.requires_grad
    (given,) = seen
    assert given["log_probs"].shape == given["entropy"].shape == (2, NUM_TOKENS)
    assert not given["entropy"].requires_grad, "it is only reported"
    assert given["data"]["loss_mask"].is_nested
    engine.losses.clear()


def test_rows_of_padding_respond_with_a_token_that_is_no_bin(engine: VLAEngine) -> None:
    """veRL fills a batch up with the id of the end of a sequence."""
    answers = []
    for token in (NUM_BINS - 1, NUM_BINS, 31999):
        data, _, _ = decided(engine, torch.full((2, NUM_TOKENS), token))
        _, output = engine.forward_step(data, None, forward_only=True)
        answers.append(output["model_output"]["log_probs"].values())
        assert output["loss"] == 0.0
        assert output["metrics"] == {}
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


def test_an_optimizer_step_counts_and_forgets_its_losses(
    engine: VLAEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FSDPEngine, "optimizer_step", lambda _: 2.5)
    engine.num_optimizer_steps = 1
    engine.losses[:] = [1.0, 2.0]
    assert engine.optimizer_step() == 2.5
    assert (engine.losses, engine.num_optimizer_steps) == ([], 2)


Act = Callable[[VLAEngine, Path], Any]
ACTS: dict[str, Act] = {
    "train": lambda engine, _: engine.train_mode(),
    "save": lambda engine, folder: engine.save_checkpoint(str(folder), global_step=1),
    "load": lambda engine, folder: engine.load_checkpoint(str(folder), del_local_after_load=False),
    "export": lambda engine, folder: engine.export(folder / "policy"),
    "make state": lambda engine, _: engine.make_optimizer_state(),
}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS.keys())
@pytest.mark.parametrize("reshard", [True, False])
def test_gathered_weights_are_given_up_first(
    engine: VLAEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Act, reshard: bool
) -> None:
    shed: list[Any] = []
    monkeypatch.setattr(engine_module, "shed_gathered", lambda *given: shed.append(given))
    config = replace(engine.engine_config, reshard_after_forward=reshard)
    monkeypatch.setattr(engine, "engine_config", config)
    engine.save_checkpoint(str(tmp_path), global_step=1)
    assert shed == [], "there was nothing to give up"
    engine._holds_all_weights = True
    act(engine, tmp_path)
    assert shed == [(engine.module, reshard)]
    assert not engine._holds_all_weights
    act(engine, tmp_path)
    assert len(shed) == 1


@pytest.mark.parametrize(
    ("gather_once", "offloads", "num_ranks", "gathers"),
    [
        (True, False, 2, True),
        (False, False, 2, False),
        (True, True, 2, False),
        (True, False, 1, False),
    ],
)
def test_weights_are_gathered_where_there_is_room_and_something_to_gather(
    monkeypatch: pytest.MonkeyPatch,
    gather_once: bool,
    offloads: bool,
    num_ranks: int,
    gathers: bool,
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(engine_module, "keep_gathered", kept.append)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: num_ranks)
    one: Any = object.__new__(VLAEngine)
    one.module = "a module"
    one.model_config = SimpleNamespace(override_config={"gather_once": gather_once})
    one._uses_fsdp2_cpu_offload_policy, one._holds_all_weights = offloads, False
    for _ in range(2):
        one._hold_all_weights()
    assert kept == (["a module"] if gathers else [])
    assert one._holds_all_weights == gathers


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("offloads", [True, False])
def test_weights_are_offloaded_where_the_recipe_says_and_pinned_for_a_device(
    monkeypatch: pytest.MonkeyPatch, device: str, offloads: bool
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(engine_module, "shard", lambda *all_: given.append(all_) or all_[0])
    monkeypatch.setattr(engine_module, "get_device_name", lambda: device)
    one: Any = object.__new__(VLAEngine)
    one.model_config = SimpleNamespace(override_config={"quantization": "none"})
    one.engine_config = SimpleNamespace(
        mixed_precision={"param_dtype": "bf16"}, offload_policy=offloads
    )
    one.device_mesh = "a mesh"
    assert one._build_fsdp_module("a module") == "a module"
    ((module, mesh, config, offload),) = given
    assert (module, mesh, config) == ("a module", "a mesh", one.engine_config)
    assert one._uses_fsdp2_cpu_offload_policy == offloads
    assert offload == (CPUOffloadPolicy(pin_memory=device == "cuda") if offloads else None)
    assert one.scaler is None
    assert one._autocast_dtype == torch.bfloat16


def test_on_a_device_a_checkpoint_is_saved_as_verl_does(
    engine: VLAEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(engine_module, "get_device_name", lambda: "cuda")
    monkeypatch.setattr(
        FSDPEngine, "save_checkpoint", lambda _, *all_, **more: given.append((all_, more))
    )
    engine.save_checkpoint("here", None, 3, 2, own=True)
    assert given == [(("here", None, 3, 2), {"own": True})]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_dropped_state_frees_the_memory_of_a_device(
    engine: VLAEngine, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    freed: list[int] = []
    held = SimpleNamespace(empty_cache=lambda: freed.append(len(engine.optimizer.state)))
    monkeypatch.setattr(engine_module, "get_device_name", lambda: device)
    monkeypatch.setattr(engine_module, "get_torch_device", lambda: held)
    engine.make_optimizer_state()
    assert engine.optimizer.state
    engine.drop_optimizer_state()
    assert freed == ([0] if device == "cuda" else [])
    assert not engine.optimizer.state


def test_on_a_cpu_old_checkpoints_are_left_to_the_trainer(
    engine: VLAEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        engine.checkpoint_manager, "save_checkpoint", lambda **options: given.append(options)
    )
    engine.save_checkpoint("here", global_step=3, max_ckpt_to_keep=2)
    assert given == [{"local_path": "here", "global_step": 3, "max_ckpt_to_keep": 2}]


def test_adapters_leave_the_random_numbers_of_the_process_alone() -> None:
    class Model(torch.nn.Module):
        def add_adapters(self, *, rank: int, alpha: int, targets: str) -> None:
            self.given = rank, alpha, targets
            self.adapter = torch.nn.Parameter(torch.rand(rank).bfloat16())
            self.frozen = torch.nn.Parameter(torch.zeros(1).bfloat16(), requires_grad=False)

    one: Any = object.__new__(VLAEngine)
    one.engine_config = SimpleNamespace(seed=5)
    one.model_config = SimpleNamespace(
        lora_rank=3, lora_alpha=6, target_modules="all", override_config={"quantization": "none"}
    )
    before = torch.get_rng_state()
    module = one._build_lora_module(Model())
    assert torch.equal(torch.get_rng_state(), before)
    assert module.given == (3, 6, "all")
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(module.adapter.data, torch.rand(3, generator=generator).bfloat16().float())
    assert module.frozen.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("quantization", "dtype", "is_on"),
    [("nf4", torch.bfloat16, True), ("nf4", torch.float32, False), ("none", torch.bfloat16, False)],
)
def test_only_weights_in_4_bits_need_mixed_arithmetic(
    quantization: str, dtype: torch.dtype, is_on: bool
) -> None:
    seen: list[tuple[bool, dict[str, Any]]] = []

    def module(**given: Any) -> str:
        seen.append((torch.is_autocast_enabled("cpu"), given))
        return "logits"

    one: Any = object.__new__(VLAEngine)
    one.model_config = SimpleNamespace(override_config={"quantization": quantization})
    one._autocast_dtype, one.module = dtype, module
    one.processor = SimpleNamespace(model_inputs=lambda *given: {"seen": given})
    assert one.run_model("ids", "mask", "images", proprio="proprio") == "logits"
    ((was_on, given),) = seen
    assert was_on == is_on
    assert given == {
        "seen": ("images", "proprio"),
        "input_ids": "ids",
        "attention_mask": "mask",
        "action_tokens": None,
        "sampler": None,
        "with_nll": False,
    }


@pytest.mark.parametrize("warmup", [None, -1, 0])
def test_without_a_warm_up_the_rate_is_whole_from_the_first_step(warmup: int | None) -> None:
    one: Any = object.__new__(VLAEngine)
    one.optimizer_config = SimpleNamespace(lr_warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = one._build_lr_scheduler(optimizer)
    rates = [schedule.get_last_lr()[0]]
    for _ in range(2):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    assert rates == [0.5] * 3


@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_model_is_loaded_as_the_recipe_says(
    monkeypatch: pytest.MonkeyPatch, checkpoints: bool
) -> None:
    calls: list[Any] = []
    module = SimpleNamespace(gradient_checkpointing_enable=calls.append)

    def load(folder: str, **options: Any) -> Any:
        calls.append((folder, options))
        return module

    monkeypatch.setattr(engine_module, "load_model", load)
    monkeypatch.setattr(engine_module, "load_processor", lambda *given: given)
    one: Any = object.__new__(VLAEngine)
    one.model_config = SimpleNamespace(
        local_path="a/folder",
        override_config={"unnorm_key": "a key"},
        hf_config=SimpleNamespace(_attn_implementation="eager"),
        enable_gradient_checkpointing=checkpoints,
    )
    one.engine_config = SimpleNamespace(model_dtype="bf16")
    assert one._build_module() is module
    assert one.processor == ("a/folder", "a key")
    loaded = ("a/folder", {"dtype": torch.bfloat16, "attn_implementation": "eager"})
    assert calls == [loaded, *([{"use_reentrant": False}] if checkpoints else [])]


def test_no_rank_goes_on_before_every_share_is_saved(
    engine: VLAEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    manager = engine.checkpoint_manager
    monkeypatch.setattr(manager, "save_checkpoint", lambda **_: events.append("verl's"))
    monkeypatch.setattr(engine_module, "save_trained", lambda *_: events.append("adapters"))
    monkeypatch.setattr(torch.distributed, "barrier", lambda *_, **__: events.append("barrier"))
    monkeypatch.setattr(engine, "_is_lora", True)
    engine.save_checkpoint("here", global_step=3)
    assert events == ["verl's", "adapters", "barrier"]


def test_verl_finds_the_engine_and_executes_nothing_that_it_reads(engine: VLAEngine) -> None:
    assert EngineRegistry.get_engine_cls(MODEL_TYPE, "fsdp2") is VLAEngine
    assert os.environ[SWITCH] == "1", "from the import of the engine on"
