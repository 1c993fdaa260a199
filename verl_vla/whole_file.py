"""Files that are there whole or not at all, whenever a process ends."""

from __future__ import annotations

from pathlib import Path

from verl_vla.errors import ConfigError


def partial_file(file: Path) -> Path:
    """Where ``file`` is written before it takes its place; a killed process may leave it."""
    return file.with_suffix(".tmp")


def require_place(file: Path, option: str) -> None:
    """Refuse, before the work, a file that could not be written after it.

    Raises:
        ConfigError: its folder is not there, or it is a folder itself.
    """
    if not file.parent.is_dir():
        raise ConfigError(f"{option} is {file}, but there is no folder {file.parent}; make it")
    if file.is_dir():
        raise ConfigError(f"{option} is {file}, which is a folder; name a file in it")


def write_whole(file: Path, text: str) -> None:
    """Write ``file``, or leave what was there."""
    partial = partial_file(file)
    partial.write_text(text)
    partial.replace(file)
