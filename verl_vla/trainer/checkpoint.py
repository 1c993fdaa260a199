"""A run's checkpoints: written to a temporary folder, checksummed, then renamed.

``global_step_4/``          complete: its manifest has the size and SHA-256 of every file
``latest``                  a link to the newest, moved last
``unfinished/``             being written, or tried before the first step; a killed process leaves
                            it, the next one removes it
``global_step_6_corrupt/``  differs from its manifest; quarantined and never read
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from verl_vla.core.errors import CheckpointError, ContractError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LATEST = "latest"
UNFINISHED = "unfinished"
RUN_STATE = "run_state.pt"
BEFORE_TRAINING = 0
"""Step of the checkpoint that is tried before the first one."""

HASH_BLOCK = 2**20
"""Bytes read at a time; hashing them lets other threads run."""
HASH_THREADS = 8
"""Files hashed at the same time: SHA-256 runs at about 1.5 GB/s on a core, disks are faster."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of one training step; veRL reads the step from its name."""
    return checkpoints / f"global_step_{step}"


def complete_steps(checkpoints: Path) -> list[int]:
    """Training steps that have a whole checkpoint, in ascending order.

    A folder that somebody renamed to keep it, e.g. ``global_step_20_best``, is none of ours.
    """
    if not checkpoints.is_dir():
        return []
    steps = [
        manifest.parent.name.removeprefix("global_step_")
        for manifest in checkpoints.glob(f"global_step_*/{MANIFEST}")
    ]
    return sorted(int(step) for step in steps if step.isdecimal())


def unfinished_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder that a checkpoint is written to before it is complete."""
    return step_folder(checkpoints / UNFINISHED, step)


@contextmanager
def writing(checkpoints: Path, step: int) -> Generator[Path]:
    """Yield an empty folder to write a checkpoint to; it is complete when the context ends.

    Raises:
        CheckpointError: it could not be written; what was whole before still is.
    """
    unfinished = checkpoints / UNFINISHED
    try:
        # what a process left that was killed while it wrote
        _discard(unfinished)
        folder = unfinished_folder(checkpoints, step)
        folder.mkdir(parents=True)
        yield folder
        # manifest, rename, link: a crash between any two leaves the older checkpoints complete
        seal(folder, step)
        folder.rename(step_folder(checkpoints, step))
        # a rename outlives a power cut once the folder that holds the name is synced
        _flush(checkpoints)
        _point_latest(checkpoints, step)
        _discard(unfinished)
    # the reward's state cannot be saved: a fault of code, not of the disk
    except ContractError:
        raise
    except Exception as error:
        message = _why_not_written(checkpoints, step, error)
        shutil.rmtree(unfinished, ignore_errors=True)  # its bytes may be those that are missing
        raise CheckpointError(message) from error


def seal(folder: Path, step: int) -> None:
    """Write the manifest, once everything it names is on disk."""
    names = _files(folder)
    # folders too: the name of a new file is in its folder
    for path in folder.rglob("*"):
        _flush(path)
    hashes = _hash_all(folder, names)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": hashes[name]} for name in names
    }
    (folder / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1))
    _flush(folder / MANIFEST)
    _flush(folder)


@contextmanager
def trying(checkpoints: Path) -> Generator[Path]:
    """Yield an empty folder for a checkpoint of no training step, and remove it afterwards.

    It lies where an unfinished checkpoint does, so nothing takes it for one of a step, and the next
    start removes what a killed process leaves of it.
    """
    unfinished = checkpoints / UNFINISHED
    _discard(unfinished)
    folder = unfinished_folder(checkpoints, BEFORE_TRAINING)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def newest_valid(checkpoints: Path) -> int | None:
    """Return the newest step whose files match its manifest, and quarantine newer ones.

    Returns:
        None where there is no complete checkpoint.

    Raises:
        CheckpointError: there are checkpoints, and none is valid.
    """
    _discard(checkpoints / UNFINISHED)
    corrupt: dict[int, str] = {}
    for step in reversed(complete_steps(checkpoints)):
        fault = find_fault(step_folder(checkpoints, step))
        if fault is None:
            # only now that an older one takes over; where none is valid, all stay for repair
            for other, why in corrupt.items():
                _quarantine(step_folder(checkpoints, other), f"{why}; resuming from step {step}")
            # it may still name one of the quarantined
            _point_latest(checkpoints, step)
            return step
        corrupt[step] = fault
    if corrupt:
        faults = "; ".join(f"step {step}: {fault}" for step, fault in corrupt.items())
        raise CheckpointError(
            f"no checkpoint in {checkpoints} is valid ({faults}); restore one of them, remove the "
            "folder to train from the beginning, or choose another out=FOLDER"
        )
    return None


def find_fault(folder: Path) -> str | None:
    """Say how a checkpoint differs from its manifest, or None where it does not."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error!r})"
    found = set(_files(folder)) - {MANIFEST}
    if missing := sorted(expected.keys() - found):
        return f"{missing[0]} is missing"
    # sizes first: a truncated file is found without reading all the others
    for name, (size, _) in expected.items():
        if (actual := (folder / name).stat().st_size) != size:
            return f"{name} has {actual} bytes instead of {size}"
    hashes = _hash_all(folder, list(expected))
    for name, (_, sha256) in expected.items():
        if hashes[name] != sha256:
            return f"{name} has another SHA-256 than when it was written"
    return None


