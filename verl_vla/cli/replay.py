"""Make a video of an earlier episode from its recorded actions.

RUN is the folder of a training run or of ``eval``. The video shows the instruction, every action
chunk and the progress.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from verl_vla.core.errors import ConfigError
from verl_vla.core.files import writing_to
from verl_vla.envs.libero.suite import libero_suite
from verl_vla.runs.replay import read_episode, replay, write_video

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov")
"""Containers that hold H.264."""


def run(options: argparse.Namespace) -> int:
    """Replay the episode, compare it with the episode log, and write the video."""
    folder = Path(options.run)
    header, line = read_episode(folder, options.episode)
    libero_suite(header["suite"]).require_simulator()
    name = f"episode_{options.episode}.mp4"
    file = folder / "replays" / name if options.out is None else Path(options.out)
    # before minutes of simulation
    if file.is_dir() or file.suffix not in VIDEO_SUFFIXES:
        raise ConfigError(
            f"--out is {file}; name a file that ends in {' or '.join(VIDEO_SUFFIXES)}"
        )
    frames = replay(header, line)
    with writing_to(file.parent):
        write_video(file, frames)
    logger.info("written to %s", file)
    return 0
