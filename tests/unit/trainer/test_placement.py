"""Ray's room for ranks and TransferQueue on machines with few processors."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest
from verl.single_controller.ray import RayResourcePool

from verl_vla.config.compose import load_recipe
from verl_vla.config.grpo import GRPOClusterConfig
from verl_vla.core.errors import ConfigError
from verl_vla.trainer.grpo import launch
from verl_vla.trainer.verl_compat import placement
from verl_vla.trainer.verl_compat.placement import (
    NoDataset,
    RankPoolManager,
    report_wait,
    require_room,
)


def node(cpus: float, gpus: float = 0, address: str = "10.0.0.1") -> dict[str, Any]:
    """A node as `ray.nodes` has it: a resource that it has none of is absent."""
    resources = {name: count for name, count in (("CPU", cpus), ("GPU", gpus)) if count}
    return {"Alive": True, "NodeManagerAddress": address, "Resources": resources}


def cluster(num_nodes: int, ranks_per_node: int) -> GRPOClusterConfig:
    return GRPOClusterConfig(
        num_nodes=num_nodes, ranks_per_node=ranks_per_node, address="auto", device="cuda"
    )


def requests(manager: RankPoolManager, monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The bundles that the manager's pools ask Ray for."""
    asked: list[list[Any]] = []

    class Granted:
        def ready(self) -> None:
            return None

    def grant(bundles: list[Any], **_: Any) -> Granted:
        asked.append(bundles)
        return Granted()

    base = "verl.single_controller.ray.base"
    monkeypatch.setattr(f"{base}.placement_group", grant)
    monkeypatch.setattr(f"{base}.sort_placement_group_by_node_ip", lambda groups: groups)
    monkeypatch.setattr(f"{base}.ray.get", lambda _: None)
    gpus = SimpleNamespace(device_name="cuda", ray_resource_name=lambda: "GPU")
    monkeypatch.setattr(f"{base}.get_platform", lambda: gpus)
    monkeypatch.setattr(RankPoolManager, "_check_resource_available", lambda _: None)
    manager.create_resource_pool()
    for pool in manager.resource_pool_dict.values():
        pool.get_placement_groups()
    return asked


