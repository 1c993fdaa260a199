"""What of a trained run is not as in another one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from verl_vla.diagnostics.chaos.trial import LAST_STEP, Trial
from verl_vla.runs.episode_log import EPISODE_LOG_FILE, read_episodes
from verl_vla.runs.metrics import is_reproducible, read_metrics


def differing(undisturbed: Trial, trial: Trial, *, but_last: bool) -> list[str]:
    """Return what of a trained run is not that of the undisturbed one.

    Args:
        undisturbed: trained to the end.
        trial: the other.
        but_last: leave the last step and the weights out, and require that it lost episodes.
    """
    found: list[str] = []
    one, two = (_lines(run.folder) for run in (undisturbed, trial))
    if but_last:
        lost = two[-1]["env/crashes"] if two else 0
        if not lost:
            found.append("no episode was lost")
        one, two = one[:-1], two[:-1]
    if one != two:
        found.append("other metrics")
    last = LAST_STEP - 1 if but_last else LAST_STEP
    episodes = [
        [line for line in read_episodes(run.folder) if line["step"] <= last]
        for run in (undisturbed, trial)
    ]
    if episodes[0] != episodes[1]:
        found.append("other episodes")
    if not but_last and weights_sum(undisturbed) != weights_sum(trial):
        found.append("other weights")
    return found


def weights_sum(trial: Trial) -> str:
    """Return the SHA-256 of the weights of the last step; empty where they were not saved."""
    file = trial.checkpoint(LAST_STEP) / "policy" / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def contents(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of what a run resumes from, by file."""
    kept = [folder / "metrics.jsonl", folder / EPISODE_LOG_FILE, *folder.glob("checkpoints/**/*")]
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in kept
        if file.is_file()
    }


def _lines(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    lines = read_metrics(file) if file.is_file() else []
    return [{k: v for k, v in line.items() if is_reproducible(k)} for line in lines]
