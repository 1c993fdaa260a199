"""The faults that a training must survive, or end with the right exit code and message."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from verl_vla.core.errors import (
    EXIT_CHECKPOINT,
    EXIT_LEARNER_LOST,
    EXIT_REWARD,
    EXIT_SIGNAL,
    EXIT_USAGE,
)
from verl_vla.diagnostics.chaos.experiment import Fault, send
from verl_vla.diagnostics.chaos.trial import BASE_STEP, LAST_STEP, Trial
from verl_vla.runs.episode_log import EPISODE_LOG_FILE
from verl_vla.runs.episode_recorder import video_path

SIMULATOR = "verl_vla.envs.pool.worker"
"""Part of the command line of simulators; those of Ray's workers begin with their class."""
ROLLOUT_S = 3.0
"""Time after which a simulator that was stopped in one step has a request of the next one."""
SIMULATOR_LIMIT_S = 8
MANY_EPISODES = 64
"""More than a trial plays."""
RESUMES = rf"The same command goes on from the checkpoint of step {BASE_STEP}"
METRICS = "metrics.jsonl"


def stop_and_kill_simulator(trial: Trial) -> None:
    """Stop a simulator, so that it is surely busy when it is killed."""
    simulator = trial.find(SIMULATOR)
    os.kill(simulator, signal.SIGSTOP)
    trial.open_gate()
    time.sleep(ROLLOUT_S)
    os.kill(simulator, signal.SIGKILL)


def kill_while_it_saves(trial: Trial) -> None:
    """Kill the training while it writes the checkpoint of its step."""
    trial.open_gate()
    trial.await_moment((trial.checkpoints / "unfinished").exists)
    os.kill(trial.pid, signal.SIGKILL)


def lose_manifest(*steps: int) -> Callable[[Trial], None]:
    """Return a damage: the manifests of these steps are moved out of the run."""

    def damage(trial: Trial) -> None:
        for step in steps:
            shutil.move(trial.checkpoint(step) / "manifest.json", _aside(trial, step))

    return damage


def restore_manifest(*steps: int) -> Callable[[Trial], None]:
    """Return the repair of `lose_manifest`."""

    def repair(trial: Trial) -> None:
        for step in steps:
            shutil.move(_aside(trial, step), trial.checkpoint(step) / "manifest.json")

    return repair


def _aside(trial: Trial, step: int) -> Path:
    return trial.folder.with_name(f"{trial.folder.name}_{step}.json")


def empty_manifest(trial: Trial) -> None:
    """Let the newest manifest name no file."""
    file = trial.checkpoint(BASE_STEP) / "manifest.json"
    file.write_text(json.dumps({"step": BASE_STEP, "files": {}}))


def flip_bit(trial: Trial) -> None:
    """Change one bit of the newest checkpoint's weights, as a disk may."""
    file = trial.checkpoint(BASE_STEP) / "policy" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def leave_half_removed(trial: Trial) -> None:
    """Leave what a kill leaves of a checkpoint that is removed, and of one that is written."""
    (trial.checkpoint(1) / "manifest.json").unlink()
    shutil.copytree(trial.checkpoint(1), trial.checkpoints / "unfinished" / "global_step_3")


def damage_line(name: str) -> Callable[[Trial], None]:
    """Return a damage: the second line of a file becomes binary."""

    def damage(trial: Trial) -> None:
        file = trial.folder / name
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join([lines[0], b"\xff\0{\n", *lines[1:]]))

    return damage


def remove_line(name: str) -> Callable[[Trial], None]:
    """Return the repair of `damage_line`, which the message asks for."""

    def repair(trial: Trial) -> None:
        file = trial.folder / name
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join([lines[0], *lines[2:]]))

    return repair


def fill_disk(trial: Trial) -> None:
    """Let every video that the training writes meet a full disk."""
    for episode in range(MANY_EPISODES):
        video = video_path(trial.folder, episode)
        video.unlink(missing_ok=True)
        video.symlink_to("/dev/full")


def make_room(trial: Trial) -> None:
    """Undo `fill_disk`."""
    for episode in range(MANY_EPISODES):
        video_path(trial.folder, episode).unlink(missing_ok=True)


def _killed(part: str, says: str) -> Fault:
    return Fault(
        disturb=send(signal.SIGKILL, part),
        exit_code=EXIT_LEARNER_LOST,
        says=rf"stopped: {says}.*{RESUMES}",
    )


def _asked_to_stop(number: signal.Signals) -> Fault:
    return Fault(
        disturb=send(number),
        exit_code=EXIT_SIGNAL + number,
        says=rf"stopped: {number.name} after step {BASE_STEP + 1}; the same command goes on",
    )


