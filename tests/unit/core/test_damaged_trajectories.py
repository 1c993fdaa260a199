"""Trajectories on disk that somebody damaged: refused by file and reason, nothing executed."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_world import make_trajectories

from verl_vla.core import trajectory_io
from verl_vla.core.errors import ConfigError
from verl_vla.core.trajectory_io import read_trajectories, write_trajectories
from verl_vla.rewards.benchmark import played_with, read_rounds
from verl_vla.rewards.benchmark.episodes import GROUPS_PER_ROUND, PLAYED_FILE, round_file

Tables = dict[str, Any]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = round_file(tmp_path, 0)
    write_trajectories(path, make_trajectories())
    return path


def tables_of(file: Path) -> Tables:
    with np.load(file) as stored:
        return dict(stored)


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Tables], None]:
    def damage(tables: Tables) -> None:
        tables[name] = change(tables[name])

    return damage


def with_value(value: Any) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array.flat[0] = value
        return array

    return change


DAMAGED: dict[str, tuple[Callable[[Tables], None], str]] = {
    "a column missing": (lambda t: t.pop("Episodes.task_id"), r"Episodes\.task_id"),
    "text": (changed("Episodes.task_id", lambda a: a.astype(str)), "numpy.str_"),
    "objects": (changed("Episodes.task_id", lambda a: a.astype(object)), "allow_pickle=False"),
    "floats": (changed("Episodes.task_id", lambda a: a.astype(float)), r"must be torch\.int64"),
    "a row short": (changed("Episodes.task_id", lambda a: a[1:]), "earlier columns say"),
    "another outcome": (changed("Episodes.outcome", with_value(7)), r"none of \[0, 1, 2\]"),
    "NaN": (changed("PolicySteps.log_probs", with_value(np.nan)), "log_probs is not finite"),
    "no chunk": (changed("PolicySteps.executed", with_value(0)), "executed holds 0, less than 1"),
    "negative steps": (changed("Episodes.num_steps", with_value(-3)), "num_steps holds -3"),
    "wrong row": (changed("PolicySteps.episode", with_value(999)), "points at row 999"),
    "shapes of more": (changed("goals.shape", lambda a: a * 2), "cannot reshape|goals"),
    "negative shapes": (changed("goals.shape", lambda a: -a), "unknown dimension|reshape|negative"),
    "goals of doubles": (changed("goals", lambda a: a.astype(float)), "goals holds float64"),
    "prompts of floats": (
        changed("prompt_ids", lambda a: a.astype("f4")),
        "prompt_ids holds float",
    ),
    "crashes of a list": (changed("crashes", lambda _: np.array("[]")), r"crashes are \[\]"),
    "crashes of no JSON": (changed("crashes", lambda _: np.array("{")), "Expecting property name"),
    "crashes of words": (changed("crashes", lambda _: np.array('{"a": "b"}')), "invalid literal"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_trajectories_are_refused_by_file_and_reason(
    file: Path, damage: Callable[[Tables], object], message: str
) -> None:
    tables = tables_of(file)
    damage(tables)
    np.savez_compressed(file, **tables)
    with pytest.raises(ConfigError, match=rf"round_0000\.npz cannot be read as .*({message})"):
        read_trajectories(file)
    with pytest.raises(ConfigError, match="remove the file to play its episodes again"):
        read_rounds(file.parent, GROUPS_PER_ROUND)


def test_a_file_that_is_no_archive_or_is_cut_off_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for content in (b"", b"no archive", whole[:-40], whole[: len(whole) // 2], whole[40:]):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="cannot be read as trajectories"):
            read_trajectories(file)


def test_a_flipped_byte_is_found(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        start = next(i.header_offset for i in archive.infolist() if "image" in i.filename)
    whole[start + 200] ^= 0xFF
    file.write_bytes(whole)
    with pytest.raises(ConfigError, match="cannot be read as trajectories"):
        read_trajectories(file)


def test_what_unpacks_to_too_much_is_not_unpacked(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectory_io, "MOST_BYTES", 1000)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(ConfigError, match="it unpacks to"):
        read_trajectories(file)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(ConfigError, match="is a pipe or a device"):
        read_trajectories(tmp_path / "pipe.npz")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'"x"'])
def test_damaged_settings_of_a_benchmark_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / PLAYED_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{PLAYED_FILE}: it is .*; play the episodes again"):
        played_with(tmp_path)


def test_rounds_of_other_groups_are_not_measured(file: Path) -> None:
    trajectories = make_trajectories()
    episodes = trajectories.episodes
    other = replace(episodes, group_id=episodes.group_id + 1)
    write_trajectories(file, replace(trajectories, episodes=other))
    with pytest.raises(ConfigError, match=r"holds no episodes of group 0, and played.json says"):
        read_rounds(file.parent, GROUPS_PER_ROUND)
