"""A program that leaves a run's folder as training does, in no time: ``training_stub.py WORDS``.

It asks the reward once a step, as far as waiting at the gate goes. A line of ``COMMAND`` in the
environment makes it misbehave: ``drift`` resumes with other numbers, ``orphan`` leaves a child.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from report_world import add_step

from verl_vla.diagnostics.chaos.trial import FAULT_LINE, LAST_STEP
from verl_vla.runs.episode_log import EpisodeLog
from verl_vla.runs.metrics import MetricsFile


def word(name: str) -> str:
    """Return a quoted word of the command line."""
    return next(w.removeprefix(f"{name}='")[:-1] for w in sys.argv if w.startswith(f"{name}="))


def ask_reward(reward: Path) -> None:
    """Wait where the trials' reward waits, and fail where it fails."""
    reward.with_name("reached").touch()
    while reward.with_name("gate").exists():
        time.sleep(0.01)
    if FAULT_LINE not in reward.read_text():
        sys.exit(5)


def main() -> None:
    """Train from the newest checkpoint to the last step."""
    out, reward = Path(word("out")), Path(word("reward").removesuffix(":TrialReward"))
    checkpoints = out / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    done = len(list(checkpoints.glob("global_step_*")))
    command = os.environ["COMMAND"]
    if done:
        MetricsFile(out / "metrics.jsonl").rewind(done)
        EpisodeLog(out, {"suite": "mini"}).rewind(done)
    if command == "orphan" and done:
        subprocess.Popen(["sleep", "600"])
    sys.stdout.write("training\n")
    sys.stdout.flush()
    for step in range(done + 1, LAST_STEP + 1):
        ask_reward(reward)
        add_step(out, step)
        policy = checkpoints / f"global_step_{step}" / "policy"
        policy.mkdir(parents=True)
        content = f"{step} {done if command == 'drift' else ''}"
        (policy / "model.safetensors").write_text(content)
    latest = checkpoints / "latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(f"global_step_{LAST_STEP}")


main()
