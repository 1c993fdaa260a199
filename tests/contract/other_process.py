"""Simulations in a process of their own: LIBERO's stock environment, and ours from a snapshot."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from verl_vla.envs.base import EnvConfig, Snapshot

STOCK = Path(__file__).parents[1] / "sim" / "stock.py"
CONTINUE = """
import pickle, sys
from pathlib import Path
from verl_vla.envs.libero.suite import make_libero_env
folder = Path(sys.argv[1])
config, kept, chunks, starts = pickle.loads((folder / "task.pkl").read_bytes())
env = make_libero_env(config)
for start in starts:
    env.reset(kept.task_id, start)
env.restore(kept)
seen = [env.step_chunk(chunk).observation for chunk in chunks]
answer = seen, env.simulator(kept.task_id).state
(folder / "answer.pkl").write_bytes(pickle.dumps(answer))
"""


def stock_trace(
    suite: str,
    task_id: int,
    init_state: np.ndarray,
    moves: np.ndarray,
    folder: Path,
    *,
    resets: int = 1,
) -> dict[str, np.ndarray]:
    """What LIBERO's own environment does after so many resets.

    robosuite neither chooses its GL context before it draws nor before it frees one, so it must
    not share a process with another renderer.
    """
    np.savez(folder / "question.npz", init_state=init_state, moves=moves, resets=resets)
    subprocess.run([sys.executable, str(STOCK), suite, str(task_id), str(folder)], check=True)
    with np.load(folder / "answer.npz") as answer:
        return dict(answer)


def continued_elsewhere(
    config: EnvConfig,
    kept: Snapshot,
    chunks: Sequence[np.ndarray],
    folder: Path,
    *,
    starts: Sequence[int] = (),
) -> tuple[list[Any], Any]:
    """The observations after each chunk, and the simulator's state after the last.

    Args:
        config: of the environment there.
        kept: what it goes on from.
        chunks: [K, A] each.
        folder: for what is sent to and fro.
        starts: init states that it plays before.
    """
    (folder / "task.pkl").write_bytes(pickle.dumps((config, kept, list(chunks), list(starts))))
    subprocess.run([sys.executable, "-c", CONTINUE, str(folder)], check=True)
    return pickle.loads((folder / "answer.pkl").read_bytes())