def test_a_rank_asks_for_one_slot_and_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A g5.xlarge has 4 processors: veRL's 3 a rank leave one for TransferQueue's two processes."""
    manager = RankPoolManager(resource_pool_spec={"global_pool": [1]}, mapping={}, use_gpu=True)
    ((bundle,),) = requests(manager, monkeypatch)
    assert bundle == {"CPU": 1, "GPU": 1}


def test_a_rank_without_a_gpu_asks_for_one_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = RankPoolManager(resource_pool_spec={"global_pool": [2]}, mapping={}, use_gpu=False)
    assert requests(manager, monkeypatch) == [[{"CPU": 1}, {"CPU": 1}]]


@pytest.mark.parametrize("use_gpu", [True, False])
def test_gpus_are_counted_where_ranks_have_one(
    monkeypatch: pytest.MonkeyPatch, use_gpu: bool
) -> None:
    """veRL counts those of the cluster, and a cluster without any would be refused."""
    counted: list[RankPoolManager] = []
    monkeypatch.setattr(
        RankPoolManager, "_check_resource_available", lambda manager: counted.append(manager)
    )
    manager = RankPoolManager(resource_pool_spec={"global_pool": [1]}, mapping={}, use_gpu=use_gpu)
    manager.create_resource_pool()
    assert len(counted) == use_gpu


@pytest.mark.parametrize("profile", ["8gpu", "qlora_24gb", "two_cores"])
def test_a_cluster_of_our_own_has_a_slot_for_everything(profile: str) -> None:
    """Slots are no cores: their number follows from what runs, not from the machine."""
    config = load_recipe(["recipe=libero", f"profile={profile}"]).cluster
    controller, storage = 1, 1
    assert launch.logical_cpus(config) >= config.ranks_per_node + controller + storage


@pytest.mark.parametrize(
    ("nodes", "num_nodes", "ranks"),
    [
        ([node(3, 1)], 1, 1),
        ([node(10, 8)], 1, 8),
        ([node(4, 1), node(2, 1)], 2, 1),
        ([node(0), node(3, 1), node(0)], 1, 1),
    ],
)
def test_nodes_with_just_enough_are_accepted(
    monkeypatch: pytest.MonkeyPatch, nodes: list[Any], num_nodes: int, ranks: int
) -> None:
    monkeypatch.setattr(placement.ray, "nodes", lambda: nodes)
    require_room(cluster(num_nodes, ranks), use_gpu=True)


@pytest.mark.parametrize(
    ("nodes", "num_nodes", "ranks", "says"),
    [
        ([node(2, 1)], 1, 1, "2 CPU, 1 GPU on each.*3 CPU in all.*10.0.0.1 with 2 CPU, 1 GPU"),
        ([node(8, 8)], 1, 8, "9 CPU, 8 GPU on each.*10 CPU in all.*10.0.0.1 with 8 CPU, 8 GPU"),
        ([node(16, 4)], 1, 8, "8 GPU on each.*10.0.0.1 with 16 CPU, 4 GPU"),
        ([node(2, 1), node(2, 1, "10.0.0.2")], 2, 1, "5 CPU in all.*1 GPU; 10.0.0.2 with 2 CPU"),
        ([node(9, 1), node(1, 1, "10.0.0.2")], 2, 1, "2 CPU, 1 GPU on each.*10.0.0.2 with 1 CPU"),
        ([node(9)], 1, 1, "10.0.0.1 with 9 CPU, 0 GPU"),
        ([node(0, 1)], 1, 1, "10.0.0.1 with 0 CPU, 1 GPU"),
    ],
)
def test_too_little_room_is_refused_with_the_numbers(
    monkeypatch: pytest.MonkeyPatch, nodes: list[Any], num_nodes: int, ranks: int, says: str
) -> None:
    monkeypatch.setattr(placement.ray, "nodes", lambda: nodes)
    with pytest.raises(ConfigError, match=says) as caught:
        require_room(cluster(num_nodes, ranks), use_gpu=True)
    assert "--num-cpus" in str(caught.value)


def test_ranks_without_gpus_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement.ray, "nodes", lambda: [node(4)])
    require_room(cluster(1, 2), use_gpu=False)


def test_a_long_wait_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(placement, "REPORT_EVERY_S", 0.05)
    monkeypatch.setattr(placement.ray, "nodes", lambda: [node(4, 1)])
    monkeypatch.setattr(
        RayResourcePool, "get_placement_groups", lambda *_, **__: time.sleep(0.4) or ["granted"]
    )
    manager = RankPoolManager(resource_pool_spec={"global_pool": [8]}, mapping={}, use_gpu=True)
    monkeypatch.setattr(RankPoolManager, "_check_resource_available", lambda _: None)
    manager.create_resource_pool()
    pool = manager.resource_pool_dict["global_pool"]
    assert pool.get_placement_groups() == ["granted"]
    assert len(caplog.messages) >= 2
    assert caplog.messages[0] == (
        "still waiting, for 0 s now, for 8 ranks on one node, each with 1 CPU, 1 GPU; "
        "the Ray cluster's nodes are 10.0.0.1 with 4 CPU, 1 GPU"
    )


def test_a_short_wait_says_nothing_and_an_error_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(ValueError, match="no room"), report_wait(lambda: "room"):
        raise ValueError("no room")
    assert not caplog.messages


def test_a_training_step_is_one_epoch_of_rows_that_hold_nothing() -> None:
    data = NoDataset(SimpleNamespace(train_batch_size=3), tokenizer=None)
    assert len(data) == 3
    assert data[2] == {"raw_prompt": [], "index": 2}
