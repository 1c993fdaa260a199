"""The published LIBERO protocol, and the success rates of published policies.

The rates are in ``published_rates.yaml``, each with its source. They are for complete suites, so a
rate is compared with those of the same suite, and known differences are listed with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from verl_vla.config.choices import Fixtures
from verl_vla.core.errors import ConfigError
from verl_vla.core.success_rate import SuccessRate
from verl_vla.core.text import TextTable
from verl_vla.envs.base import EnvConfig, Suite
from verl_vla.policies.base import PolicyShape
from verl_vla.rl.setup import PUBLISHED_RENDER_SIZE

RATES_FILE = Path(__file__).with_name("published_rates.yaml")

DEFAULTS: Mapping[str, Any] = {
    "states": "held_out",
    "temperature": 0.0,
    "step_limit": "published",
    "render_size": None,
}
"""Options of ``eval`` that a protocol decides, and their values without one."""

ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "states": ("official",),
    "temperature": (0.0,),
    "step_limit": ("published", "simplevla"),
    "render_size": (PUBLISHED_RENDER_SIZE,),
}
"""Values of these options under the published protocol, the default first. Both step limits are
published: openvla-oft's, and SimpleVLA-RL's and SRPO's 512."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRow:
    """One published policy or family of policies: a row of ``published_rates.yaml``."""

    name: str
    source: str
    """Key of `Published.sources`."""
    rates: Mapping[str, float]
    """Success rate in percent, by suite."""
    mean: float
    """Mean over the suites in percent, as published."""
    cameras: int
    proprio: bool
    """True if the policy reads the robot's own state."""
    actions: Literal["tokens", "regression"]
    limit: Literal["published", "simplevla"]
    fixtures: Fixtures | None
    """Placement of fixtures; None if unknown."""
    episodes: int
    """Number of episodes per suite."""
    notes: Sequence[str]

    def rate(self, suite_name: str) -> SuccessRate:
        """Return the rate in a suite, with the counts from which it was rounded."""
        # published to a tenth of a percent, which is less than one episode
        successes = round(self.rates[suite_name] / 100 * self.episodes)
        return SuccessRate(successes=successes, episodes=self.episodes, crashes=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Contents of ``published_rates.yaml``."""

    suites: Sequence[str]
    common: Sequence[str]
    """Facts that hold for every row."""
    sources: Mapping[str, str]
    rows: Sequence[PublishedRow]


@cache
def published() -> Published:
    """Read ``published_rates.yaml``."""
    stored = yaml.safe_load(RATES_FILE.read_text())
    suites = stored["suites"]
    rows = [
        PublishedRow(**row | {"rates": dict(zip(suites, row["rates"], strict=True))})
        for row in stored["rows"]
    ]
    return Published(suites=suites, common=stored["common"], sources=stored["sources"], rows=rows)


def complete(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of ``eval`` that a protocol decides, each with a value.

    Args:
        options: command-line options, None where not given; with ``suite`` and ``protocol``.

    Raises:
        ConfigError: an option contradicts the protocol, or the suite has no published rates.
    """
    given = {name: options[name] for name in DEFAULTS}
    if options["protocol"] is None:
        return {name: DEFAULTS[name] if value is None else value for name, value in given.items()}
    if options["suite"] not in published().suites:
        raise ConfigError(
            f"--protocol is published, but there are no published rates of {options['suite']!r} to "
            f"compare with; choose among {', '.join(published().suites)}, or write --states "
            "official in its place, which plays all recorded init states"
        )
    for name, value in given.items():
        if value is not None and value not in ALLOWED[name]:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {value}, but published evaluations have "
                f"{' or '.join(map(str, ALLOWED[name]))}; leave it out, or leave out --protocol"
            )
    return {name: ALLOWED[name][0] if value is None else value for name, value in given.items()}


