"""``replay RUN --episode ID``: make a video of an episode that was played.

RUN is the folder of a training run or of ``eval``. The video shows the instruction, every action
chunk and how far the episode came.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from verl_vla.envs.libero.suite import libero_suite
from verl_vla.runs.replay import read_episode, replay, write_video

logger = logging.getLogger(__name__)


def run(arguments: Sequence[str]) -> int:
    """Play it again, hold it against what was written down, and write the video."""
    options = _parser().parse_args(arguments)
    folder = Path(options.run)
    header, line = read_episode(folder, options.episode)
    libero_suite(header["suite"]).require_simulator()
    name = f"episode_{options.episode}.mp4"
    file = folder / "replays" / name if options.out is None else Path(options.out)
    write_video(file, replay(header, line))
    logger.info("written to %s", file)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m verl_vla replay", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a training run or of eval")
    parser.add_argument("--episode", type=int, required=True, help="id, as in episodes.jsonl")
    parser.add_argument("--out", help="video to write; RUN/replays/episode_ID.mp4 if not given")
    return parser
