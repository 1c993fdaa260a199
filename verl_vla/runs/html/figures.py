"""The figures of a run, as SVG to embed in a page, drawn with matplotlib."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from verl_vla.core.episode import Outcome
from verl_vla.core.success_rate import SuccessRate, count_entries
from verl_vla.runs.html.reader import GRPOView, Line, RunView, SFTView, kind_of

INK, GRID = "#30363d", "#d8dee4"
COLORS = ("#2563eb", "#d97706", "#059669", "#c026d3", "#dc2626", "#0891b2", "#65a30d", "#7c3aed")
"""Colours of tasks and runs, easy to distinguish; with more than eight they repeat."""
PARTS = {
    "timing_s/gen": "playing",
    "timing_s/reward": "scoring",
    "timing_s/transfer": "transfer",
    "timing_s/update": "update",
    "timing_s/save_checkpoint": "checkpoint",
    "timing_s/testing": "evaluation",
}
SFT_PARTS = {
    "timing_s/data": "waiting for samples",
    "timing_s/step": "learning",
    "timing_s/save_checkpoint": "checkpoint",
    "timing_s/validation": "open-loop test",
    "timing_s/testing": "evaluation",
}
KINDS = {
    "mixed": "#2563eb",
    "all solved": "#86d0a8",
    "all failed": "#d0d7de",
    "all crashed": "#dc2626",
}
STYLE: dict[Any, Any] = {
    # text stays text, which a browser can search, instead of outlines
    "svg.fonttype": "none",
    # ids without chance, so that the same run gives the same bytes
    "svg.hashsalt": "verl_vla",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
MOST_POINTS = 500
"""Number of training steps that a figure shows; runs of fine-tuning have 150,000."""
LONG_LABEL = 26
"""Length of a label, in characters, above which a legend has one label per line."""
Step = TypeVar("Step")
SIZE = (5.6, 3.0)
"""Width and height of a figure in inches; a page scales it."""


def success(view: RunView) -> str:
    """Plot training success, of a GRPO run, and held-out evaluations, each with its interval."""

    def draw(axes: Axes) -> None:
        if isinstance(view, GRPOView):
            _training_curve(axes, view, "#8b98a5", "training, sampled, 95% interval")
        _held_out_curve(axes, view, "#c2410c", "held out, 95% interval")
        _share_axis(axes, "success, %")

    return _svg(draw)


def success_by_task(view: GRPOView) -> str:
    """Plot the training success of each task."""
    shown = _shown_groups(view)

    def draw(axes: Axes) -> None:
        for i, (task, name) in enumerate(view.task_names.items()):
            points = {
                step: count_entries([e for group in of_step for e in group], {task})
                for step, of_step in shown.items()
            }
            # a step in which every episode of the task crashed has no rate
            known = {step: rate.rate for step, rate in points.items() if rate.episodes}
            axes.plot(
                list(known),
                [100 * rate for rate in known.values()],
                marker=".",
                color=COLORS[i % len(COLORS)],
                label=name.replace("_", " "),
            )
        _share_axis(axes, "training success, %")

    return _svg(draw)


def groups(view: GRPOView) -> str:
    """Plot the number of groups of each kind per training step; mixed ones are kept."""
    shown = _shown_groups(view)

    def draw(axes: Axes) -> None:
        steps, width = list(shown), _bar_width(list(shown))
        floor = np.zeros(len(steps))
        for kind, color in KINDS.items():
            counts = np.array([[kind_of(g) for g in shown[s]].count(kind) for s in steps])
            if counts.any():
                axes.bar(steps, counts, bottom=floor, color=color, label=kind, width=width)
                floor += counts
        _from_zero(axes)
        _step_axis(axes, "groups played")

    return _svg(draw)


def failures(view: GRPOView) -> str:
    """Plot the true progress of failures, and their reward unless it is 0 for all of them."""
    shown = _shown_groups(view)

    def draw(axes: Axes) -> None:
        far = {
            step: [e["progress"][-1] for group in of_step for e in group if _failed(e)]
            for step, of_step in shown.items()
        }
        _band(axes, far, "#2563eb", "true progress")
        worth = {
            step: [e["score"] for group in of_step for e in group if _failed(e)]
            for step, of_step in shown.items()
        }
        if any(score for scores in worth.values() for score in scores):
            _band(axes, worth, "#d97706", "reward")
        _from_zero(axes)
        _step_axis(axes, "failures: median and 10-90%")

    return _svg(draw)


def time_by_part(view: RunView) -> str:
    """Plot the seconds of each training step by part."""
    parts = SFT_PARTS if isinstance(view, SFTView) else PARTS

    def draw(axes: Axes) -> None:
        lines = _thin(view.trained)
        steps = [line["step"] for line in lines]
        floor, width = np.zeros(len(lines)), _bar_width(steps)
        for i, (name, label) in enumerate(parts.items()):
            seconds = np.array([line[name] if name in line else 0.0 for line in lines])
            if seconds.any():
                axes.bar(steps, seconds, bottom=floor, color=COLORS[i], label=label, width=width)
                floor += seconds
        _from_zero(axes)
        _step_axis(axes, "seconds")

    return _svg(draw)


def waits(view: GRPOView) -> str:
    """Plot the shares of rollout time spent waiting for simulators and in the policy."""
    shares = {
        "perf/env_wait_share": "waiting for simulators",
        "perf/policy_share": "policy inference",
    }

    def draw(axes: Axes) -> None:
        for i, (name, label) in enumerate(shares.items()):
            points = [(line["step"], 100 * line[name]) for line in _thin(view.trained)]
            axes.plot(*zip(*points, strict=True), marker=".", color=COLORS[i], label=label)
        _share_axis(axes, "of the rollout, %")

    return _svg(draw)


def memory(view: GRPOView) -> str:
    """Plot the peak memory of a learner process, and of its device if there is one."""
    kinds = {"perf/max_process_memory_gb": "process", "perf/max_memory_allocated_gb": "device"}

    def draw(axes: Axes) -> None:
        for i, (name, label) in enumerate(kinds.items()):
            points = [(line["step"], line[name]) for line in _thin(view.trained)]
            if any(value for _, value in points):
                axes.plot(*zip(*points, strict=True), marker=".", color=COLORS[i], label=label)
        _from_zero(axes)
        _step_axis(axes, "peak memory, GiB")

    return _svg(draw)


def learning(view: GRPOView) -> str:
    """Plot the entropy, and the share of tokens that the clip bounds of the loss stopped."""

    def draw(axes: Axes) -> None:
        lines = _thin(view.trained)
        steps = [line["step"] for line in lines]
        axes.plot(steps, [line["actor/entropy"] for line in lines], marker=".", color=INK)
        _from_zero(axes)
        right = axes.twinx()
        right.spines["right"].set_visible(True)
        for name, color in (("low", COLORS[0]), ("high", COLORS[1])):
            share = [100 * line[f"actor/pg_clipfrac_{name}"] for line in lines]
            right.plot(steps, share, marker=".", color=color)
            # a legend lists the lines of its own axes only, so these stand for their twins
            axes.plot([], [], marker=".", color=color, label=f"clipped, {name} bound")
        _from_zero(right)
        # the two axes have different ticks, and two grids would cross
        right.grid(visible=False)
        axes.plot([], [], marker=".", color=INK, label="entropy")
        right.set_ylabel("clipped tokens, %")
        _step_axis(axes, "entropy, nats per token")

    return _svg(draw)


def loss(view: SFTView) -> str:
    """Plot the loss of fine-tuning, on the training and on the held-out episodes."""

    def draw(axes: Axes) -> None:
        _curve(axes, view, "train/loss", "#8b98a5", "training")
        _curve(axes, view, "val/loss", "#c2410c", "held-out demonstrations")
        _from_zero(axes)
        _step_axis(axes, "loss, nats per token")

    return _svg(draw)


def accuracy(view: SFTView) -> str:
    """Plot the share of action tokens whose likeliest bin is the demonstrated one."""

    def draw(axes: Axes) -> None:
        _curve(axes, view, "train/accuracy", "#8b98a5", "training", 100)
        _curve(axes, view, "val/accuracy", "#c2410c", "held-out demonstrations", 100)
        _share_axis(axes, "action tokens right, %")

    return _svg(draw)


def gradient(view: SFTView) -> str:
    """Plot the learning rate and the norm of the gradient."""

    def draw(axes: Axes) -> None:
        _curve(axes, view, "train/grad_norm", INK, "norm of the gradient")
        _from_zero(axes)
        right = axes.twinx()
        right.spines["right"].set_visible(True)
        _curve(right, view, "train/lr", COLORS[0], "learning rate")
        _from_zero(right)
        right.grid(visible=False)
        right.set_ylabel("learning rate")
        axes.plot([], [], color=COLORS[0], label="learning rate")
        _step_axis(axes, "norm before clipping")

    return _svg(draw)


def _curve(
    axes: Axes, view: RunView, name: str, color: str, label: str, factor: float = 1.0
) -> None:
    """Plot a metric at the steps that have it."""
    measured = [line for line in view.lines if name in line]
    if measured:
        shown = _thin(measured)
        marker = "." if len(measured) < len(view.lines) else None
        values = [factor * line[name] for line in shown]
        axes.plot([line["step"] for line in shown], values, color=color, label=label, marker=marker)


def _thin(steps: Sequence[Step]) -> Sequence[Step]:
    """Return at most `MOST_POINTS` steps, evenly spaced, the last one included."""
    stride = -(-len(steps) // MOST_POINTS)
    return steps if stride < 2 else steps[::-1][::stride][::-1]


def _shown_groups(view: GRPOView) -> dict[int, list[list[Line]]]:
    groups = view.groups
    return {step: groups[step] for step in _thin(list(groups))}


def _bar_width(steps: Sequence[float]) -> float:
    # a bar stands for the steps that are left out beside it
    return 0.8 * max(1.0, (steps[-1] - steps[0]) / len(steps)) if steps else 0.8


def compared(views: Mapping[str, RunView]) -> str:
    """Plot the held-out success of several runs; training success for one without evaluations."""

    def draw(axes: Axes) -> None:
        for i, (name, view) in enumerate(views.items()):
            color = COLORS[i % len(COLORS)]
            if view.judged:
                _held_out_curve(axes, view, color, name)
            elif view.trained and isinstance(view, GRPOView):
                _training_curve(axes, view, color, f"{name} (training)")
        _share_axis(axes, "held-out success, %")

    return _svg(draw, (8.6, 3.6))


def _training_curve(axes: Axes, view: RunView, color: str, label: str) -> None:
    rates = [
        _counted(line["env/success_rate"], line["env/episodes"] - line["env/crashes"])
        for line in _thin(view.trained)
    ]
    steps = [line["step"] for line in _thin(view.trained)]
    low, high = (np.array([100 * rate.ci95[end] for rate in rates]) for end in (0, 1))
    axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    axes.plot(steps, [100 * rate.rate for rate in rates], marker=".", color=color, label=label)


def _held_out_curve(axes: Axes, view: RunView, color: str, label: str) -> None:
    if not view.judged:
        return
    rate = np.array([100 * line["val/success_rate"] for line in view.judged])
    low = rate - [100 * line["val/ci_low"] for line in view.judged]
    high = np.array([100 * line["val/ci_high"] for line in view.judged]) - rate
    axes.errorbar(
        [line["step"] for line in view.judged],
        rate,
        # of a rate of 0 or 1 an end may be rounded to the other side
        yerr=np.maximum(0, [low, high]),
        fmt="o-",
        markersize=4,
        capsize=3,
        color=color,
        label=label,
    )


def _band(axes: Axes, values: Mapping[int, Sequence[float]], color: str, label: str) -> None:
    known = {step: v for step, v in values.items() if v}
    steps = list(known)
    low, middle, high = (
        [float(np.percentile(v, share)) for v in known.values()] for share in (10, 50, 90)
    )
    axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
    axes.plot(steps, middle, marker=".", color=color, label=label)


def _share_axis(axes: Axes, label: str) -> None:
    # a little room, or the markers at 0 and 100% are cut
    axes.set_ylim(-2, 102)
    _step_axis(axes, label)


def _step_axis(axes: Axes, label: str) -> None:
    axes.set_xlabel("training step")
    axes.set_ylabel(label)
    # there is no step 2.5
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        columns = 3 if max(map(len, labels)) <= LONG_LABEL else 1
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=columns, borderaxespad=0)


def _from_zero(axes: Axes) -> None:
    # where all values are 0 the limits would be equal, which matplotlib warns about
    top = 1.12 * axes.dataLim.y1
    axes.set_ylim(0, top if top > 0 else 1e-3)


def _failed(episode: Line) -> bool:
    return episode["outcome"] == Outcome.TIMEOUT


def _counted(rate: float, episodes: float) -> SuccessRate:
    # a rate that is no number is one of no episodes: every one crashed
    number = round(episodes) if math.isfinite(rate) else 0
    return SuccessRate(successes=round(rate * number) if number else 0, episodes=number, crashes=0)


def _svg(draw: Callable[[Axes], None], size: tuple[float, float] = SIZE) -> str:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        # without the date, the same run gives the same bytes
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    # without its own size the figure takes that of the page, by its viewBox
    return re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", text[text.index("<svg") :])
