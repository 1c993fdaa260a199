"""Damaged init states, trajectories, demonstrations and recipes: usable as read, or refused."""

from __future__ import annotations

import functools
import io
import math
import pickle
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from bench_world import make_trajectories
from damage import changed_bytes, documents, inputs, is_read, replaced
from hypothesis import given
from hypothesis import strategies as st
from sft_world import TASKS, write_demos

from verl_vla.config.compose import RECIPES_FOLDER, load_recipe
from verl_vla.config.grpo import Recipe
from verl_vla.config.schema import parse
from verl_vla.config.sft import DemoChoice
from verl_vla.core.trajectory_io import read_trajectories, write_trajectories
from verl_vla.datasets.libero_reader import FrameReader, demo_file, read_demos
from verl_vla.envs.libero.init_states import read_states
from verl_vla.envs.registry import suite

WORDS = {
    "quickstart": ["policy.path=bases/mini"],
    "libero": ["suite=spatial", "profile=two_cores", "policy.path=bases/libero_spatial"],
}
"""Recipes whose values are damaged, with what they must be told."""
LETTERS = st.one_of(
    st.text(max_size=12),
    st.builds(
        "{}={}".format,
        st.sampled_from(["seed", "sampling.temperature", "environment", "reward_args.a", "suite"]),
        st.one_of(
            st.text("[]{},:=${}'\"\\ \0\n01a.-+e", max_size=12),
            st.sampled_from(["inf", "nan", "-1", "9" * 5000, "[" * 200 + "]" * 200, "${seed}"]),
        ),
    ),
)
"""Words of a command line."""

STATES = np.arange(12.0).reshape(3, 4)


def init_state_files() -> dict[str, bytes]:
    """One of each kind of file that holds `STATES`."""
    npz, npy, archive, legacy = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(npz, states=STATES)
    np.save(npy, STATES)
    torch.save(STATES, archive)
    torch.save(torch.from_numpy(STATES), legacy, _use_new_zipfile_serialization=False)
    files = {"npz": npz, "npy": npy, "zip": archive, "legacy": legacy}
    return {kind: file.getvalue() for kind, file in files.items()} | {
        "pickle": pickle.dumps(STATES)
    }


@pytest.mark.parametrize("kind", ["npz", "npy", "zip", "legacy", "pickle"])
@given(data=st.data())
@inputs(150)
def test_init_states(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    file = tmp_path / "some.pruned_init"
    file.write_bytes(data.draw(changed_bytes(init_state_files()[kind])))

    def read() -> None:
        states = read_states(file)
        assert states.ndim == 2 and states.size and np.isfinite(states).all()

    is_read(read, named=str(file))


@given(data=st.data())
@inputs(150)
def test_stored_trajectories(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "round.npz"
    write_trajectories(file, make_trajectories())
    file.write_bytes(data.draw(changed_bytes(file.read_bytes())))
    is_read(lambda: read_trajectories(file), named=str(file))


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demos(tmp_path_factory.mktemp("fuzz") / "demos", tasks=TASKS[:1])


def read_all_of(demonstrations: Path) -> None:
    """Read episodes and one image of each, as fine-tuning does."""
    first, last = read_demos(
        demonstrations, suite("mini"), TASKS[:1], DemoChoice(held_out_per_task=0)
    )
    reader = FrameReader()
    try:
        for demo in first + last:
            assert demo.actions.ndim == 2 and demo.actions.shape[1] == 7
            assert np.isfinite(demo.actions).all() and np.abs(demo.actions).max(initial=0) <= 1
            shown = np.flatnonzero(demo.rendered)
            assert len(shown)
            image = reader.read(demo, int(shown[0]))
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    finally:
        reader.close()


SENTENCES = st.text(st.characters(exclude_characters="\0"), max_size=20)
"""HDF5 itself refuses a NUL."""


def filled(shape: list[int], dtype: str, value: float) -> np.ndarray:
    # whole numbers cannot hold all of these values, and become some other
    with np.errstate(invalid="ignore"):
        return np.full(shape, value).astype(dtype)


ARRAYS = st.builds(
    filled,
    st.lists(st.integers(0, 30), max_size=4),
    st.sampled_from(["f8", "f4", "i1", "u1", "i8", "bool", "c16", "S3"]),
    st.sampled_from([0.0, 0.5, -1.0, 7.0, 1e30, float("nan"), float("inf")]),
)
"""Data sets of some shape, type and value."""


@given(data=st.data())
@inputs(200)
def test_demonstrations_with_other_content(demonstrations: Path, data: st.DataObject) -> None:
    file = demo_file(demonstrations, suite("mini").task(TASKS[0]).name)
    whole = file.read_bytes()
    with h5py.File(file) as opened:
        names: list[str] = []
        opened.visit(names.append)
    name = data.draw(st.sampled_from([*names, "data/demo_x", "data/demo_7"]))
    kind = data.draw(st.sampled_from(["remove", "replace", "sentence"]))
    try:
        with h5py.File(file, "r+") as opened:
            if kind == "sentence":
                opened["data"].attrs["problem_info"] = data.draw(SENTENCES)
            elif name in opened:
                del opened[name]
            if kind == "replace":
                opened[name] = data.draw(ARRAYS)
        is_read(lambda: read_all_of(demonstrations), named=str(demonstrations))
    finally:
        file.write_bytes(whole)


@given(data=st.data())
@inputs(100)
def test_demonstrations_with_damaged_bytes(demonstrations: Path, data: st.DataObject) -> None:
    file = demo_file(demonstrations, suite("mini").task(TASKS[0]).name)
    changed = data.draw(changed_bytes(file.read_bytes()))
    replaced(file, changed, lambda: read_all_of(demonstrations), named=str(demonstrations))


def require_finite(value: Any) -> None:
    """Check every number of a recipe's sections."""
    if is_dataclass(value):
        for field in fields(value):
            require_finite(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for inner in value.values():
            require_finite(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            require_finite(inner)
    elif isinstance(value, float):
        assert math.isfinite(value)


@functools.cache
def valid_values(name: str) -> dict[str, Any]:
    return asdict(load_recipe([f"recipe={name}", *WORDS[name]]))


@pytest.mark.parametrize("name", ["quickstart", "libero"])
@given(data=st.data())
@inputs(150)
def test_values_of_a_recipe(name: str, data: st.DataObject) -> None:
    values = data.draw(
        documents(valid_values(name)).filter(lambda values: isinstance(values, dict))
    )

    def read() -> None:
        require_finite(parse(Recipe, values))

    is_read(read, named="")


@given(data=st.data())
@inputs(150)
def test_files_of_recipes(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "mine.yaml"
    content = (RECIPES_FOLDER / "quickstart.yaml").read_bytes()
    document = data.draw(documents(yaml.safe_load(content)))
    changed = data.draw(st.sampled_from([data.draw(changed_bytes(content)), dumped(document)]))
    file.write_bytes(changed)
    is_read(lambda: require_finite(load_recipe([f"recipe={file}"])), named="")


def dumped(document: Any) -> bytes:
    return yaml.safe_dump(document, allow_unicode=True).encode()


@given(words=st.lists(LETTERS, min_size=1, max_size=4))
@inputs(150)
def test_words_of_a_recipe(words: list[str]) -> None:
    is_read(lambda: load_recipe(["recipe=quickstart", *words]), named="")
