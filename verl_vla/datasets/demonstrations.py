"""Demonstrations, and the file format that stores them.

A file is an ``.npz`` that numpy can read. Each episode has its own members, so one episode can be
read without the others.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from verl_vla.core.errors import ConfigError

HEADER = "header"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """One episode; F images, S steps."""

    task_id: int
    instruction: str
    images: npt.NDArray[np.uint8]
    """[F, V, H, W, 3], as the policy sees them."""
    frame_steps: npt.NDArray[np.int64]
    """[F], index of the action that follows each image."""
    actions: npt.NDArray[np.float32]
    """[S, A], the expert's actions, simulator units; at least ``horizon`` after each image."""
    num_steps: int
    """Steps until the success, or until a biased expert missed."""


class DemonstrationFile:
    """Episodes in a file, read one at a time; a context manager and a sequence."""

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            ConfigError: there is no such file, or it holds something else.
        """
        if not path.is_file():
            raise ConfigError(f"there are no demonstrations at {path}; record some with `demos`")
        try:
            self._members: Any = np.load(path, allow_pickle=False)
            header = json.loads(str(self._members[HEADER]))
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{path} holds no demonstrations: {error}") from error
        self.suite: str = header["suite"]
        self.horizon: int = header["horizon"]
        self.render_size: int = header["render_size"]
        self._episodes: list[dict[str, Any]] = header["episodes"]

    def __enter__(self) -> DemonstrationFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._members.close()

    def __len__(self) -> int:
        return len(self._episodes)

    def __getitem__(self, index: int) -> Demonstration:
        # as a list takes an index: negative from the end, IndexError beyond, which iteration needs
        name = _member(range(len(self))[index])
        return Demonstration(
            **self._episodes[index],
            images=self._members[f"{name}/images"],
            frame_steps=self._members[f"{name}/frame_steps"],
            actions=self._members[f"{name}/actions"],
        )

    def __iter__(self) -> Iterator[Demonstration]:
        return (self[index] for index in range(len(self)))


def write(
    path: Path,
    demonstrations: Iterator[Demonstration],
    *,
    suite: str,
    horizon: int,
    render_size: int,
) -> None:
    """Write demonstrations as they arrive; the file gets its name when it is complete."""
    partial_file = path.with_suffix(".partial")
    episodes: list[dict[str, Any]] = []
    with zipfile.ZipFile(partial_file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for index, demonstration in enumerate(demonstrations):
            name = _member(index)
            _write_member(archive, f"{name}/images", demonstration.images)
            _write_member(archive, f"{name}/frame_steps", demonstration.frame_steps)
            _write_member(archive, f"{name}/actions", demonstration.actions)
            episodes.append(
                {
                    "task_id": demonstration.task_id,
                    "instruction": demonstration.instruction,
                    "num_steps": demonstration.num_steps,
                }
            )
        header = {
            "suite": suite,
            "horizon": horizon,
            "render_size": render_size,
            "episodes": episodes,
        }
        # last, since it describes what was written before it
        _write_member(archive, HEADER, np.array(json.dumps(header)))
    partial_file.replace(path)


def _member(index: int) -> str:
    return f"episode_{index:05d}"


def _write_member(archive: zipfile.ZipFile, name: str, array: npt.NDArray[Any]) -> None:
    # the member's size is not known before it is written, and may be beyond 2 GiB
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)
