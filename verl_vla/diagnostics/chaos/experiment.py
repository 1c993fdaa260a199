"""A fault that is put into a training: what becomes of it, and whether that is as it should be."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from verl_vla.diagnostics.chaos.comparison import contents, differing
from verl_vla.diagnostics.chaos.trial import (
    FAULT_LINE,
    START_LIMIT_S,
    NoMomentError,
    Trial,
    copy_base,
)

NOT_DISTURBED = -1001
"""Stands for the exit code of a training that ended before its fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault, and what a training is to do about it."""

    exit_code: int
    """Of the disturbed training; 0 where it survives."""
    says: str
    """Pattern that the disturbed training must print."""
    damage: Callable[[Trial], None] | None = None
    """Done to the folder before the training starts."""
    disturb: Callable[[Trial], None] | None = None
    """Done to the training while its reward works in the step after `BASE_STEP`."""
    is_early: bool = False
    """True where it is disturbed while the learner is loaded, instead."""
    repair: Callable[[Trial], None] | None = None
    """Done before the training is resumed: the remedy that it names."""
    reward_line: str = FAULT_LINE
    """Line of the reward in the disturbed training."""
    words: Sequence[str] = ()
    """Words of the disturbed training beside `WORDS`."""
    keeps_folder: bool = False
    """True where nothing of the folder may change."""
    lost_episodes: bool = False
    """True where episodes crash, so that the last step has other numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one training."""

    fault: str
    exit_code: int
    end_s: float
    """Seconds from the fault to the end of the process; from when its reward was asked, or from its
    start, where it was damaged before."""
    children_s: float | None
    """Seconds from the end to that of its last child; None where one outlived
    `CHILDREN_LIMIT_S`."""
    equal: bool
    """True where metrics, episodes and weights are those of the undisturbed run, digit for
    digit."""
    complaints: tuple[str, ...]
    """What is not as it should be."""


def run_trial(undisturbed: Trial, name: str, fault: Fault) -> Verdict:
    """Inject a fault into a training, and resume it where it ends."""
    trial = Trial(undisturbed.folder.parent, name)
    copy_base(undisturbed, trial)
    try:
        return _run(undisturbed, trial, name, fault)
    # of one trial: the others are still worth their time
    except (NoMomentError, ProcessLookupError) as error:
        return Verdict(
            fault=name,
            exit_code=NOT_DISTURBED,
            end_s=0.0,
            children_s=None,
            equal=False,
            complaints=(str(error),),
        )
    finally:
        trial.open_gate()
        trial.kill_all()


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    """How a disturbed training ended."""

    exit_code: int
    end_s: float
    children_s: float | None
    said: str
    is_changed: bool
    """True where something of the folder was."""


def _run(undisturbed: Trial, trial: Trial, name: str, fault: Fault) -> Verdict:
    end = _disturb(trial, fault)
    complaints = _complaints(fault, end)
    if end.exit_code != 0:
        trial.kill_all()
        if fault.repair is not None:
            fault.repair(trial)
        trial.start()
        resumed = trial.await_end(START_LIMIT_S)
        if resumed:
            complaints.append(f"resumed, it ends with {resumed}")
    other = differing(undisturbed, trial, but_last=fault.lost_episodes)
    return Verdict(
        fault=name,
        exit_code=end.exit_code,
        end_s=end.end_s,
        children_s=end.children_s,
        equal=not other,
        complaints=(*complaints, *other),
    )


def _disturb(trial: Trial, fault: Fault) -> _End:
    if fault.damage is not None:
        fault.damage(trial)
    before = contents(trial.folder)
    if fault.disturb is not None:
        trial.close_gate()
    trial.start(fault.words, fault.reward_line)
    began = time.time()
    if fault.disturb is not None:
        trial.await_gate(is_early=fault.is_early)
        began = time.time()
        fault.disturb(trial)
        trial.open_gate()
    code = trial.await_end()
    ended = time.time()
    # what is damaged, or in the reward, comes after it was asked
    if fault.disturb is None and trial.reached.exists():
        began = trial.reached.stat().st_mtime
    return _End(
        exit_code=code,
        end_s=ended - began,
        children_s=trial.await_children(),
        said=trial.said(),
        is_changed=contents(trial.folder) != before,
    )


def _complaints(fault: Fault, end: _End) -> list[str]:
    found = {
        f"exit code {end.exit_code} instead of {fault.exit_code}": end.exit_code != fault.exit_code,
        f"it does not say {fault.says!r}": not re.search(fault.says, end.said),
        "a traceback": "Traceback" in end.said,
        "the folder was changed": fault.keeps_folder and end.is_changed,
        "a child is left": end.children_s is None,
    }
    return [complaint for complaint, is_true in found.items() if is_true]


def send(number: signal.Signals, part: str | None = None) -> Callable[[Trial], None]:
    """Return a disturbance: a signal to the training, or to its process with ``part`` (`find`)."""

    def disturb(trial: Trial) -> None:
        os.kill(trial.pid if part is None else trial.find(part), number)

    return disturb


def as_json(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as plain values."""
    return json.loads(json.dumps({name: getattr(verdict, name) for name in verdict.__slots__}))