def _reward(line: str, says: str, *words: str) -> Fault:
    return Fault(
        reward_line=line,
        words=words,
        exit_code=EXIT_REWARD,
        says=rf"stopped: TrialReward .*{says}.*the episodes of step {BASE_STEP + 1} are kept",
    )


FAULTS: dict[str, Fault] = {
    "a simulator is killed": Fault(
        disturb=stop_and_kill_simulator,
        exit_code=0,
        says=r"lost: .*signal 9: Killed, by the kernel if memory ran out",
        lost_episodes=True,
    ),
    "a simulator hangs": Fault(
        disturb=send(signal.SIGSTOP, SIMULATOR),
        words=(f"environment.timeout_s={SIMULATOR_LIMIT_S}",),
        exit_code=0,
        says=rf"lost: .*no answer within {SIMULATOR_LIMIT_S} s.*signal 9: Killed, by this run",
        lost_episodes=True,
    ),
    "a learner rank is killed": _killed("WorkerDict", "a learner process died"),
    "TransferQueue's controller is killed": _killed(
        "TransferQueueController", "TransferQueueController is dead"
    ),
    "TransferQueue's storage is killed": _killed(
        "SimpleStorageUnit", "TransferQueueStorageUnit#0 is dead"
    ),
    "Ray's raylet is killed": _killed("raylet/raylet", "raylet .*is dead"),
    "Ray's gcs_server is killed": _killed("gcs_server", "gcs_server .*is dead"),
    "Ray's raylet is killed while it loads": replace(
        _killed("raylet/raylet", "raylet .*is dead"), is_early=True
    ),
    "the run is killed": Fault(
        disturb=send(signal.SIGKILL), exit_code=-signal.SIGKILL, says="run folder"
    ),
    "the run is killed while it saves": Fault(
        disturb=kill_while_it_saves, exit_code=-signal.SIGKILL, says="run folder"
    ),
    "SIGTERM": _asked_to_stop(signal.SIGTERM),
    "SIGINT": _asked_to_stop(signal.SIGINT),
    "SIGHUP": _asked_to_stop(signal.SIGHUP),
    "the reward ends the process": _reward("import os; os._exit(0)", r"it called os\._exit\(0\)"),
    "the reward gives NaN": _reward("result.score[0] = np.nan", "returned nan for episode"),
    "the reward never answers": _reward(
        "time.sleep(1e6)",
        r"did not score 8 episodes within 5 s \(.*reward\.py, line",
        "reward_timeout_s=5",
    ),
    "the disk is full": Fault(
        damage=fill_disk,
        repair=make_room,
        exit_code=EXIT_CHECKPOINT,
        says=r"stopped: .*episode_\d+\.webp could not be written \(No space left on device",
    ),
    "the newest manifest is lost": Fault(
        damage=lose_manifest(BASE_STEP),
        exit_code=0,
        says=r"CORRUPT CHECKPOINT .*manifest\.json is missing; resuming from step 1",
    ),
    "the newest manifest names no file": Fault(
        damage=empty_manifest,
        exit_code=0,
        says=r"CORRUPT CHECKPOINT .*manifest\.json names no file; resuming from step 1",
    ),
    "a bit of the newest checkpoint is flipped": Fault(
        damage=flip_bit,
        exit_code=0,
        says=r"CORRUPT CHECKPOINT .*has another SHA-256.*resuming from step 1",
    ),
    "all manifests are lost": Fault(
        damage=lose_manifest(*range(1, BASE_STEP + 1)),
        repair=restore_manifest(*range(1, BASE_STEP + 1)),
        exit_code=EXIT_CHECKPOINT,
        says=r"stopped: no checkpoint in .* is valid \(step 2: manifest\.json is missing; step 1",
        keeps_folder=True,
    ),
    "a removal and a save were cut short": Fault(
        damage=leave_half_removed, exit_code=0, says=rf"resumed after training step {BASE_STEP}"
    ),
    "a line of metrics.jsonl is damaged": Fault(
        damage=damage_line(METRICS),
        repair=remove_line(METRICS),
        exit_code=EXIT_USAGE,
        says=r"error: .*metrics\.jsonl, line 2: .*remove that line",
        keeps_folder=True,
    ),
    "a line of episodes.jsonl is damaged": Fault(
        damage=damage_line(EPISODE_LOG_FILE),
        repair=remove_line(EPISODE_LOG_FILE),
        exit_code=EXIT_USAGE,
        says=r"error: .*episodes\.jsonl, line 2: .*remove that line",
    ),
}
"""Faults by name."""

assert LAST_STEP - BASE_STEP == 2, "simulators are lost in the step after that of the gate"