def remove_old(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` whole checkpoints, the manifest first."""
    for step in complete_steps(checkpoints)[:-keep]:
        folder = step_folder(checkpoints, step)
        # a crash after this leaves a folder that `complete_steps` does not count
        (folder / MANIFEST).unlink()
        shutil.rmtree(folder)


def save_run_state(folder: Path, state: dict[str, Any]) -> None:
    """Write what veRL does not: where the run stands in its starts, and the reward's state.

    Raises:
        ContractError: `load_run_state` could not read it back; said while it can be mended.
    """
    torch.save(state, folder / RUN_STATE)
    try:
        load_run_state(folder)
    except pickle.UnpicklingError as error:
        raise ContractError(
            f"{RUN_STATE} holds more than plain values and tensors, which a restart would refuse "
            f"to read; change the reward's state_dict ({error})"
        ) from error


def load_run_state(folder: Path) -> dict[str, Any]:
    """Read `save_run_state` without executing anything."""
    return torch.load(folder / RUN_STATE, weights_only=True)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _hash_all(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        hashes = threads.map(_sha256, [folder / name for name in names])
        return dict(zip(names, hashes, strict=True))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _point_latest(checkpoints: Path, step: int) -> None:
    partial = checkpoints / f"{LATEST}.tmp"
    # a process killed before replace() leaves it, and symlink_to() refuses an existing name
    partial.unlink(missing_ok=True)
    partial.symlink_to(step_folder(checkpoints, step).name)
    # atomic: there is no moment without a link
    partial.replace(checkpoints / LATEST)
    _flush(checkpoints)


def _quarantine(folder: Path, why: str) -> None:
    # this name is no step any more, so `complete_steps` leaves it out
    aside = folder.with_name(f"{folder.name}_corrupt")
    _discard(aside)
    folder.rename(aside)
    logger.error("CORRUPT CHECKPOINT %s: %s. It was renamed to %s", folder, why, aside.name)


def _why_not_written(checkpoints: Path, step: int, error: Exception) -> str:
    # of an error in a rank, the last line is the error itself
    lines = str(error).strip().splitlines() or [repr(error)]
    free = shutil.disk_usage(checkpoints if checkpoints.is_dir() else checkpoints.parent).free
    steps = complete_steps(checkpoints)
    kept = f"That of step {steps[-1]} is whole" if steps else "There is no other"
    return (
        f"the checkpoint of step {step} could not be written to {checkpoints} ({lines[-1]}; "
        f"{free / 2**20:.0f} MiB were left there). {kept}. Remove the cause, e.g. make room, and "
        "start the same command again"
    )


def _discard(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _flush(path: Path) -> None:
    # os.open also opens a folder, which Python's open() refuses
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
