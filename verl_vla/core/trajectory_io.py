"""Trajectories on disk: one compressed file of plain arrays, written atomically."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from verl_vla.core.episode import Outcome
from verl_vla.core.errors import ConfigError
from verl_vla.core.json_files import require_regular
from verl_vla.core.tables import Episodes, PolicySteps, Trajectories
from verl_vla.core.text import shorten

NO_IMAGE = np.zeros((0, 0, 0, 3), dtype=np.uint8)
"""Placeholder for a final image that was not rendered."""
REMEDY = "remove the file to play its episodes again, or restore it"
MOST_BYTES = 1 << 34
"""Most bytes of the arrays of a file, unpacked; a round of the largest recipe with videos has some
3 GB."""


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
    """Read a file of `write_trajectories`; nothing in it is executed (no pickles).

    Raises:
        ConfigError: it cannot be read, is damaged, or holds what no rollout writes.
    """
    require_regular(file, REMEDY)
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
        # a few kilobytes may unpack to more than any memory has
        if unpacked > MOST_BYTES:
            raise _RefusedError(f"it unpacks to {unpacked >> 30} GiB, over {MOST_BYTES >> 30}")
        trajectories = _read(file)
        _check_values(trajectories)
    except Exception as error:  # a damaged file fails in too many ways to name
        reason = shorten(str(error) or repr(error))
        raise ConfigError(f"{file} cannot be read as trajectories ({reason}); {REMEDY}") from error
    return trajectories


class _RefusedError(ValueError):
    """A file that is refused for a known reason."""


def _check_values(trajectories: Trajectories) -> None:
    """Refuse values that the tables' types allow and no rollout gives."""
    episodes, steps = trajectories.episodes, trajectories.policy_steps
    known = torch.tensor(list(Outcome))
    if not torch.isin(episodes.outcome, known).all():
        raise _RefusedError(f"an outcome is none of {known.tolist()}")
    for name in ("log_probs", "proprio"):
        if not getattr(steps, name).isfinite().all():
            raise _RefusedError(f"a value of {name} is not finite")
    for name, least in (("num_steps", 0), ("executed", 1)):
        column = getattr(episodes if name == "num_steps" else steps, name)
        if len(column) and int(column.min()) < least:
            raise _RefusedError(f"{name} holds {int(column.min())}, less than {least}")
    kinds = (
        ("prompt_ids", [ids.numpy() for ids in trajectories.prompt_ids], "i8", 1),
        ("goals", trajectories.goals, "f4", 3),
        ("final_images", [e for e in trajectories.final_images if e is not None], "u1", 4),
        ("videos", trajectories.videos, "u1", 4),
    )
    for name, arrays, dtype, dims in kinds:
        for array in arrays:
            if array.dtype != np.dtype(dtype) or array.ndim != dims:
                raise _RefusedError(f"{name} holds {array.dtype} {list(array.shape)}")


def _read(file: Path) -> Trajectories:
    with np.load(file, allow_pickle=False) as tables:

        def columns(table: type[Any]) -> dict[str, Tensor]:
            names = [f.name for f in fields(table)]
            return {name: torch.from_numpy(tables[f"{table.__name__}.{name}"]) for name in names}

        crashes: object = json.loads(str(tables["crashes"]))
        if not isinstance(crashes, dict):
            raise _RefusedError(f"crashes are {crashes!r}")
        return Trajectories(
            episodes=Episodes(**columns(Episodes)),
            policy_steps=PolicySteps(**columns(PolicySteps)),
            prompt_ids=tuple(torch.from_numpy(ids) for ids in _unpack("prompt_ids", tables)),
            goals=tuple(_unpack("goals", tables)),
            final_images=tuple(e if e.size else None for e in _unpack("final_images", tables)),
            videos=tuple(_unpack("videos", tables)),
            # JSON's keys are strings
            crashes={int(key): str(why) for key, why in cast("Any", crashes).items()},
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
