"""``episodes.jsonl``: one line per completed episode, written as soon as it has ended.

The first line is a header with the conditions of the rollouts. A line is on the disk before the
next one is begun, so a killed process loses only the episodes that were running.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, NonNegativeInt
from typing_extensions import TypedDict

from verl_vla.core.errors import ConfigError
from verl_vla.core.files import recording
from verl_vla.core.json_files import (
    MOST_LINE_BYTES,
    keep_json_lines,
    read_json_lines,
    read_last_json_lines,
    require_regular,
    with_other_entries,
)
from verl_vla.core.success_rate import episode_entries
from verl_vla.core.tables import Trajectories
from verl_vla.core.text import differences
from verl_vla.policies.action_codec import ActionCodec
from verl_vla.rewards.goal_progress import goal_progress
from verl_vla.runs.run_dir import PlayedEpisode

EPISODE_LOG_FILE = "episodes.jsonl"
HEADER_START = b'{"header": {'
REMEDY = "remove that line, or restore the file from a copy"
REMEDY_FOR_KIND = "move it away"
BLOCK = 1 << 20
"""Bytes that are searched at a time for the end of a line."""


class KeptActions(TypedDict):
    """Actions of an episode, float32 as bytes."""

    shape: Annotated[list[NonNegativeInt], Field(min_length=3, max_length=3)]
    base64: str


@with_other_entries
class EpisodeLine(PlayedEpisode):
    """A line of the episode log; see `episode_lines`."""

    crash: str | None
    progress: list[float]
    actions: KeptActions | None
    executed: list[NonNegativeInt] | None


@with_other_entries
class TrainingLine(EpisodeLine):
    """A line of a training run's episode log; see `EpisodeRecorder`."""

    step: NonNegativeInt
    group: NonNegativeInt
    score: float | None


class HeaderLine(TypedDict):
    """The first line of the episode log."""

    header: dict[str, Any]


class EpisodeLog:
    """The episode log of one folder.

    Args:
        folder: folder of the log; created if missing.
        header: plain values that must be equal if the file exists already.

    Raises:
        ConfigError: the file has another header; the message names the differences.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        require_own(folder, header)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / EPISODE_LOG_FILE
        # before the first append, which would go on in the torn line
        if self._path.exists():
            _drop_torn_line(self._path)
        # empty where the torn line was the header itself
        if not self._path.exists() or not self._path.stat().st_size:
            self._write([{"header": header}])

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write lines and wait until they are on the disk.

        Raises:
            WriteError: the file cannot be written.
        """
        self._write(lines)

    def rewind(self, last_step: int) -> None:
        """Drop the episodes after a training step; a run that resumes repeats them."""
        with recording(self._path):
            keep_json_lines(
                self._path,
                TrainingLine,
                REMEDY,
                lambda line: line["step"] <= last_step,
                first=1,  # after the header
            )

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        with recording(self._path), self._path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            # flush reaches the kernel and fsync the disk, so that a power cut loses no line
            file.flush()
            os.fsync(file.fileno())


def require_own(folder: Path, header: Mapping[str, Any]) -> None:
    """Refuse a folder with an episode log of something else; nothing is written.

    Raises:
        ConfigError: the log has another header, which the message compares, or none.
    """
    path = folder / EPISODE_LOG_FILE
    if not path.exists():
        return
    require_regular(path, REMEDY_FOR_KIND)
    with path.open("rb") as file:
        first = file.readline(MOST_LINE_BYTES)
    if first.endswith(b"\n"):
        # as it was read back: JSON knows no tuples and no keys but strings
        _check_same(path, read_header(folder), json.loads(json.dumps(header)))
    # a killed process may have left a part of the header, and nothing else
    elif not (first.startswith(HEADER_START) or HEADER_START.startswith(first)):
        raise ConfigError(
            f"{path} was not written here: its first line is no header; choose another folder"
        )


