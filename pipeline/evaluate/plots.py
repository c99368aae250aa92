"""Calibration and ROC of a split's predictions as PNG, one panel per task."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Scored = Mapping[str, tuple[np.ndarray, np.ndarray]]  # task -> scores [n] in 0..1, labels [n]


def plot_calibration(scored: Scored, num_bins: int, path: Path) -> None:
    """Mean score against the rate of positives in bins of equally many rows; the diagonal is
    perfect.
    """

    def draw_panel(axes: Axes, scores: np.ndarray, labels: np.ndarray) -> None:
        means, rates = [], []
        for rows in np.array_split(np.argsort(scores, kind="stable"), num_bins):
            if len(rows):
                means.append(scores[rows].mean())
                rates.append(labels[rows].mean())

        end = max(*means, *rates)
        axes.plot(means, rates, "o-", markersize=3)
        axes.plot([0, end], [0, end], color="grey", linewidth=0.8)
        axes.set(xlabel="mean score", ylabel="rate of positives")

    _draw_panels(scored, draw_panel, path)


def plot_roc(scored: Scored, path: Path) -> None:
    """Share of positives against share of negatives above each threshold."""

    def draw_panel(axes: Axes, scores: np.ndarray, labels: np.ndarray) -> None:
        hit = labels[np.argsort(-scores, kind="stable")].astype(bool)
        false_rate = np.cumsum(~hit) / max((~hit).sum(), 1)
        true_rate = np.cumsum(hit) / max(hit.sum(), 1)

        axes.plot(false_rate, true_rate)
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axes.set(xlabel="false positive rate", ylabel="true positive rate")

    _draw_panels(scored, draw_panel, path)


def _draw_panels(
    scored: Scored, draw_panel: Callable[[Axes, np.ndarray, np.ndarray], None], path: Path
) -> None:
    figure = Figure(figsize=(3.2 * len(scored), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(scored), squeeze=False)[0]

    for axes, (task, (scores, labels)) in zip(panels, scored.items(), strict=True):
        if len(scores):
            draw_panel(axes, scores, labels)
        axes.set_title(task)
    figure.savefig(path, dpi=110)
