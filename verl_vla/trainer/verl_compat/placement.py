"""Place ranks on GPUs or cores; veRL's data set is not used."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from torch.utils.data import Dataset
from verl.single_controller.ray import RayResourcePool, ResourcePoolManager

from verl_vla.config.grpo import GRPOClusterConfig
from verl_vla.core.errors import ConfigError

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 60.0
"""Time after which a wait is reported, and between two reports, s."""

STORAGE_SLOTS, CONTROLLER_SLOTS = 1, 1
"""Ray's CPU slots of TransferQueue: of the storage unit that each node with ranks has, and of the
controller (``num_cpus`` of ``SimpleStorageUnit`` and ``TransferQueueController``, 0.1.10)."""


class RankPool(RayResourcePool):
    """A bundle of one slot, and a GPU where ranks have one, for each rank."""

    def get_placement_groups(self, *args: Any, **kwargs: Any) -> Any:
        """Return veRL's placement groups; report what they wait for."""
        gpu = ", 1 GPU" if self.use_gpu else ""
        wanted = ", ".join(f"{ranks} ranks on one node" for ranks in self.store)
        with report_wait(lambda: f"{wanted}, each with 1 CPU{gpu}; {_describe_nodes()}"):
            return super().get_placement_groups(*args, **kwargs)


@dataclass
class RankPoolManager(ResourcePoolManager):
    """Resource pools with one process a bundle.

    veRL asks for three slots a bundle, room for other workers beside the learner. Here there are
    none, and a machine with four processors and a GPU has no room for five slots.
    """

    use_gpu: bool = True

    def create_resource_pool(self) -> None:
        """Make one bundle for each rank.

        Raises:
            ValueError: the cluster has fewer GPUs than ranks.
        """
        for name, processes in self.resource_pool_spec.items():
            self.resource_pool_dict[name] = RankPool(
                processes, use_gpu=self.use_gpu, max_colocate_count=1, name_prefix=name
            )
        if self.use_gpu:
            # veRL counts GPUs here, of which ranks on a CPU need none
            self._check_resource_available()


def require_room(cluster: GRPOClusterConfig, *, use_gpu: bool) -> None:
    """Refuse a Ray cluster without room for ranks and TransferQueue; Ray would wait for ever.

    Raises:
        ConfigError: too few nodes have enough; with what is needed and what each node has.
    """
    ranks = cluster.ranks_per_node
    slots_on_each = ranks + STORAGE_SLOTS
    slots = cluster.num_nodes * slots_on_each + CONTROLLER_SLOTS
    found = [_room(node) for node in ray.nodes() if node["Alive"]]
    fitting = [
        cpus for cpus, gpus in found if cpus >= slots_on_each and (gpus >= ranks or not use_gpu)
    ]
    if len(fitting) >= cluster.num_nodes and sum(fitting) >= slots:
        return
    gpus = f", {ranks} GPU" if use_gpu else ""
    raise ConfigError(
        f"cluster.num_nodes={cluster.num_nodes} and cluster.ranks_per_node={ranks} need "
        f"{slots_on_each} CPU{gpus} on each node and {slots} CPU in all, for the ranks and "
        f"TransferQueue, but {_describe_nodes()}. These CPU are slots, not cores: start Ray there "
        f"with --num-cpus={slots_on_each + CONTROLLER_SLOTS}, or choose fewer ranks"
    )


@contextmanager
def report_wait(describe: Callable[[], str]) -> Generator[None]:
    """Say every `REPORT_EVERY_S` what is waited for, until the context ends."""
    began, is_over = time.monotonic(), threading.Event()

    def report() -> None:
        while not is_over.wait(REPORT_EVERY_S):
            waited_s = time.monotonic() - began
            logger.info("still waiting, for %.0f s now, for %s", waited_s, describe())

    thread = threading.Thread(target=report, daemon=True, name="report_wait")
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _room(node: dict[str, Any]) -> tuple[float, float]:
    """Return a node's CPU slots and GPUs; Ray leaves out what a node has none of."""
    resources = node["Resources"]
    return resources.get("CPU") or 0.0, resources.get("GPU") or 0.0


def _describe_nodes() -> str:
    alive = {node["NodeManagerAddress"]: _room(node) for node in ray.nodes() if node["Alive"]}
    each = [f"{name} with {cpus:g} CPU, {gpus:g} GPU" for name, (cpus, gpus) in alive.items()]
    return f"the Ray cluster's nodes are {'; '.join(each)}"


class NoDataset(Dataset[dict[str, Any]]):
    """veRL insists on a data set; where episodes start is decided by a `StartSampler`.

    One training step is one epoch of it.
    """

    def __init__(self, config: Any, **_: Any) -> None:
        self._length = int(config.train_batch_size)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Never read in training."""
        return {"raw_prompt": [], "index": index}
