"""LIBERO's own layout: what a file holds, and that it appears whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from verl_vla.core.errors import ConfigError
from verl_vla.datasets.demo_file import check_recording
from verl_vla.datasets.libero_writer import LiberoEpisode, write_libero_file

AGENTVIEW = "obs/agentview_rgb"
SETTINGS = {"seed": 11, "noise": 0.3}


def episode(seed: int, num_steps: int = 5, every: int = 1) -> LiberoEpisode:
    rng = np.random.default_rng(seed)
    rendered = np.arange(num_steps) % every == 0
    return LiberoEpisode(
        task_id=2,
        attributes={"env_args": "{}", "macros_image_convention": "opengl"},
        model_file="<mujoco/>" * 20_000,
        actions=rng.uniform(-1, 1, (num_steps, 7)),
        states=rng.normal(size=(num_steps, 12)),
        disturbed=np.arange(num_steps) == 1,
        robot_states=rng.normal(size=(num_steps, 9)),
        proprio={
            "obs/ee_pos": rng.normal(size=(num_steps, 3)),
            "obs/joint_states": rng.normal(size=(num_steps, 7)),
        },
        rendered=rendered,
        images={
            AGENTVIEW: rng.integers(1, 256, (int(rendered.sum()), 6, 6, 3), dtype=np.uint8),
        },
    )


def test_a_file_holds_what_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "lift_the_can_demo.hdf5"
    episodes = [episode(0), episode(1, 9)]
    write_libero_file(path, iter(episodes), SETTINGS)
    with h5py.File(path) as file:
        data = file["data"]
        assert list(data) == ["demo_0", "demo_1"]
        assert data.attrs["num_demos"] == 2
        assert data.attrs["total"] == 14
        assert data.attrs["macros_image_convention"] == "opengl"
        for group, made in zip(data.values(), episodes, strict=True):
            for name in ("actions", "states", "robot_states"):
                assert np.array_equal(group[name], getattr(made, name))
                assert group[name].dtype == np.float64
            for name, values in (made.proprio | made.images).items():
                assert np.array_equal(group[name], values)
                assert group[name].dtype == values.dtype
            for name in ("rewards", "dones"):
                assert group[name][()].tolist() == [0] * (made.num_steps - 1) + [1]
                assert group[name].dtype == np.uint8
            assert group.attrs["num_samples"] == made.num_steps
            assert group.attrs["model_file"] == made.model_file
            assert np.array_equal(group.attrs["init_state"], made.states[0])


def test_a_recording_that_breaks_off_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "a_demo.hdf5"
    write_libero_file(path, iter([episode(0)]), SETTINGS)
    before = path.read_bytes()

    def breaks_off() -> Iterator[LiberoEpisode]:
        yield episode(1)
        raise RuntimeError("the simulator is gone")

    with pytest.raises(RuntimeError, match="gone"):
        write_libero_file(path, breaks_off(), SETTINGS)
    assert path.read_bytes() == before


def test_rows_without_images_are_black_and_take_no_room(tmp_path: Path) -> None:
    path = tmp_path / "a_demo.hdf5"
    made = episode(0, num_steps=9, every=4)
    write_libero_file(path, iter([made]), SETTINGS)
    with h5py.File(path) as file:
        images = file["data/demo_0"][AGENTVIEW]
        assert np.array_equal(images[[0, 4, 8]], made.images[AGENTVIEW])
        assert not images[[1, 2, 3, 5, 6, 7]].any()
        assert images.id.get_num_chunks() == 3
        assert file["data/demo_0/rendered"][()].tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 1]
        assert file["data/demo_0/disturbed"][()].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0]


def test_a_file_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a_demo.hdf5"
    write_libero_file(path, iter([episode(0)]), SETTINGS)
    check_recording(path, SETTINGS)
    with pytest.raises(ConfigError, match=r"recorded with noise 0.3, not 0.1; name another --out"):
        check_recording(path, SETTINGS | {"noise": 0.1})
    with pytest.raises(ConfigError, match=r"recorded with every unset, not 2"):
        check_recording(path, SETTINGS | {"every": 2})
    with h5py.File(path, "a") as file:
        del file["data"].attrs["recording"]
    with pytest.raises(ConfigError, match="was not recorded here"):
        check_recording(path, SETTINGS)
    path.write_bytes(b"no HDF5")
    with pytest.raises(ConfigError, match="is broken"):
        check_recording(path, SETTINGS)
