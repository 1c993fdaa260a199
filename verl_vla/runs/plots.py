"""Plots and a success table of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from verl_vla.core.text import TextTable

BARS = " ▁▂▃▄▅▆▇█"
"""Bar characters in eighths of a character cell."""

# to files alone, also where there is no display
mpl.use("Agg")


def draw_curve(
    path: Path, lines: Sequence[Mapping[str, float]], title: str, *, sampling: str
) -> None:
    """Plot the training success of every step and each held-out evaluation with its interval.

    Args:
        path: path of the image file.
        lines: lines of ``metrics.jsonl``.
        title: title of the figure.
        sampling: sampling of the held-out evaluations, in the words of
            `verl_vla.evaluation.conditions.sampling_of`.
    """
    # not pyplot, which keeps every figure until it is closed
    figure = Figure(figsize=(7.2, 4.2), dpi=140, layout="constrained")
    axes = figure.subplots()
    trained = [line for line in lines if "env/success_rate" in line]
    axes.plot(
        [line["step"] for line in trained],
        [100 * line["env/success_rate"] for line in trained],
        marker=".",
        color="#8899aa",
        label="training episodes, sampled",
    )
    judged = [line for line in lines if "val/success_rate" in line]
    if judged:
        rate = [100 * line["val/success_rate"] for line in judged]
        # errorbar takes distances from the point, not the ends of the interval
        low = [100 * (line["val/success_rate"] - line["val/ci_low"]) for line in judged]
        high = [100 * (line["val/ci_high"] - line["val/success_rate"]) for line in judged]
        episodes = int(judged[0]["val/episodes"])
        axes.errorbar(
            [line["step"] for line in judged],
            rate,
            yerr=[low, high],
            fmt="o-",
            capsize=4,
            color="#c03020",
            label=f"held-out, {sampling}, {episodes} episodes, 95% interval",
        )
    axes.set(xlabel="training step", ylabel="success, %", ylim=(0, 100), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path)


def draw_sft_curve(path: Path, lines: Sequence[Mapping[str, float]], title: str) -> None:
    """Plot the loss of fine-tuning, the accuracy of action tokens, and the success rate.

    Args:
        path: path of the image file.
        lines: lines of the run's ``metrics.jsonl``.
        title: title of the figure.
    """
    figure = Figure(figsize=(7.2, 4.2), dpi=140, layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    curves = (
        (left, "train/loss", 1, "#8899aa", "loss"),
        (right, "train/accuracy", 100, "#aaccaa", "tokens right, training"),
        (right, "val/accuracy", 100, "#208040", "tokens right, held out"),
        (right, "val/success_rate", 100, "#c03020", "held-out starts solved"),
    )
    for axes, name, factor, color, label in curves:
        measured = [line for line in lines if name in line]
        if measured:
            axes.plot(
                [line["step"] for line in measured],
                [factor * line[name] for line in measured],
                marker="o" if len(measured) < len(lines) else None,
                color=color,
                label=label,
            )
    left.set(xlabel="step", ylabel="loss, nats per token", title=title)
    right.set(ylabel="share, %", ylim=(0, 100))
    left.grid(alpha=0.3)
    # of the figure: a legend of one axes would lack the curves of its twin
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def text_curve(values: Sequence[float]) -> str:
    """Format shares as a row of bars, for the console.

    >>> text_curve([0.0, 0.5, 1.0])
    ' ▄█'
    """
    return "".join(BARS[round(value * (len(BARS) - 1))] for value in values)


def success_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> TextTable:
    """Format two evaluations as a table, per task and pooled, with counts and intervals.

    Args:
        before: a record of `verl_vla.runs.run_dir.evaluation_record`.
        after: a record of the same tasks and starts.
    """
    rows = [(name, before["tasks"][name], after["tasks"][name]) for name in before["tasks"]]
    rows.append(("all tasks", before["total"], after["total"]))
    head = [f"held-out, {before['sampling']}", "before", "after"]
    return TextTable(head, [[name, _cell(old), _cell(new)] for name, old, new in rows])


def _cell(rate: Mapping[str, Any]) -> str:
    low, high = (100 * end for end in rate["ci95"])
    share = f"{100 * rate['rate']:5.1f}%"
    counts = f"{rate['successes']}/{rate['episodes']}"
    return f"{share} {counts:>7} [{low:4.1f},{high:5.1f}]"
