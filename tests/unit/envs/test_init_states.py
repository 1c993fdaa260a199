"""Init-state files of every kind, and that nothing in one is executed."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_vla.core.errors import ConfigError
from verl_vla.envs.libero import init_states
from verl_vla.envs.libero.assets import libero_root
from verl_vla.envs.libero.init_states import read_states
from verl_vla.envs.libero.task import PLUS, PRO, package_folder

STATES = np.random.default_rng(0).normal(size=(3, 5))


def zipped(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def legacy(value: Any) -> bytes:
    return zipped(value, _use_new_zipfile_serialization=False)


def by_numpy_1(content: bytes) -> bytes:
    """The same pickle under the module names of numpy 1."""
    if content[1] < 4:
        return content.replace(b"numpy._core", b"numpy.core")
    # these protocols write lengths: of the name, and of the frame that it stands in
    assert content[2:3] == pickle.FRAME
    frame = struct.pack("<Q", struct.unpack("<Q", content[3:11])[0] - 1)
    shorter = content.replace(b"\x13numpy._core.numeric", b"\x12numpy.core.numeric")
    return shorter[:3] + frame + shorter[11:]


def npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def archive(data: bytes, **storages: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("archive/data.pkl", data)
        for key, content in storages.items():
            file.writestr(f"archive/data/{key.removeprefix('s')}", content)
    return stream.getvalue()


KINDS: dict[str, bytes] = {
    "npz": npz(states=STATES),
    "npz of another name": npz(starts=STATES),
    "npy": npy(STATES),
    "zip, array, numpy 2": zipped(STATES),
    "zip, array, numpy 1": archive(by_numpy_1(pickle.dumps(STATES, 2))),
    "zip, array, protocol 4": archive(pickle.dumps(STATES, 4)),
    "zip, tensor": zipped(torch.from_numpy(STATES)),
    "zip, part of a tensor": zipped(torch.from_numpy(np.vstack([STATES, STATES]))[3:]),
    "legacy, array": legacy(STATES),
    "legacy, tensor": legacy(torch.from_numpy(STATES)),
    "pickle, numpy 1": by_numpy_1(pickle.dumps(STATES, 2)),
    "pickle, numpy 1, frombuffer": by_numpy_1(pickle.dumps(STATES, 5)),
    "pickle, numpy 2, frombuffer": pickle.dumps(STATES, 5),
    "pickle, columns first": pickle.dumps(np.asfortranarray(STATES), 5),
    "pickle, columns first, reconstruct": pickle.dumps(np.asfortranarray(STATES), 4),
    "pickle, big endian": pickle.dumps(STATES.astype(">f8"), 4),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def to_file(content: bytes) -> Path:
        file = tmp_path / "some.pruned_init"
        file.write_bytes(content)
        return file

    return to_file


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_states(
    kind: str, write: Callable[[bytes], Path]
) -> None:
    read = read_states(write(KINDS[kind]))
    np.testing.assert_array_equal(read, STATES)
    assert read.dtype == np.float64


@pytest.mark.parametrize("value", [STATES.astype(np.float32), STATES.astype(np.int64)])
def test_other_numbers_become_doubles(value: Any, write: Callable[[bytes], Path]) -> None:
    for content in (npz(states=value), zipped(value), zipped(torch.from_numpy(value))):
        np.testing.assert_array_equal(read_states(write(content)), value.astype(np.float64))


def test_one_dimension_is_one_state(write: Callable[[bytes], Path]) -> None:
    np.testing.assert_array_equal(read_states(write(zipped(STATES[0]))), STATES[:1])


class Harmful:
    """Runs `Path.touch` where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("save", [zipped, legacy, pickle.dumps])
