"""LIBERO's own layout: what a file holds, and that it appears whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from verl_vla.datasets.libero_writer import LiberoEpisode, write_libero_file


def episode(seed: int, num_steps: int = 5) -> LiberoEpisode:
    rng = np.random.default_rng(seed)
    return LiberoEpisode(
        task_id=2,
        attributes={"env_args": "{}", "macros_image_convention": "opengl"},
        model_file="<mujoco/>" * 20_000,
        actions=rng.uniform(-1, 1, (num_steps, 7)),
        states=rng.normal(size=(num_steps, 12)),
        robot_states=rng.normal(size=(num_steps, 9)),
        obs={
            "agentview_rgb": rng.integers(0, 256, (num_steps, 6, 6, 3), dtype=np.uint8),
            "ee_pos": rng.normal(size=(num_steps, 3)),
        },
    )


def test_a_file_holds_what_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "lift_the_can_demo.hdf5"
    episodes = [episode(0), episode(1, 9)]
    write_libero_file(path, iter(episodes))
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
            for name, values in made.obs.items():
                assert np.array_equal(group[f"obs/{name}"], values)
                assert group[f"obs/{name}"].dtype == values.dtype
            for name in ("rewards", "dones"):
                assert group[name][()].tolist() == [0] * (made.num_steps - 1) + [1]
                assert group[name].dtype == np.uint8
            assert group.attrs["num_samples"] == made.num_steps
            assert group.attrs["model_file"] == made.model_file
            assert np.array_equal(group.attrs["init_state"], made.states[0])


def test_a_recording_that_breaks_off_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "a_demo.hdf5"
    write_libero_file(path, iter([episode(0)]))
    before = path.read_bytes()

    def breaks_off() -> Iterator[LiberoEpisode]:
        yield episode(1)
        raise RuntimeError("the simulator is gone")

    with pytest.raises(RuntimeError, match="gone"):
        write_libero_file(path, breaks_off())
    assert path.read_bytes() == before
