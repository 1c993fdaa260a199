"""Inject faults into real trainings of the mini suite, and print what became of each run.

Each fault has a training of its own, which is resumed where it ends. The exit code is 1 if one does
not end as it should, or resumes with other numbers than an undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from verl_vla.core.errors import ConfigError
from verl_vla.core.files import atomic_write, folder_lock
from verl_vla.core.provenance import provenance
from verl_vla.core.text import nearest
from verl_vla.diagnostics.chaos.experiment import NOT_DISTURBED, Verdict, as_json, run_trial
from verl_vla.diagnostics.chaos.faults import FAULTS
from verl_vla.diagnostics.chaos.trial import HANGS, train_undisturbed

logger = logging.getLogger(__name__)

EXIT_FAULTY = 1
RESULT = "chaos.json"
NO_CODE = {HANGS: "hangs", NOT_DISTURBED: "too early"}
HEADER = "fault | end | s | children gone, s | as undisturbed"


def run(options: argparse.Namespace) -> int:
    """Try the faults, print a table, and return 1 if a training did not end as it should."""
    names = list(FAULTS) if options.faults is None else list(options.faults)
    for name in names:
        if name not in FAULTS:
            raise ConfigError(f"--faults has {name!r}; {nearest(name, list(FAULTS))}")
    out = Path(options.out).resolve()
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out is {out}, which is not empty; choose a new folder")
    with folder_lock(out):
        undisturbed = train_undisturbed(out)
        logger.info("%s", HEADER)
        verdicts: list[Verdict] = []
        for name in names:
            verdicts.append(run_trial(undisturbed, name, FAULTS[name]))
            logger.info("%s", row(verdicts[-1]))
            _write(out / RESULT, verdicts)
    faulty = [verdict for verdict in verdicts if verdict.complaints]
    logger.info("%d of %d as they should be", len(verdicts) - len(faulty), len(verdicts))
    for verdict in faulty:
        logger.error("%s: %s", verdict.fault, "; ".join(verdict.complaints))
    return EXIT_FAULTY if faulty else 0


def row(verdict: Verdict) -> str:
    """Return a verdict as a row of a table."""
    fault = FAULTS[verdict.fault]
    code = NO_CODE[verdict.exit_code] if verdict.exit_code in NO_CODE else str(verdict.exit_code)
    gone = "no" if verdict.children_s is None else f"{verdict.children_s:.0f}"
    same = "yes" if verdict.equal else "no"
    if fault.lost_episodes and verdict.equal:
        same = "yes, up to the lost episodes"
    if verdict.exit_code == 0:
        return f"{verdict.fault} | goes on | | {gone} | {same}"
    return f"{verdict.fault} | {code} | {verdict.end_s:.0f} | {gone} | {same}"


def _write(file: Path, verdicts: Sequence[Verdict]) -> None:
    record = {"trials": [as_json(v) for v in verdicts], "versions": provenance()}
    atomic_write(file, json.dumps(record, indent=1))
