"""Files of users, damaged at random: a valid result, or one message, and neither error nor wait."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from bench_world import make_trajectories
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sft_world import TASKS, write_demos

from verl_vla.config.compose import load_recipe
from verl_vla.config.sft import DemoChoice
from verl_vla.core.errors import ConfigError
from verl_vla.core.trajectory_io import read_trajectories, write_trajectories
from verl_vla.datasets.demo_file import LARGEST_ACTION
from verl_vla.datasets.libero_reader import FrameReader, demo_file, read_demos
from verl_vla.envs.libero.init_states import read_states
from verl_vla.envs.registry import suite

MINI = suite("mini")
DEADLINE_S = 5
BOUNDED = settings(
    max_examples=150,
    deadline=1000 * DEADLINE_S,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SPOTS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20
)
"""Places in a file, as a share of its length, and what is written there."""


def flip(content: bytes, spots: list[tuple[float, int]], end: float) -> bytes:
    """Change bytes, and cut the file off after a share of its length."""
    damaged = bytearray(content)
    for share, value in spots:
        damaged[int(share * len(damaged))] = value
    return bytes(damaged[: max(1, int(end * len(damaged)))])


def outcome(read: Callable[[], Any], file: Path) -> Any:
    """Return what was read; None where it was refused with the file's name."""
    try:
        return read()
    except ConfigError as error:
        assert file.name in str(error)
        assert len(str(error)) < 2000
        return None


ENDS = st.one_of(st.just(1.0), st.floats(0, 1))


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

    outcome(read, file)


@BOUNDED
@given(spots=SPOTS, end=ENDS)
def test_bytes_of_demonstrations(
    demos: Path, tmp_path: Path, spots: list[tuple[float, int]], end: float
) -> None:
    source = demo_file(demos, MINI.task(TASKS[0]).name)
    (tmp_path / source.name).write_bytes(flip(source.read_bytes(), spots, end))
    check_demos(tmp_path)


FIELDS = ("actions", "states", "disturbed", "rendered", "obs/joint_states", "obs/agentview_rgb")
DTYPES = ("f2", "f4", "f8", "i1", "u1", "i8", "u2", "?", "c16", "S3")
SHAPES = st.one_of(
    st.lists(st.sampled_from([0, 1, 3, 7, 12, 26, 27]), max_size=4).map(tuple),
    st.sampled_from([(26, 7), (26, 12), (26, 112, 112, 3), (26,)]),
)
VALUES = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, 7.0, 1e30, float("nan"), float("inf")])


@BOUNDED
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


@BOUNDED
@given(spots=SPOTS, end=ENDS)
def test_bytes_of_trajectories(
    rounds: bytes, tmp_path: Path, spots: list[tuple[float, int]], end: float
) -> None:
    file = tmp_path / "round.npz"
    file.write_bytes(flip(rounds, spots, end))
    outcome(lambda: read_trajectories(file), file)


@BOUNDED
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
    found = outcome(lambda: read_trajectories(file), file)
    if found is not None:
        assert found.policy_steps.log_probs.isfinite().all()


def state_files() -> list[bytes]:
    states = np.random.default_rng(0).normal(size=(3, 20))
    contents = []
    for save in (lambda f: np.savez(f, states=states), lambda f: np.save(f, states)):
        stream = io.BytesIO()
        save(stream)
        contents.append(stream.getvalue())
    for is_zip in (True, False):
        stream = io.BytesIO()
        torch.save(states, stream, _use_new_zipfile_serialization=is_zip)
        contents.append(stream.getvalue())
    return contents


STATES = state_files()


@settings(BOUNDED, max_examples=300)
@given(kind=st.integers(0, 3), spots=SPOTS, end=ENDS)
def test_bytes_of_init_states(
    tmp_path: Path, kind: int, spots: list[tuple[float, int]], end: float
) -> None:
    file = tmp_path / "some.pruned_init"
    file.write_bytes(flip(STATES[kind], spots, end))
    states = outcome(lambda: read_states(file), file)
    if states is not None:
        assert states.ndim == 2
        assert np.isfinite(states).all()


NAMES = st.one_of(st.text(max_size=6), st.integers(), st.none())
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
        st.dictionaries(NAMES, inner, max_size=3),
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["seed", "out", "policy", "sampling", "loss", "reward_args", "verl", "defaults", "cluster", "x"]
)


@settings(BOUNDED, max_examples=100)
@given(values=st.dictionaries(KEYS, PLAIN, min_size=1, max_size=3))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_values_of_recipes(tmp_path: Path, values: dict[str, Any]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"defaults": ["quickstart", "_self_"]} | values))
    try:
        recipe = load_recipe([f"recipe={file}"])
    except ConfigError as error:
        assert str(error)
    else:
        # it can be written down, and is read as the same
        assert yaml.safe_load(yaml.safe_dump(recipe.as_dict()))


SIGNS = ["a", "1", ":", " ", "\n", "[", "]", "{", "}", "&x", "*x", "!!", "'", '"', "- ", ",", "#"]


@settings(BOUNDED, max_examples=200)
@given(seed=st.integers(0, 10**6), length=st.integers(1, 40))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_signs_of_recipes(tmp_path: Path, seed: int, length: int) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("".join(random.Random(seed).choices(SIGNS, k=length)))
    with pytest.raises(ConfigError):
        load_recipe([f"recipe={file}"])


@settings(BOUNDED, max_examples=100)
@given(key=KEYS, value=st.text(max_size=30))
def test_words_of_recipes(key: str, value: str) -> None:
    try:
        load_recipe(["recipe=quickstart", f"{key}={value}"])
    except ConfigError as error:
        assert str(error)
