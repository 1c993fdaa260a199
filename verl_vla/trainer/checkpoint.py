"""A run's checkpoints: written to a temporary folder, checksummed, then renamed.

``global_step_4/``          complete: its manifest has the size and SHA-256 of every file
``latest``                  a link to the newest, moved last
``unfinished/``             being written or removed, or tried before the first step; a killed
                            process leaves it, the next one removes it
``global_step_6_corrupt/``  has no manifest or differs from it; quarantined and never read
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
from pydantic import NonNegativeInt

from verl_vla.core.errors import CheckpointError, ConfigError, ContractError
from verl_vla.core.json_files import Entries, read_json

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

REMEDY = (
    "restore one of them, remove the folder to train from the beginning, or choose another "
    "out=FOLDER"
)
"""Remedy for checkpoints of which none is valid."""


class ManifestEntry(Entries):
    """What a manifest says of a file."""

    bytes: NonNegativeInt
    sha256: str


class Manifest(Entries):
    """Content of `MANIFEST`."""

    step: NonNegativeInt
    files: dict[str, ManifestEntry]


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of one training step; veRL reads the step from its name."""
    return checkpoints / f"global_step_{step}"


def complete_steps(checkpoints: Path) -> list[int]:
    """Training steps that have a checkpoint with a manifest, in ascending order."""
    return [
        step
        for step in _found_steps(checkpoints)
        if (step_folder(checkpoints, step) / MANIFEST).exists()
    ]


def _found_steps(checkpoints: Path) -> list[int]:
    """Training steps that have a folder, complete or not, in ascending order.

    A folder that somebody renamed to keep it, e.g. ``global_step_20_best``, is none of ours.
    """
    if not checkpoints.is_dir():
        return []
    steps = [path.name.removeprefix("global_step_") for path in checkpoints.glob("global_step_*")]
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
        complete = step_folder(checkpoints, step)
        # nobody counts on it: a run resumes from the newest step and writes later ones
        if os.path.lexists(complete):
            _quarantine(complete, f"step {step} was trained and saved again")
        folder.rename(complete)
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
        None where there is no checkpoint.

    Raises:
        CheckpointError: there are checkpoints, or there were, and none is valid.
    """
    _require_places(checkpoints)
    _discard(checkpoints / UNFINISHED)
    corrupt: dict[int, str] = {}
    for step in reversed(_found_steps(checkpoints)):
        fault = find_fault(step_folder(checkpoints, step))
        if fault is None:
            # only now that an older one takes over; where none is valid, all stay for repair
            for other, why in corrupt.items():
                _quarantine(step_folder(checkpoints, other), f"{why}; resuming from step {step}")
            _remove(checkpoints, _remains(checkpoints))
            # it may still name one of the quarantined
            _point_latest(checkpoints, step)
            return step
        corrupt[step] = fault
    if corrupt:
        faults = "; ".join(f"step {step}: {fault}" for step, fault in corrupt.items())
        raise CheckpointError(f"no checkpoint in {checkpoints} is valid ({faults}); {REMEDY}")
    link = checkpoints / LATEST
    if link.is_symlink():
        raise CheckpointError(
            f"{link} names {link.readlink()}, which is not there, nor is any other checkpoint; "
            f"{REMEDY}"
        )
    return None


def _require_places(checkpoints: Path) -> None:
    """Refuse a file where a folder belongs, and a folder where a file belongs.

    Raises:
        CheckpointError: with its path.
    """
    if checkpoints.is_symlink() and not checkpoints.exists():
        raise CheckpointError(
            f"{checkpoints} is a link to {checkpoints.readlink()}, which is not there; mount or "
            "restore it, or remove the link to train from the beginning"
        )
    if checkpoints.exists() and not checkpoints.is_dir():
        raise CheckpointError(f"{checkpoints} is a file, and must be a folder; move it away")
    link = checkpoints / LATEST
    if link.is_dir() and not link.is_symlink():
        raise CheckpointError(
            f"{link} is a folder, and must be a link to the newest checkpoint; move it away"
        )


def find_fault(folder: Path) -> str | None:
    """Say how a checkpoint differs from its manifest, or None where it does not."""
    try:
        return _compare(folder)
    # a disk that fails, or files of another user
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"


def _compare(folder: Path) -> str | None:
    if not folder.is_dir():
        return "it is a file, and must be a folder"
    if not (folder / MANIFEST).exists():
        return f"{MANIFEST} is missing"
    try:
        manifest = read_json(folder / MANIFEST, Manifest, "restore it from a copy")
    except ConfigError as error:
        return f"{MANIFEST} cannot be read ({error})"
    if folder.name != step_folder(folder.parent, manifest.step).name:
        return f"{MANIFEST} is that of step {manifest.step}"
    if not manifest.files:
        return f"{MANIFEST} names no file"
    return _compare_files(folder, manifest)


def _compare_files(folder: Path, manifest: Manifest) -> str | None:
    found = set(_files(folder)) - {MANIFEST}
    if missing := sorted(manifest.files.keys() - found):
        what = "a folder, and must be a file" if (folder / missing[0]).is_dir() else "missing"
        return f"{missing[0]} is {what}"
    # sizes first: a truncated file is found without reading all the others
    for name, entry in manifest.files.items():
        if (actual := (folder / name).stat().st_size) != entry.bytes:
            return f"{name} has {actual} bytes instead of {entry.bytes}"
    hashes = _hash_all(folder, list(manifest.files))
    for name, entry in manifest.files.items():
        if hashes[name] != entry.sha256:
            return f"{name} has another SHA-256 than when it was written"
    return None


def remove_old(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` complete checkpoints."""
    _remove(checkpoints, [*_remains(checkpoints), *complete_steps(checkpoints)[:-keep]])


def _remains(checkpoints: Path) -> list[int]:
    """Steps before the newest complete one that have a folder without a manifest.

    Earlier versions left them where they were killed while they removed a checkpoint.
    """
    complete = complete_steps(checkpoints)
    return [
        step
        for step in _found_steps(checkpoints)
        if complete and step < complete[-1] and step not in complete
    ]


def _remove(checkpoints: Path, steps: list[int]) -> None:
    for step in steps:
        # first out of the way: a folder that a kill leaves half removed is then none of a step
        leaving = unfinished_folder(checkpoints, step)
        leaving.parent.mkdir(exist_ok=True)
        _discard(leaving)
        step_folder(checkpoints, step).rename(leaving)
        _discard(leaving)
    unfinished = checkpoints / UNFINISHED
    # a checkpoint may be tried there
    if unfinished.is_dir() and not any(unfinished.iterdir()):
        unfinished.rmdir()


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
    _discard(partial)
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


def _discard(path: Path) -> None:
    # a link is removed, not what it names: that may be somebody's disk
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _flush(path: Path) -> None:
    # os.open also opens a folder, which Python's open() refuses
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
