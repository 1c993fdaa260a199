"""Which checkpoint of a run is whole.

A checkpoint is a folder ``global_step_N``. Its last file to be written is a marker, put in place
by a rename: a folder without it was cut short and is never read.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from verl_vla.errors import ContractError

MARKER = "COMPLETE.json"
RUN_STATE = "run_state.pt"


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
        marker.parent.name.removeprefix("global_step_")
        for marker in checkpoints.glob(f"global_step_*/{MARKER}")
    ]
    return sorted(int(step) for step in steps if step.isdecimal())


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


def mark_complete(folder: Path, step: int) -> None:
    """Declare a checkpoint whole, once everything in it is on disk."""
    for path in folder.rglob("*"):
        _flush(path)
    partial = folder / f"{MARKER}.tmp"
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    partial.write_text(json.dumps({"step": step, "files": files}, indent=1))
    _flush(partial)
    partial.replace(folder / MARKER)
    _flush(folder)


def remove_old(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` whole checkpoints, the marker first."""
    for step in complete_steps(checkpoints)[:-keep]:
        folder = step_folder(checkpoints, step)
        (folder / MARKER).unlink()
        shutil.rmtree(folder)


def discard_partial(folder: Path) -> None:
    """Remove what a killed process left of the checkpoint that is about to be written."""
    if folder.exists():
        shutil.rmtree(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
