"""One checkpoint before the first training step: written, read back and removed.

A run saves for the first time after hours. A disk, a quota or a memory that is too small for it is
found here within minutes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ray.exceptions import OutOfMemoryError, RayActorError

from verl_vla.core.errors import ConfigError, ContractError
from verl_vla.core.files import free_bytes
from verl_vla.core.text import format_seconds
from verl_vla.runs.disk_space import GB, require_disk_space, tree_bytes
from verl_vla.trainer import checkpoint

logger = logging.getLogger(__name__)

OF_THE_DISK = "Make room, lift a quota, or choose out=FOLDER on another disk"
OF_THE_MEMORY = (
    "Run verl-vla plan with the same words: it prints the memory that saving and resuming take, on "
    "a GPU and on the host. Then take a larger machine, or a recipe that needs less, such as "
    "policy.lora_rank=16"
)
"""Remedies."""


def check_save(
    checkpoints: Path,
    *,
    save: Callable[[Path], None],
    load: Callable[[Path], None],
    disk: Mapping[str, int],
    most_checkpoints: int,
) -> None:
    """Write, read and remove a checkpoint of the run's own size.

    Args:
        checkpoints: folder of the run's checkpoints.
        save: writes a checkpoint into a folder, as after a training step.
        load: reads it, as a resumed run does.
        disk: of `verl_vla.runs.disk_space.disk_bytes`.
        most_checkpoints: number of checkpoints that the run's folder holds at one time.

    Raises:
        ConfigError: it cannot be written or read, or there is no room for as many of its size.
        ContractError: the reward has a state that cannot be saved.
    """
    planned = disk["checkpoints"] // most_checkpoints
    doing, size, free = "written to", 0, free_bytes(checkpoints)
    times = [time.perf_counter()]
    try:
        with checkpoint.trying(checkpoints) as folder:
            try:
                save(folder)
                checkpoint.seal(folder, checkpoint.BEFORE_TRAINING)
                times.append(time.perf_counter())
                doing = "read back from"
                fault = checkpoint.find_fault(folder)
                if fault is not None:
                    raise OSError(fault)
                load(folder)
                times.append(time.perf_counter())
            finally:
                # before it is removed
                size, free = tree_bytes(folder), free_bytes(checkpoints)
    # a fault of the reward's code, not of the machine
    except ContractError:
        raise
    except Exception as error:
        raise ConfigError(
            f"trainer.check_save: a checkpoint could not be {doing} {checkpoints} before the first "
            f"training step ({_reason(error)}): {size / GB:.2f} GB of at most {planned / GB:.2f} "
            f"GB were written, and {free / GB:.2f} GB were left. {_remedy(error)}. "
            "With trainer.check_save=false the run trains until its first checkpoint, and fails "
            "then"
        ) from error
    write_s, read_s = (after - before for before, after in zip(times, times[1:], strict=False))
    logger.info(
        "checkpoint check: %.2f GB, planned at most %.2f, were written in %s, read in %s and "
        "removed",
        size / GB,
        planned / GB,
        format_seconds(write_s),
        format_seconds(read_s),
    )
    # what was planned had room when the run started; somebody else may have written since
    require_disk_space(checkpoints.parent, {**disk, "checkpoints": most_checkpoints * size})


def _reason(error: Exception) -> str:
    if isinstance(error, RayActorError):
        return f"a learner process died: {' '.join(str(error).split())}"
    # of an error in a rank, the last line is the error itself
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[-1]


def _remedy(error: Exception) -> str:
    # a process that asks for too much of the host's memory is ended by the system
    is_lost = isinstance(error, RayActorError | OutOfMemoryError)
    return OF_THE_MEMORY if is_lost or "out of memory" in str(error).lower() else OF_THE_DISK