@pytest.mark.parametrize("is_inside", [False, True])
def test_code_is_refused_and_not_run(
    save: Callable[[Any], bytes], is_inside: bool, tmp_path: Path
) -> None:
    harm = Harmful(tmp_path / "ran")
    file = tmp_path / "harmful.pruned_init"
    file.write_bytes(save(np.array([harm, None]) if is_inside else harm))
    with pytest.raises(ConfigError, match=r"harmful\.pruned_init cannot .* no array needs"):
        read_states(file)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_cannot_change_what_later_files_are_read_with(
    write: Callable[[bytes], Path],
) -> None:
    # names numpy.dtype, then sets an attribute of what it was given
    taint = b"\x80\x02cnumpy\ndtype\nN}X\x04\x00\x00\x00nameX\x02\x00\x00\x00f4s\x86b."
    with pytest.raises(ConfigError):
        read_states(write(taint))
    np.testing.assert_array_equal(read_states(write(KINDS["zip, array, numpy 2"])), STATES)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged"),
        (b"no init states at all", "damaged"),
        (npz(states=STATES)[:-30], "damaged"),
        (zipped(STATES)[:200], "damaged"),
        (npz(a=STATES, b=STATES), "has no array 'states'"),
        (zipped(np.zeros((0, 5))), r"it is empty, \[0, 5\]"),
        (zipped(np.zeros((2, 3, 4))), r"it holds \[2, 3, 4\]"),
        (zipped(np.array(1.0)), r"it holds \[1, 1\]|it holds \[\]"),
        (zipped(np.array([[1.0, np.nan]])), "not finite"),
        (npz(states=np.array([["text"]])), "no numbers"),
        (zipped(np.array([["text"]])), "no numbers"),
        (npz(states=np.array([[None]], dtype=object)), "damaged"),
        (zipped({"states": STATES}), "it holds a dict"),
        (zipped([STATES]), "it holds a list"),
        (zipped(torch.zeros(2, 3, dtype=torch.bfloat16)), "BFloat16Storage"),
        (zipped(torch.from_numpy(STATES).T), r"call \.contiguous"),
        (pickle.dumps(STATES, 2).replace(b"latin1", b"utf-16"), "'utf-16'"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "memo"),
        (b"\x80\x04\x82\x01.", "EXT1"),
        (struct.pack("<4sI", b"PK\x03\x04", 0), "damaged"),
    ],
)
def test_what_is_no_set_of_states_is_refused(
    content: bytes, reason: str, write: Callable[[bytes], Path]
) -> None:
    with pytest.raises(ConfigError, match=rf"some\.pruned_init cannot be read .*{reason}"):
        read_states(write(content))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "some.pruned_init")
    with pytest.raises(ConfigError, match=r"some\.pruned_init is a pipe or a device.*; reinstall"):
        read_states(tmp_path / "some.pruned_init")


def test_a_tensor_cannot_reach_beyond_its_content(write: Callable[[bytes], Path]) -> None:
    whole = zipped(torch.from_numpy(STATES))
    with zipfile.ZipFile(io.BytesIO(whole)) as stored:
        data = stored.read(next(n for n in stored.namelist() if n.endswith("data.pkl")))
    np.testing.assert_array_equal(read_states(write(archive(data, s0=STATES.tobytes()))), STATES)
    with pytest.raises(ConfigError, match="larger than its content"):
        read_states(write(archive(data, s0=STATES.tobytes()[:-8])))
    with pytest.raises(ConfigError, match="content of its tensor is missing"):
        read_states(write(archive(data)))


def test_a_bomb_is_not_unpacked(
    write: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init_states, "MAX_BYTES", 1 << 20)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(2 << 20))
    with pytest.raises(ConfigError, match="unpacks to 2 MiB, over 1"):
        read_states(write(stream.getvalue()))
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        read_states(write(bytes(2 << 20)))


@settings(max_examples=400, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), data=st.data())
def test_no_damage_raises_anything_else(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(KINDS[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[place] = data.draw(st.integers(0, 255))
        else:
            del content[place : place + data.draw(st.integers(1, 40))]
    file = tmp_path_factory.getbasetemp() / "damaged.pruned_init"
    file.write_bytes(content)
    try:
        states = read_states(file)
    except ConfigError as error:
        assert "damaged.pruned_init" in str(error)
    else:
        assert states.ndim == 2
        assert np.isfinite(states).all()


@pytest.mark.parametrize(
    ("folder", "number", "refused"),
    [
        (libero_root() / "init_files", 250, 0),
        (package_folder(PRO) / "init_files", 848, 7),
        (package_folder(PLUS) / "init_files", 4320, 0),
    ],
)
def test_all_published_files_are_read(folder: Path, number: int, refused: int) -> None:
    files = [file for file in sorted(folder.rglob("*init")) if file.is_file()]
    reasons: list[str] = []
    for file in files:
        try:
            read_states(file)
        except ConfigError as error:
            reasons.append(str(error))
    assert len(files) == number
    assert len(reasons) == refused
    assert all("it is empty" in reason for reason in reasons)
