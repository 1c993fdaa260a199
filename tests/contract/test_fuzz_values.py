"""Files of users with other values in their fields: usable as read, or refused by name."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from bench_world import make_trajectories
from damage import inputs, is_read
from hypothesis import given
from hypothesis import strategies as st
from sft_world import TASKS, write_demos

from verl_vla.config.compose import load_recipe
from verl_vla.config.sft import DemoChoice
from verl_vla.core.errors import ConfigError
from verl_vla.core.trajectory_io import read_trajectories, write_trajectories
from verl_vla.datasets.demo_file import LARGEST_ACTION
from verl_vla.datasets.libero_reader import FrameReader, demo_file, read_demos
from verl_vla.envs.registry import suite

MINI = suite("mini")


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demos(tmp_path_factory.mktemp("demos"))


def check_demos(folder: Path) -> None:
    """Read demonstrations with all their images; what is read can be trained on."""
    file = demo_file(folder, MINI.task(TASKS[0]).name)

    def read() -> bool:
        learned, _ = read_demos(folder, MINI, TASKS[:1], DemoChoice())
        frames = FrameReader()
        try:
            for demo in learned:
                assert demo.actions.shape == (len(demo.steps), 7)
                assert len(demo.steps)
                assert np.abs(demo.own_actions).max(initial=0) <= LARGEST_ACTION
                for index in range(0, len(demo.steps), 5):
                    image = frames.read(demo, index)
                    assert image.shape == (demo.render_size, demo.render_size, 3)
                    assert image.dtype == np.uint8
        finally:
            frames.close()
        return True

    is_read(read, named=file.name)


FIELDS = ("actions", "states", "disturbed", "rendered", "obs/joint_states", "obs/agentview_rgb")
DTYPES = ("f2", "f4", "f8", "i1", "u1", "i8", "u2", "?", "c16", "S3")
SHAPES = st.one_of(
    st.lists(st.sampled_from([0, 1, 3, 7, 12, 26, 27]), max_size=4).map(tuple),
    st.sampled_from([(26, 7), (26, 12), (26, 112, 112, 3), (26,)]),
)
VALUES = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, 7.0, 1e30, float("nan"), float("inf")])


@inputs(100)
@given(field=st.sampled_from(FIELDS), dtype=st.sampled_from(DTYPES), shape=SHAPES, value=VALUES)
def test_fields_of_demonstrations(
    demos: Path, tmp_path: Path, field: str, dtype: str, shape: tuple[int, ...], value: float
) -> None:
    source = demo_file(demos, MINI.task(TASKS[0]).name)
    file = tmp_path / source.name
    file.write_bytes(source.read_bytes())
    with np.errstate(all="ignore"), h5py.File(file, "a") as opened:
        del opened[f"data/demo_1/{field}"]
        kind = np.dtype(dtype).kind
        number = value if np.isfinite(value) or kind in "fc" else 3.0
        filled = np.full(shape, number if kind != "S" else b"x")
        opened[f"data/demo_1/{field}"] = filled.astype(dtype)
    check_demos(tmp_path)


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("rounds") / "round.npz"
    write_trajectories(file, make_trajectories(crash_last=True))
    return file.read_bytes()


@inputs(100)
@given(name=st.integers(0), dtype=st.sampled_from(DTYPES), shape=SHAPES, value=VALUES)
def test_arrays_of_trajectories(
    rounds: bytes, tmp_path: Path, name: int, dtype: str, shape: tuple[int, ...], value: float
) -> None:
    file = tmp_path / "round.npz"
    with np.load(io.BytesIO(rounds)) as stored:
        tables = dict(stored)
    names = sorted(tables)
    kind = np.dtype(dtype).kind
    number = value if np.isfinite(value) or kind in "fc" else 3.0
    with np.errstate(all="ignore"):
        filled = np.full(shape, number if kind != "S" else b"x").astype(dtype)
    tables[names[name % len(names)]] = filled
    np.savez(file, **tables)

    def read() -> None:
        assert read_trajectories(file).policy_steps.log_probs.isfinite().all()

    is_read(read, named=str(file))


PLAIN = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["${seed}", "${a.b}", "???", "~", "1", "off", "nan"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(st.text(max_size=6), st.integers(), st.none()), inner, max_size=3
        ),
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["seed", "out", "policy", "sampling", "loss", "reward_args", "verl", "defaults", "cluster", "x"]
)


@inputs(150)
@given(values=st.dictionaries(KEYS, PLAIN, min_size=1, max_size=3))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_values_of_recipes(tmp_path: Path, values: dict[str, Any]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"defaults": ["quickstart", "_self_"]} | values))

    def read() -> None:
        # it can be written down
        assert yaml.safe_dump(load_recipe([f"recipe={file}"]).as_dict())

    is_read(read, named="")


SIGNS = ["a", "1", ":", " ", "\n", "[", "]", "{", "}", "&x", "*x", "!!", "'", '"', "- ", ",", "#"]


@inputs(150)
@given(seed=st.integers(0, 10**6), length=st.integers(1, 40))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_signs_of_recipes(tmp_path: Path, seed: int, length: int) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("".join(random.Random(seed).choices(SIGNS, k=length)))
    with pytest.raises(ConfigError):
        load_recipe([f"recipe={file}"])
