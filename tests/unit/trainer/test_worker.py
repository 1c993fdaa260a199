"""One rank in this process: it plays and learns with the same weights, and answers the driver."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from mini_engine import make_engine, training_worker
from ranks import Answer
from verl.single_controller.base.decorator import MAGIC_ATTR, Dispatch
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.rollout.base import get_rollout_class
from verl.workers.rollout.replica import RolloutReplicaRegistry

from verl_vla.config.grpo import LossConfig
from verl_vla.core.episode import Observation
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.envs.registry import suite
from verl_vla.policies.registry import load_policy
from verl_vla.trainer.engine.engine import VLAEngine
from verl_vla.trainer.grpo import worker as worker_module
from verl_vla.trainer.grpo.cluster_policy import ClusterPolicy
from verl_vla.trainer.grpo.worker import (
    SharedWeightsReplica,
    SharedWeightsRollout,
    VLAWorker,
    memory_metrics,
    row_loss,
)
from verl_vla.trainer.verl_compat.process import ROLLOUT_NAME, prepare_verl

POLICY = PROJECT_FOLDER / "bases" / "mini"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLAEngine]:
    prepare_verl("cpu", option="cluster.device")
    folder = tmp_path_factory.mktemp("rank")
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=0, world_size=1)
    yield make_engine(POLICY, folder / "diverged")
    torch.distributed.destroy_process_group()


@pytest.fixture
def worker(engine: VLAEngine) -> VLAWorker:
    rank = object.__new__(VLAWorker)
    rank.actor = training_worker(engine, micro_batch_size=2)
    return rank


def seen(count: int) -> tuple[list[Observation], torch.Tensor]:
    """Observations of tasks whose prompts differ in length, and their noise."""
    shape = load_policy(POLICY).processor.shape
    rng = np.random.default_rng(3)
    observations = [
        Observation(
            image=rng.integers(0, 256, shape.image_shape, dtype=np.uint8),
            proprio=rng.normal(size=8).astype(np.float32),
            instruction=task.instruction,
        )
        for task in suite("mini").tasks[:count]
    ]
    return observations, torch.from_numpy(rng.random((count, shape.num_tokens)))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_rank_samples_what_the_policy_itself_would(
    worker: VLAWorker, engine: VLAEngine, temperature: float
) -> None:
    policy = load_policy(POLICY)
    observations, noise = seen(3)
    engine.num_optimizer_steps = 5
    workers = SimpleNamespace(sample_actions=lambda data: Answer(worker.sample_actions(data), [0]))
    mine = ClusterPolicy(workers, policy.processor, num_ranks=1).act(
        observations, noise, temperature=temperature
    )
    right = policy.act(observations, noise, temperature=temperature)
    assert torch.equal(mine.action_tokens, right.action_tokens)
    assert torch.allclose(mine.log_probs, right.log_probs, atol=1e-5)
    assert np.allclose(mine.actions, right.actions)
    assert all(map(torch.equal, mine.prompt_ids, right.prompt_ids))
    assert bool(mine.log_probs.any()) == (temperature > 0)
    assert engine.num_optimizer_steps == 0, "the next update begins a new count"


def test_the_loss_of_the_recipe_replaces_verls(worker: VLAWorker) -> None:
    config = LossConfig(recompute_log_probs=True)
    worker.set_policy_loss(config, 7)
    assert worker.actor.loss_fn.func is row_loss
    assert worker.actor.loss_fn.keywords == {"config": config, "action_dim": 7, "num_ranks": 1}


def test_a_guard_counts_from_its_own_folder(worker: VLAWorker, engine: VLAEngine) -> None:
    worker.guard_updates("some/folder", 4)
    assert engine.guard.folder == Path("some/folder")
    assert (engine.guard.max_in_a_row, engine.guard.num_in_a_row) == (4, 0)


def test_a_step_without_an_update_moves_the_schedule_alone(
    worker: VLAWorker, engine: VLAEngine
) -> None:
    before = [weight.to_local().clone() for weight in engine.module.parameters()]
    done = engine.lr_scheduler.last_epoch
    assert worker.go_without_update() == engine.lr_scheduler.get_last_lr()[0]
    assert engine.lr_scheduler.last_epoch == done + 1
    after = [weight.to_local() for weight in engine.module.parameters()]
    assert all(map(torch.equal, before, after))


def test_an_exported_policy_can_be_loaded(worker: VLAWorker, tmp_path: Path) -> None:
    worker.export_policy(str(tmp_path / "policy"))
    mine = load_policy(tmp_path / "policy").model.state_dict()
    right = load_policy(POLICY).model.state_dict()
    assert mine.keys() == right.keys()
    assert all(torch.equal(mine[name], right[name]) for name in right)


def test_a_state_of_the_optimizer_is_made_for_a_try_and_dropped(
    worker: VLAWorker, engine: VLAEngine
) -> None:
    assert engine.optimizer is not None
    worker.make_optimizer_state()
    assert engine.optimizer.state
    worker.drop_optimizer_state()
    assert not engine.optimizer.state


def test_a_worker_without_a_model_has_no_engine() -> None:
    rank = object.__new__(VLAWorker)
    rank.actor = None
    with pytest.raises(AssertionError, match="init_model first"):
        _ = rank.engine


def test_memory_is_that_of_the_process_and_of_the_device_since_it_was_last_asked(
    worker: VLAWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, allocated, reserved = worker.peak_memory()
    assert process > 50 * 2**20
    assert (allocated, reserved) == (0, 0)
    resets: list[None] = []
    device = SimpleNamespace(
        max_memory_allocated=lambda: 11,
        max_memory_reserved=lambda: 22,
        reset_peak_memory_stats=lambda: resets.append(None),
    )
    monkeypatch.setattr(worker_module, "get_device_name", lambda: "cuda")
    monkeypatch.setattr(worker_module, "get_torch_device", lambda: device)
    assert worker.peak_memory()[1:] == (11, 22)
    assert len(resets) == 1


def test_the_largest_rank_counts() -> None:
    gib = 2**30
    assert memory_metrics([(gib, 4 * gib, 0), (3 * gib, 2 * gib, 5 * gib)]) == {
        "perf/max_process_memory_gb": 3,
        "perf/max_memory_allocated_gb": 4,
        "perf/max_memory_reserved_gb": 5,
    }


def test_there_are_no_weights_to_send(worker: VLAWorker) -> None:
    assert asyncio.run(worker.update_weights(3)) == {}


ON_EVERY_RANK = {
    "set_policy_loss": True,
    "guard_updates": True,
    "go_without_update": True,
    "update_weights": False,
    "export_policy": True,
    "make_encoders": True,
    "name_feature_space": True,
    "free_encoders": True,
    "make_optimizer_state": True,
    "drop_optimizer_state": True,
    "peak_memory": True,
}
"""Whether the driver waits for a method's answer."""


