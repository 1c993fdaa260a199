"""Place ranks on cores; veRL's data set is not used."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset
from verl.single_controller.ray import RayResourcePool, ResourcePoolManager


class CorePoolManager(ResourcePoolManager):
    """Resource pools of processes without an accelerator."""

    def create_resource_pool(self) -> None:
        """One bundle of one core for each rank."""
        for name, processes in self.resource_pool_spec.items():
            self.resource_pool_dict[name] = RayResourcePool(
                processes, use_gpu=False, max_colocate_count=1, name_prefix=name
            )


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
