"""Calibration, ROC and slices of a split's predictions as PNG, one panel per task or kind."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.evaluate.slices import Slice

ROC_POINTS = 2000  # of a curve, more than a panel has pixels
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

        points = np.unique(np.linspace(0, len(hit) - 1, ROC_POINTS).astype(int))
        axes.plot(false_rate[points], true_rate[points])
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axes.set(xlabel="false positive rate", ylabel="true positive rate")

    _draw_panels(scored, draw_panel, path)


def plot_slices(lines: Sequence[Slice], tasks: Sequence[str], path: Path) -> None:
    """AUC and calibration by slice: a column of panels for each kind, a line for each task."""
    by_kind: dict[str, list[Slice]] = {}
    for line in lines:
        by_kind.setdefault(line.by, []).append(line)

    figure, panels = _make_panels(len(by_kind), 2, width=4.2, height=2.8, below=0.6)
    for column, (kind, of_kind) in enumerate(by_kind.items()):
        top, bottom = panels[0][column], panels[1][column]
        _draw_slices(top, bottom, of_kind, tasks)
        top.set(title=f"by {kind}", ylabel="AUC")
        bottom.set(ylabel="mean score / rate of positives")

    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _draw_slices(top: Axes, bottom: Axes, lines: Sequence[Slice], tasks: Sequence[str]) -> None:
    """The slices of one kind from left to right: AUC above, calibration below."""
    names: list[str] = []
    by_place: dict[tuple[str, str], Slice] = {}
    for line in lines:
        if line.slice not in names:
            names.append(line.slice)
        by_place[line.slice, line.task] = line

    places = range(len(names))
    for task in tasks:
        auc, calibration = [], []
        for name in names:
            auc.append(by_place[name, task].auc)
            calibration.append(by_place[name, task].calibration)
        top.plot(places, auc, "o-", markersize=3, label=task)
        bottom.plot(places, calibration, "o-", markersize=3)
    bottom.axhline(1, color="grey", linewidth=0.8)

    # names below the lower panel stand for both: text takes most of the drawing
    top.set_xticks(places, [])
    bottom.set_xticks(places, names, rotation=60, fontsize=8)


def _draw_panels(
    scored: Scored, draw_panel: Callable[[Axes, np.ndarray, np.ndarray], None], path: Path
) -> None:
    figure, (panels,) = _make_panels(len(scored), 1, width=3.2, height=3.2, below=0.5)
    for axes, (task, (scores, labels)) in zip(panels, scored.items(), strict=True):
        if len(scores):
            draw_panel(axes, scores, labels)
        axes.set_title(task)
    figure.savefig(path, dpi=110)


def _make_panels(
    columns: int, rows: int, *, width: float, height: float, below: float
) -> tuple[Figure, np.ndarray]:
    """A figure of panels, [rows, columns], each of so many inches with `below` of them for labels.

    Margins are given: a layout that measures labels draws all of them twice more, for seconds.
    """
    figure = Figure(figsize=(width * columns, height * rows))
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)

    beside, above = 0.65, 0.3
    inner_width, inner_height = width - beside - 0.1, height - below - above
    figure.subplots_adjust(
        left=beside / (width * columns),
        right=1 - 0.1 / (width * columns),
        bottom=below / (height * rows),
        top=1 - above / (height * rows),
        wspace=(width - inner_width) / inner_width,
        hspace=(height - inner_height) / inner_height,
    )
    return figure, panels
