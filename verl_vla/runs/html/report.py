"""A run as a page: the self-contained ``report.html``, and the parts that the dashboard shows."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from verl_vla.core.episode import Outcome
from verl_vla.core.files import atomic_write, recording
from verl_vla.core.text import format_seconds
from verl_vla.runs.episode_recorder import video_path
from verl_vla.runs.html import figures
from verl_vla.runs.html.reader import (
    GRPOView,
    Line,
    RunView,
    SFTView,
    kind_of,
    read_run,
)

REPORT_FILE = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
REPORT_BYTES = 1 << 25
"""Bytes of each log that a report shows at most, the newest: 70,000 episodes or more, and 10,000
training steps."""
GROUPS_SHOWN = 3
"""Number of groups shown: the newest of those with videos."""
SHOWN_GROUPS = 5
"""Number of groups from which the best, the median and the worst episode are chosen."""
GOING_S = 300.0
"""Seconds without a write after which a run that has not ended is shown as silent: it stopped, or a
step takes longer."""

REFRESH_EVERY_S = 300.0
"""Seconds between two reports of an active run; they take less than 1% of its time."""

WORDS = {Outcome.SUCCESS: "solved", Outcome.TIMEOUT: "not solved", Outcome.CRASH: "simulator lost"}

VideoSource = Callable[[int], str]
"""Function from an episode's id to the address of its video."""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` of a run as it is now, atomically, and return its path.

    Raises:
        ConfigError: the folder is not that of a run.
        WriteError: the page cannot be written.
    """
    view = read_run(folder, log_bytes=REPORT_BYTES)
    body = run_body(view, charts(view), lambda episode: _embedded(video_path(folder, episode)))
    page = render("page.html", title=folder.name, body=body, live=False)
    file = folder / REPORT_FILE
    with recording(file):
        atomic_write(file, page)
    return file


class LiveReport:
    """Report of an active run, written at intervals because it takes a second or two."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written_at = time.monotonic()

    def refresh(self) -> None:
        """Write the report if the last one is older than `REFRESH_EVERY_S`."""
        if time.monotonic() - self._written_at >= REFRESH_EVERY_S:
            write_report(self._folder)
            self._written_at = time.monotonic()


def run_body(view: RunView, drawn: Sequence[tuple[str, str]], video: VideoSource) -> str:
    """Return the HTML body of one run's page.

    Args:
        view: contents of the run's files.
        drawn: result of `charts`.
        video: returns the address of an episode's video.
    """
    return render(
        "run.html",
        view=view,
        status=status(view),
        facts=_facts(view),
        tasks=_task_rows(view),
        charts=drawn,
        **_shown_episodes(view, video),
        versions=_versions(view),
        cut=view.cut,
    )


def _shown_episodes(view: RunView, video: VideoSource) -> dict[str, Any]:
    """Return the videos of a page; fine-tuning records none."""
    if not isinstance(view, GRPOView):
        return {"highlights": [], "groups": []}
    return {
        "highlights": [(title, _card(e, video)) for title, e in _best_median_worst(view)],
        "groups": [_shown_group(view, g, video) for g in view.recorded_groups[:GROUPS_SHOWN]],
    }


def charts(view: RunView) -> list[tuple[str, str]]:
    """Draw the figures of a run, by their titles; this takes a second or more."""
    # before the first step there is nothing to plot
    if not view.trained:
        return []
    if isinstance(view, SFTView):
        return [
            ("Loss", figures.loss(view)),
            ("Action tokens", figures.accuracy(view)),
            *([("Held-out starts", figures.success(view))] if view.judged else []),
            ("Learning rate and gradient", figures.gradient(view)),
            ("Time of a training step", figures.time_by_part(view)),
        ]
    assert isinstance(view, GRPOView)
    found = [("Success", figures.success(view))]
    if view.episodes:
        found += [
            ("Training success by task", figures.success_by_task(view)),
            ("Groups: mixed ones teach", figures.groups(view)),
            ("How far failures came", figures.failures(view)),
        ]
    return [
        *found,
        ("Time of a training step", figures.time_by_part(view)),
        ("Who waits for whom", figures.waits(view)),
        ("Entropy and clipping", figures.learning(view)),
        ("Memory", figures.memory(view)),
    ]


def status(view: RunView) -> str:
    """Describe the state of a run in words."""
    if view.has_ended:
        why = ", all solved" if view.last_step == view.solved_after else ""
        return f"ended after {view.last_step} training steps{why}"
    going = "going" if view.quiet_s < GOING_S else "silent"
    ago = format_seconds(view.quiet_s)
    return f"{view.last_step} of {view.total_steps} training steps, {going}, last written {ago} ago"


