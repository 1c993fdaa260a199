"""Plots of a measurement: progress along episodes, progress over true progress, and features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from verl_vla.rewards import Floats
from verl_vla.rewards.benchmark.bench import BenchRow

COLUMNS = 4
PANEL_INCHES = (2.9, 2.5)
DPI = 120
TITLE_SIZE = "x-small"
SOLVED, FAILED = "#2a7f4f", "#c03020"
PERPLEXITY = 30.0
"""Perplexity of t-SNE, in the range that its authors suggest; lower for few episodes."""
MOMENTS = 21
"""Number of points at which curves of different lengths are interpolated and averaged."""

# to files alone, also where there is no display
mpl.use("Agg")


def draw_progress(path: Path, rows: Sequence[BenchRow], success: npt.NDArray[np.bool_]) -> None:
    """Plot the mean progress along successes and failures, one panel per reward.

    Args:
        path: path of the image file.
        rows: rows of the table; those without curves are left out.
        success: [B], outcomes of the test episodes.
    """
    followed = [row for row in rows if row.readings.curves]
    figure, panels = _panels(len(followed))
    share = np.linspace(0, 1, MOMENTS)
    for axes, row in zip(panels, followed, strict=False):
        curves = [
            np.interp(share, np.linspace(0, 1, len(curve)), curve) for curve in row.readings.curves
        ]
        solved = success[: len(curves)]
        for chosen, colour, name in ((solved, SOLVED, "success"), (~solved, FAILED, "failure")):
            mine = [curves[i] for i in np.flatnonzero(chosen) if not np.isnan(curves[i]).any()]
            if mine:
                axes.plot(share, np.mean(mine, axis=0), color=colour, label=f"{name} ({len(mine)})")
        axes.set_title(row.label, fontsize=TITLE_SIZE)
        axes.set(xlabel="share of the episode", ylabel="progress")
        if axes.lines:
            axes.legend(frameon=False, fontsize="x-small")
    figure.suptitle("mean progress along an episode, outcome hidden", fontsize="small")
    figure.savefig(path)


def draw_reliability(
    path: Path, rows: Sequence[BenchRow], truth: Floats, success: npt.NDArray[np.bool_]
) -> None:
    """Plot the progress of every failure over its true progress, one panel per reward."""
    figure, panels = _panels(len(rows))
    for axes, row in zip(panels, rows, strict=False):
        axes.scatter(truth[~success], row.readings.progress[~success], s=6, color=FAILED, alpha=0.6)
        value = row.by_progress.spearman.value
        says = f"\nSpearman {value:.2f}" if math.isfinite(value) else ""
        axes.set_title(row.label + says, fontsize=TITLE_SIZE)
        axes.set(
            xlabel="true progress",
            ylabel="progress",
            xlim=(-0.02, 1.02),
        )
    figure.suptitle("failures on starts that were not learned from", fontsize="small")
    figure.savefig(path)


def draw_features(
    path: Path, rows: Sequence[BenchRow], truth: Floats, success: npt.NDArray[np.bool_]
) -> bool:
    """Plot the last features of every episode in two dimensions, one panel per feature space.

    Only neighbourhood is meaningful in a t-SNE plot: axes and gaps have no scale.

    Returns:
        True if any reward had features; otherwise nothing is written.
    """
    # reversed, so that of the rewards of one space the first one stays
    spaces = {
        row.readings.feature_space: row
        for row in reversed(rows)
        if row.readings.end_features is not None
    }
    if not spaces:
        return False
    figure, panels = _panels(len(spaces))
    for axes, row in zip(panels, reversed(spaces.values()), strict=False):
        features = row.readings.end_features
        assert features is not None
        x, y = in_two_dimensions(features).T
        axes.scatter(x[success], y[success], s=14, marker="*", color=SOLVED, label="success")
        dots = axes.scatter(
            x[~success], y[~success], s=7, c=truth[~success], cmap="plasma", vmin=0, vmax=1
        )
        figure.colorbar(dots, ax=axes, label="true progress of failures")
        axes.set_title(f"{row.label}\n{row.readings.feature_space}", fontsize=TITLE_SIZE)
        axes.set(xticks=[], yticks=[])
        axes.legend(frameon=False, fontsize="x-small")
    figure.suptitle("last features of each episode, t-SNE", fontsize="small")
    figure.savefig(path)
    return True


def in_two_dimensions(features: Floats) -> Floats:
    """Map [B, D] to [B, 2] by t-SNE (van der Maaten and Hinton 2008), with a fixed seed."""
    # t-SNE looks at three times as many neighbours
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init="random", random_state=0).fit_transform(features)


def _panels(num: int) -> tuple[Figure, Sequence[Axes]]:
    """Make a grid of at least ``num`` panels; surplus ones are hidden."""
    columns = min(COLUMNS, max(num, 1))
    lines = max(1, -(-num // columns))
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * lines + 0.4)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    panels: list[Axes] = list(grid.ravel())
    for axes in panels:
        axes.tick_params(labelsize="x-small")
    for axes in panels[num:]:
        axes.set_visible(False)
    return figure, panels
