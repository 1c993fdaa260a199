"""A file is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from verl_vla.core.errors import ConfigError
from verl_vla.core.files import atomic_write, partial_file, require_place


def test_a_file_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    for text in ("first", "second"):
        atomic_write(file, text)
        assert file.read_text() == text
        assert list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_written_leaves_the_file_before(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    atomic_write(file, "first")
    partial_file(file).mkdir()
    with pytest.raises(IsADirectoryError):
        atomic_write(file, "second")
    assert file.read_text() == "first"


def test_a_place_is_refused_before_the_work(tmp_path: Path) -> None:
    require_place(tmp_path / "answer.json", "--out")
    for place, why in ((tmp_path, "is a folder"), (tmp_path / "a" / "b.json", "make it")):
        with pytest.raises(ConfigError, match=why):
            require_place(place, "--out")
