"""Calibration and ROC of a split's predictions as PNG, one panel per task."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Scored = Mapping[str, tuple[np.ndarray, np.ndarray]]  # task -> scores [n] in 0..1, labels [n]


def calibration(scored: Scored, num_bins: int, path: Path) -> None:
    """Mean score against the rate of positives in bins of equally many rows; the diagonal is
    perfect.
    """

    def draw(axes: Axes, scores: np.ndarray, labels: np.ndarray) -> None:
        bins = np.array_split(np.argsort(scores, kind="stable"), num_bins)
        points = [(scores[rows].mean(), labels[rows].mean()) for rows in bins if len(rows)]
        axes.plot(*zip(*points, strict=True), "o-", markersize=3)
        end = max(max(point) for point in points)
        axes.plot([0, end], [0, end], color="grey", linewidth=0.8)
        axes.set(xlabel="mean score", ylabel="rate of positives")

    _panels(scored, draw, path)


def roc(scored: Scored, path: Path) -> None:
    def draw(axes: Axes, scores: np.ndarray, labels: np.ndarray) -> None:
        hit = labels[np.argsort(-scores, kind="stable")].astype(bool)
        axes.plot(np.cumsum(~hit) / max((~hit).sum(), 1), np.cumsum(hit) / max(hit.sum(), 1))
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axes.set(xlabel="false positive rate", ylabel="true positive rate")

    _panels(scored, draw, path)


def _panels(
    scored: Scored, draw: Callable[[Axes, np.ndarray, np.ndarray], None], path: Path
) -> None:
    figure = Figure(figsize=(3.2 * len(scored), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (task, (scores, labels)) in zip(
        figure.subplots(1, len(scored), squeeze=False)[0], scored.items(), strict=True
    ):
        if len(scores):
            draw(axes, scores, labels)
        axes.set_title(task)
    figure.savefig(path, dpi=110)