@pytest.mark.parametrize(("name", "blocks"), ON_EVERY_RANK.items())
def test_every_rank_is_asked(name: str, blocks: bool) -> None:
    asked = getattr(getattr(VLAWorker, name), MAGIC_ATTR)
    assert asked["dispatch_mode"] == Dispatch.ONE_TO_ALL
    assert asked["blocking"] == blocks


def test_each_rank_computes_a_batch_of_its_own_and_the_driver_does_not_wait() -> None:
    asked = getattr(VLAWorker.compute_features, MAGIC_ATTR)
    assert asked["dispatch_mode"] == Dispatch.ALL_TO_ALL
    assert not asked["blocking"]


def test_observations_are_shared_out_and_the_driver_does_not_wait() -> None:
    asked = getattr(VLAWorker.sample_actions, MAGIC_ATTR)
    assert not asked["blocking"]
    assert asked["dispatch_mode"]["dispatch_fn"].args == ("actor",)
    assert asked["dispatch_mode"]["collect_fn"].args == ("actor",)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("is_initialized", [False, True])
def test_ranks_on_a_cpu_meet_by_gloo_alone(
    monkeypatch: pytest.MonkeyPatch, device: str, is_initialized: bool
) -> None:
    calls: list[Any] = []
    inits: list[Any] = []
    monkeypatch.setattr(
        ActorRolloutRefWorker, "__init__", lambda _, *given, **more: inits.append((given, more))
    )
    monkeypatch.setattr(worker_module, "get_device_name", lambda: device)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: calls.append(number))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: is_initialized)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *given, **more: calls.append((given, more))
    )
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    rank = VLAWorker("a configuration", role="actor")
    assert inits == [(("a configuration",), {"role": "actor"})]
    assert rank.compute_features(0, None) is None, "it has no encoder yet"
    group = [(("gloo",), {"rank": 2, "world_size": 4})]
    assert calls == ([1, *([] if is_initialized else group)] if device == "cpu" else [])


def test_verl_finds_a_rollout_without_a_server() -> None:
    assert get_rollout_class(ROLLOUT_NAME, "async") is SharedWeightsRollout
    assert RolloutReplicaRegistry.get(ROLLOUT_NAME) is SharedWeightsReplica
    replica = object.__new__(SharedWeightsReplica)
    replica.replica_rank = 3
    asyncio.run(replica.launch_servers())
    assert replica._server_address == f"{ROLLOUT_NAME}-3"
    assert replica.servers == []