def read_header(folder: Path) -> dict[str, Any]:
    """Read the header of the episode log of ``folder``.

    Raises:
        ConfigError: there is no episode log.
    """
    path = folder / EPISODE_LOG_FILE
    if not path.exists():
        raise ConfigError(
            f"{folder} holds no {EPISODE_LOG_FILE}; name the folder of a run or of eval"
        )
    lines = list(read_json_lines(path, HeaderLine, REMEDY, last=1))
    if not lines:
        raise ConfigError(f"{path} is empty, without a header; {REMEDY}")
    return lines[0]["header"]


def stream_episodes(
    folder: Path, line: type[EpisodeLine] = EpisodeLine, last_bytes: int | None = None
) -> Iterator[dict[str, Any]]:
    """Read the complete lines of an episode log one by one; see `read_episodes`."""
    path = folder / EPISODE_LOG_FILE
    if not path.exists():
        return
    # the first line is the header
    if last_bytes is None:
        yield from read_json_lines(path, line, REMEDY, first=1)
    else:
        yield from read_last_json_lines(path, line, REMEDY, last_bytes, first=1)


def read_episodes(
    folder: Path, line: type[EpisodeLine] = EpisodeLine, last_bytes: int | None = None
) -> list[dict[str, Any]]:
    """Read the complete lines of an episode log, in the order in which the episodes ended.

    A last line that is still being written is left out. The list is empty without an episode log.

    Args:
        folder: folder of the log.
        line: what each line must be; those of a training run are a `TrainingLine`.
        last_bytes: bytes of the newest lines that are read; None reads all.

    Raises:
        ConfigError: a line is damaged or no ``line``; gives its number.
    """
    return list(stream_episodes(folder, line, last_bytes))


def episode_lines(
    trajectories: Trajectories, codec: ActionCodec, with_actions: bool
) -> list[dict[str, Any]]:
    """Return a log line for each episode: how it began and ended, its progress and its actions.

    ``progress`` is the true progress before the first policy step and after each. ``actions``,
    float32 [policy steps, K, A] in simulator units, and ``executed`` suffice to replay the episode;
    both are None if not kept.
    """
    policy_steps = trajectories.policy_steps
    lines: list[dict[str, Any]] = []
    for row, entry in enumerate(episode_entries(trajectories)):
        of_episode = policy_steps.episode == row
        readings = trajectories.goals[row]
        line = entry | {
            # a simulator that was lost at its start has left no readings
            "progress": [round(float(p), 4) for p in goal_progress(readings)]
            if len(readings)
            else [],
            "actions": None,
            "executed": None,
        }
        if with_actions:
            actions = codec.to_simulator(policy_steps.action_tokens[of_episode])
            line["actions"] = {
                "shape": list(actions.shape),
                # float32 as bytes: shorter than decimal digits, and the same to the bit
                "base64": base64.b64encode(actions.tobytes()).decode(),
            }
            line["executed"] = policy_steps.executed[of_episode].tolist()
        lines.append(line)
    return lines


def actions_of(line: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """Decode the actions of an episode log's line, [policy steps, K, A] in simulator units.

    Raises:
        ConfigError: they were not kept.
    """
    if line["actions"] is None:
        raise ConfigError(
            f"the actions of episode {line['episode']} were not kept; a training run keeps those "
            "of trainer.keep_groups groups a step"
        )
    kept = line["actions"]
    return np.frombuffer(base64.b64decode(kept["base64"]), np.float32).reshape(kept["shape"])


def _check_same(path: Path, before: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    changed = differences(before, wanted)
    if changed:
        raise ConfigError(
            f"{path} holds episodes of something else ({'; '.join(changed)}); choose another "
            "folder, or use the same settings to resume"
        )


def _drop_torn_line(path: Path) -> None:
    """Remove an incomplete last line, which a killed process may leave."""
    with path.open("rb+") as file:
        end = whole = file.seek(0, os.SEEK_END)
        # from the end: the file may have gigabytes
        while whole:
            start = max(0, whole - BLOCK)
            file.seek(start)
            newline = file.read(whole - start).rfind(b"\n")
            if newline >= 0:
                whole = start + newline + 1
                break
            whole = start
        if whole < end:
            file.truncate(whole)
