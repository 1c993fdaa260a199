"""Trajectories on disk: one compressed file of plain arrays, written atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from verl_vla.core.tables import Episodes, PolicySteps, Trajectories

NO_IMAGE = np.zeros((0, 0, 0, 3), dtype=np.uint8)
"""Placeholder for a final image that was not rendered."""


def write_trajectories(file: Path, trajectories: Trajectories) -> None:
    """Write trajectories to ``file``, which never holds partial content."""
    tables: dict[str, npt.NDArray[Any]] = {}
    for table in (trajectories.episodes, trajectories.policy_steps):
        for f in fields(table):
            tables[f"{type(table).__name__}.{f.name}"] = getattr(table, f.name).numpy()
    tables |= _pack("prompt_ids", [prompt.numpy() for prompt in trajectories.prompt_ids])
    tables |= _pack("goals", trajectories.goals)
    tables |= _pack(
        "final_images", [NO_IMAGE if e is None else e for e in trajectories.final_images]
    )
    tables |= _pack("videos", trajectories.videos)
    # as text: an array of objects would be a pickle
    tables["crashes"] = np.array(json.dumps(trajectories.crashes))
    partial_file = file.with_suffix(".partial")
    # given a path, numpy would append .npz to the name
    with partial_file.open("wb") as stream:
        np.savez_compressed(stream, **tables)  # pyright: ignore[reportArgumentType]
    partial_file.replace(file)


def read_trajectories(file: Path) -> Trajectories:
    """Read a file of `write_trajectories`; nothing in it is executed (no pickles)."""
    with np.load(file, allow_pickle=False) as tables:

        def columns(table: type[Any]) -> dict[str, Tensor]:
            names = [f.name for f in fields(table)]
            return {name: torch.from_numpy(tables[f"{table.__name__}.{name}"]) for name in names}

        crashes: dict[str, str] = json.loads(str(tables["crashes"]))
        return Trajectories(
            episodes=Episodes(**columns(Episodes)),
            policy_steps=PolicySteps(**columns(PolicySteps)),
            prompt_ids=tuple(torch.from_numpy(ids) for ids in _unpack("prompt_ids", tables)),
            goals=tuple(_unpack("goals", tables)),
            final_images=tuple(e if e.size else None for e in _unpack("final_images", tables)),
            videos=tuple(_unpack("videos", tables)),
            # JSON's keys are strings
            crashes={int(key): why for key, why in crashes.items()},
        )


def _pack(name: str, arrays: Sequence[npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Store arrays of different shapes as one flat array and a table of shapes."""
    flat = np.concatenate([a.ravel() for a in arrays]) if arrays else np.zeros(0)
    return {name: flat, f"{name}.shape": np.array([a.shape for a in arrays], dtype=np.int64)}


def _unpack(name: str, tables: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    shapes = tables[f"{name}.shape"]
    ends = np.cumsum([np.prod(shape, dtype=np.int64) for shape in shapes])
    parts = np.split(tables[name], ends[:-1]) if len(shapes) else []
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