def share_with_counts(rate: Mapping[str, Any] | None) -> str:
    """Format a success rate with its counts and its interval, as in the tables."""
    if rate is None:
        return "\N{EM DASH}"
    if rate["rate"] is None:
        return "every simulator was lost"
    low, high = (100 * end for end in rate["ci95"])
    return (
        f"{100 * rate['rate']:.1f}% "
        f"({rate['successes']}/{rate['episodes']}, {low:.0f}\N{EN DASH}{high:.0f}%)"
    )


def render(template: str, **values: Any) -> str:
    """Fill a template; values are escaped unless the template marks them as safe."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        # a misspelt name in a template is an error, not an empty place on the page
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def _facts(view: RunView) -> list[tuple[str, str]]:
    recipe = view.recipe
    # of fine-tuning, null is a tiny policy that the run itself has made
    policy = recipe["policy"]["path"] or "made by the run"
    first, last = _ends(view)
    return [
        ("suite", recipe["environment"]["suite"]),
        ("policy", policy),
        *(_facts_of_demos(recipe) if isinstance(view, SFTView) else _facts_of_groups(view)),
        ("seed", str(recipe["seed"])),
        ("held out, first", share_with_counts(first and first["total"])),
        ("held out, last", share_with_counts(last and last["total"])),
    ]


def _facts_of_demos(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("demonstrations", recipe["demos"]["folder"]),
        ("a step", f"{recipe['optimizer']['batch_size']} samples"),
        ("learning rate", f"{recipe['optimizer']['lr']:g}"),
    ]


def _facts_of_groups(view: RunView) -> list[tuple[str, str]]:
    assert isinstance(view, GRPOView)
    sampling = view.recipe["sampling"]
    crashed = sum(episode["outcome"] == Outcome.CRASH for episode in view.episodes)
    return [
        ("reward", view.recipe["reward"]),
        ("a step", f"{sampling['groups_per_step']} groups of {sampling['group_size']}"),
        ("episodes played", f"{len(view.episodes)}, {crashed} lost with their simulator"),
    ]


def _task_rows(view: RunView) -> list[tuple[str, str, str, str]]:
    """Return rows of task name, first and last held-out rate, and step limit."""
    first, last = _ends(view)
    if first is None or last is None:
        return []
    return [
        (
            name.replace("_", " "),
            share_with_counts(first["tasks"][name]),
            share_with_counts(rate),
            str(last["step_limits"][name]),
        )
        for name, rate in last["tasks"].items()
    ]


def _ends(view: RunView) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    records = list(view.evaluations.values())
    return (records[0], records[-1]) if records else (None, None)


def _best_median_worst(view: GRPOView) -> list[tuple[str, Line]]:
    """Choose the best, the median and the worst of the newest recorded episodes."""
    recorded = [
        episode
        for group in view.recorded_groups[:SHOWN_GROUPS]
        for episode in group
        if video_path(view.folder, episode["episode"]).exists() and episode["score"] is not None
    ]
    # of equal scores: more progress first, then fewer steps
    ranked = sorted(recorded, key=lambda e: (-e["score"], -e["progress"][-1], e["steps"]))
    if len(ranked) < 3:
        return []
    return [("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1])]


def _shown_group(view: GRPOView, group: Sequence[Line], video: VideoSource) -> dict[str, Any]:
    return {
        "step": group[0]["step"],
        "task": view.task_names[group[0]["task"]].replace("_", " "),
        "init_state": group[0]["init_state"],
        "kind": kind_of(group),
        "cards": [_card(e, video) for e in group if video_path(view.folder, e["episode"]).exists()],
    }


def _card(episode: Line, video: VideoSource) -> dict[str, Any]:
    outcome = Outcome(episode["outcome"])
    return {
        "video": video(episode["episode"]),
        "is_solved": outcome is Outcome.SUCCESS,
        "episode": episode["episode"],
        "says": f"{WORDS[outcome]}, {episode['steps']} steps",
        "reward": "none" if episode["score"] is None else f"{episode['score']:.2f}",
        "progress": f"{100 * episode['progress'][-1]:.0f}%" if episode["progress"] else "unknown",
    }


def _versions(view: RunView) -> list[tuple[str, str]]:
    _, last = _ends(view)
    if last is None:
        return []
    return [("renderer", last["renderer"]), *last["versions"].items()]


def _embedded(video: Path) -> str:
    return f"data:image/webp;base64,{base64.b64encode(video.read_bytes()).decode()}"
