"""Files that are there whole or not at all, whenever a process ends."""

from __future__ import annotations

from pathlib import Path


def partial_file(file: Path) -> Path:
    """Where ``file`` is written before it takes its place; a killed process may leave it."""
    return file.with_suffix(".tmp")


def write_whole(file: Path, text: str) -> None:
    """Write ``file``, or leave what was there."""
    partial = partial_file(file)
    partial.write_text(text)
    partial.replace(file)
