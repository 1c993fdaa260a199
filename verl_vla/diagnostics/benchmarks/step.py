"""Benchmark of training steps against another commit: same seed, same episodes, same numbers."""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verl_vla.core.errors import ConfigError
from verl_vla.core.files import PROJECT_FOLDER
from verl_vla.diagnostics.benchmarks.measuring import Record, record, require_positive, spread
from verl_vla.runs.metrics import is_reproducible, read_metrics

SPINE = "d067d8f"
"""First commit that trains ``mini`` under veRL from end to end, before any optimization."""
PUSHING = (
    "recipe=quickstart policy.path={project}/bases/mini environment.tasks=[0] "
    "sampling.temperature=0.8 trainer.total_training_steps=3 trainer.eval_before=false "
    "trainer.eval_every=0 trainer.save_every=0"
)
"""Training arguments of both runs: the current base, whose format the other commit can read, on a
task that it has: push the red cube."""
PLATFORM = re.compile(r'^verl_vla = "(.+)"$', re.MULTILINE)
"""Line of ``pyproject.toml`` with the module by which veRL finds the CPU platform."""
LATER = "cold_start.mode=off"
PARTS = {
    "step": ("timing_s/step", "time/step_s"),
    "rollout": ("timing_s/gen", "time/rollout_s"),
    "update": ("timing_s/update", "time/update_s"),
    "transfer": ("timing_s/transfer", "time/transfer_s"),
}
"""Parts of a training step: the current metric, and its name in commits before docs/metrics.md."""

Lines = list[dict[str, float]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add = parser.add_argument
    add("--against", default=SPINE, help="the other commit")
    add("--training", default=PUSHING, help="arguments of both runs, as for train, in quotes")
    add("--now", default=LATER, help="arguments of the current commit only")
    add("--pairs", type=int, default=2, help="runs of each commit; the commits alternate")


def measure(options: argparse.Namespace) -> Record:
    """Run both commits alternately; a run's first step builds simulators and is not counted."""
    require_positive(options, "pairs")
    # no format(), which would read other braces as names too
    arguments = options.training.replace("{project}", str(PROJECT_FOLDER)).split()
    runs: dict[str, list[Lines]] = {"then": [], "now": []}
    with _checkout(options.against) as then, tempfile.TemporaryDirectory() as folder:
        for pair in range(options.pairs):
            # the commits alternate, so that a change of the machine's load meets both
            for name, tree, own in (
                ("then", then, []),
                ("now", PROJECT_FOLDER, options.now.split()),
            ):
                out = Path(folder) / f"{name}{pair}"
                runs[name].append(_train(tree, [*arguments, *own], out))
    results = {"against": options.against, "training": options.training, "pairs": options.pairs}
    return record("step", options, results | compare(runs["then"], runs["now"]))


def compare(then: Sequence[Lines], now: Sequence[Lines]) -> dict[str, Any]:
    """Compare runs of two commits: seconds of a step, and equality of the metrics."""
    found: dict[str, Any] = {}
    for part in PARTS:
        before, after = _seconds(then, part), _seconds(now, part)
        found[f"{part}_then_s"] = spread(before, 2)
        found[f"{part}_now_s"] = spread(after, 2)
        times = statistics.median(before) / statistics.median(after)
        found[f"{part}_times_faster"] = round(times, 2)
    # names that both commits know, without seconds and memory
    names = [n for n in then[0][0] if n in now[0][0] and is_reproducible(n)]
    different = {
        name
        for a, b in zip(then[0], now[0], strict=True)
        for name in names
        if not _equal(a, b, name)
    }
    return found | {"numbers_compared": len(names), "numbers_that_differ": sorted(different)}


def _equal(a: Mapping[str, float], b: Mapping[str, float], name: str) -> bool:
    return a[name] == b[name] or (a[name] != a[name] and b[name] != b[name])  # both are NaN


def _seconds(runs: Sequence[Lines], part: str) -> list[float]:
    return [
        next(line[name] for name in PARTS[part] if name in line)
        for lines in runs
        for line in lines[1:]
    ]


def _train(tree: Path, arguments: list[str], out: Path) -> Lines:
    done = subprocess.run(
        [sys.executable, "-m", "verl_vla", "train", *arguments, f"out={out}"],
        cwd=tree,
        # the package of this tree, not the installed one
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ConfigError(
            f"train {' '.join(arguments)} ended with {done.returncode} in {tree}; its last "
            f"output:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    lines = read_metrics(out / "metrics.jsonl")
    if len(lines) < 2:
        raise ConfigError("the run has one training step; set at least 2, the first is left out")
    return lines


@contextmanager
def _checkout(commit: str) -> Generator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            write_entry_points(tree)
            yield tree
        finally:
            # --force: the entry points are not under version control
            _git("worktree", "remove", "--force", str(tree))


def write_entry_points(tree: Path) -> None:
    """Write the entry points of a checkout beside its package.

    veRL finds the CPU platform by an entry point. On ``PYTHONPATH`` these come before those of the
    installed package, which name the modules of the current commit.

    Args:
        tree: root of the checkout, with its ``pyproject.toml``.

    Raises:
        ConfigError: the commit has no entry point for veRL.
    """
    platform = PLATFORM.search((tree / "pyproject.toml").read_text())
    if platform is None:
        raise ConfigError(
            f"the pyproject.toml of {tree} names no platform for veRL; set --against to a commit "
            f"from {SPINE} on"
        )
    metadata = tree / "verl_vla.egg-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: verl-vla\n")
    (metadata / "entry_points.txt").write_text(f"[verl.plugins]\nverl_vla = {platform[1]}\n")


def _git(*arguments: str) -> None:
    done = subprocess.run(["git", *arguments], cwd=PROJECT_FOLDER, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"git {' '.join(arguments)} failed: {done.stderr.strip()}")