def compare_with_published(
    chosen: Suite, ours: SuccessRate, shape: PolicyShape, env: EnvConfig, num_tasks: int
) -> dict[str, Any]:
    """Compare a success rate with the published ones of its suite, as JSON.

    Args:
        chosen: the suite, one of `Published.suites`.
        ours: our success rate over all episodes.
        shape: shape of our policy.
        env: our environment, with its step limit and placement of fixtures.
        num_tasks: number of tasks that were evaluated.

    Returns:
        ``ours``; ``left_out``, the parts of the protocol that were not evaluated; ``common``, facts
        that hold for all rows; and ``rows``, each with its ``rate``, ``ci95`` and ``mean``, whether
        its interval and ours overlap (``overlaps``, null without episodes of ours), and the list
        ``differs``.
    """
    rows: list[dict[str, Any]] = []
    for row in published().rows:
        theirs = row.rate(chosen.name)
        rows.append(
            {
                "name": row.name,
                "source": published().sources[row.source],
                "rate": row.rates[chosen.name] / 100,
                "episodes": row.episodes,
                "ci95": list(theirs.ci95),
                "mean": row.mean / 100,
                # intervals apart show a difference; overlapping ones do not show that there is none
                "overlaps": _overlap(ours.ci95, theirs.ci95) if ours.episodes else None,
                "differs": _differences(row, chosen, shape, env),
            }
        )
    return {
        "protocol": "published",
        "ours": ours.as_json(),
        "left_out": _left_out(chosen, ours, num_tasks),
        "common": list(published().common),
        "rows": rows,
    }


def published_table(suite_name: str, compared: Mapping[str, Any]) -> TextTable:
    """Format the result of `compare_with_published`: a line per policy, then a legend."""
    # every difference once, with a letter that rows refer to
    texts = list(dict.fromkeys(text for row in compared["rows"] for text in row["differs"]))
    marks = {text: chr(ord("a") + i) for i, text in enumerate(texts)}
    head = [suite_name, "rate", "95% interval", "episodes", "4 suites", "overlap", "differs"]
    rows = [["this policy", *_rate_cells(compared["ours"]), "", "", ""]]
    for row in compared["rows"]:
        overlap = {True: "yes", False: "NO", None: "-"}[row["overlaps"]]
        differs = " ".join(marks[text] for text in row["differs"])
        mean = f"{100 * row['mean']:.1f}%"
        rows.append([row["name"], *_rate_cells(row), mean, overlap, differs])
    notes = ["", *(f"{mark}  {text}" for text, mark in marks.items())]
    notes.append(f"Published rows: {', '.join(compared['common'])}.")
    if compared["left_out"]:
        notes.append(
            f"Not the whole protocol: {', '.join(compared['left_out'])} were evaluated; the "
            "published rates are of all."
        )
    return TextTable(head, rows, left=(0, len(head) - 1), notes=notes)


def _rate_cells(rate: Mapping[str, Any]) -> list[str]:
    low, high = (100 * end for end in rate["ci95"])
    share = "-" if rate["rate"] is None else f"{100 * rate['rate']:.1f}%"
    return [f"{share:>6}", f"{low:.1f}-{high:.1f}%", str(rate["episodes"])]


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def _left_out(chosen: Suite, ours: SuccessRate, num_tasks: int) -> list[str]:
    """List the evaluated shares of tasks and init states that are incomplete."""
    # a crashed episode was evaluated as well, with no outcome
    per_task = (ours.episodes + ours.crashes) // num_tasks
    counts = [
        (num_tasks, len(chosen.tasks), "tasks"),
        (per_task, chosen.num_init_states, "init states a task"),
    ]
    return [f"{n} of {total} {what}" for n, total, what in counts if n < total]


def _differences(row: PublishedRow, chosen: Suite, shape: PolicyShape, env: EnvConfig) -> list[str]:
    """List differences between a published row and our evaluation, and the notes of the row."""
    theirs, ours = (chosen.step_limit(name, task_id=0) for name in (row.limit, env.step_limit))
    found = [
        (row.cameras != shape.num_views, f"cameras: {row.cameras}, here {shape.num_views}"),
        (
            row.proprio != bool(shape.proprio_dim),
            f"proprioception: {_yes(row.proprio)}, here {_yes(bool(shape.proprio_dim))}",
        ),
        (row.actions != "tokens", f"actions: {row.actions}, here tokens"),
        (theirs != ours, f"step limit: {theirs}, here {ours}"),
        (
            # not known is no difference that could be named
            row.fixtures not in (None, env.fixtures),
            f"fixtures: {row.fixtures}, here {env.fixtures}; they are up to 2 cm apart",
        ),
    ]
    return [text for differs, text in found if differs] + list(row.notes)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
