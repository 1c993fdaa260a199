"""The file that demonstrations are kept in."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from verl_vla.core.errors import ConfigError
from verl_vla.datasets.demonstrations import Demonstration, DemonstrationFile, write


def demonstration(task_id: int = 3, num_frames: int = 4) -> Demonstration:
    rng = np.random.default_rng(task_id)
    return Demonstration(
        task_id=task_id,
        instruction=f"do number {task_id}",
        images=rng.integers(0, 256, (num_frames, 1, 6, 6, 3), dtype=np.uint8),
        frame_steps=np.arange(num_frames) * 2,
        actions=rng.uniform(-1, 1, (2 * num_frames + 8, 7)).astype(np.float32),
        num_steps=2 * num_frames,
    )


def same(a: Demonstration, b: Demonstration) -> bool:
    return (a.task_id, a.instruction, a.num_steps) == (b.task_id, b.instruction, b.num_steps) and (
        all(
            np.array_equal(getattr(a, name), getattr(b, name))
            and getattr(a, name).dtype == getattr(b, name).dtype
            for name in ("images", "frame_steps", "actions")
        )
    )


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "demos.npz"
    write(
        path,
        iter([demonstration(3), demonstration(5, 7)]),
        suite="mini",
        horizon=8,
        render_size=128,
    )
    return path


def test_a_file_gives_back_what_was_written(written: Path) -> None:
    with DemonstrationFile(written) as file:
        assert (file.suite, file.horizon, len(file)) == ("mini", 8, 2)
        assert same(file[0], demonstration(3))
        assert same(file[-1], demonstration(5, 7))
        assert [d.task_id for d in file] == [3, 5]
        with pytest.raises(IndexError):
            file[2]


def test_reading_an_episode_reads_no_other(written: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.npz"
    with zipfile.ZipFile(written) as source, zipfile.ZipFile(broken, "w") as target:
        for name in source.namelist():
            is_first = name.startswith("episode_00000")
            target.writestr(name, b"\x93NUMPY rubbish" if is_first else source.read(name))
    with DemonstrationFile(broken) as file:
        assert same(file[1], demonstration(5, 7))
        with pytest.raises(ValueError):
            file[0]


def test_numpy_alone_can_read_a_file(written: Path) -> None:
    with np.load(written, allow_pickle=False) as members:
        header = json.loads(str(members["header"]))
        assert header["episodes"][1]["instruction"] == "do number 5"
        assert members["episode_00001/images"].shape == (7, 1, 6, 6, 3)


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "demos.npz"

    def interrupted() -> Iterator[Demonstration]:
        yield demonstration()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, interrupted(), suite="mini", horizon=8, render_size=128)
    assert not path.exists()


def test_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no demonstrations at .*missing\.npz; record some"):
        DemonstrationFile(tmp_path / "missing.npz")
    np.savez(tmp_path / "other.npz", states=np.zeros(3))
    (tmp_path / "text.npz").write_text("rubbish")
    for name in ("other.npz", "text.npz"):
        with pytest.raises(ConfigError, match="holds no demonstrations"):
            DemonstrationFile(tmp_path / name)
