"""What the tests of this folder share: LIBERO's files are read once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from verl_vla.envs.libero import assets


@pytest.fixture(scope="session", autouse=True)
def assets_are_read_once() -> Iterator[None]:
    """Keep the checksum of a file, by its inode, size and time: all together have 600 MB."""
    known: dict[tuple[int, ...], str] = {}
    sha256 = assets._sha256

    def kept(file: Path) -> str:
        stat = os.stat(file)
        key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if key not in known:
            known[key] = sha256(file)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assets, "_sha256", kept)
        yield
