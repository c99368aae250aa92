"""A search as one HTML file that needs no other: its trials as a table, each setting against the
metric, all settings as parallel coordinates, and the curves.
"""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from pipeline.evaluate.page_parts import (
    embedded_picture,
    html_table,
    number_text,
    page_head,
    png_bytes,
)
from pipeline.files import write_atomically
from pipeline.search.results import TrialResult
from pipeline.search.space import Draw
from pipeline.search.trial import FINISHED, objective

COLOURS = "viridis_r"  # dark is good
SHOWN_DIGITS = 3
NAMED = 5  # of the curves, the best
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}


def write_search_page(
    folder: Path, title: str, draws: dict[str, Draw], results: Sequence[TrialResult]
) -> Path:
    """search.html, and its two pictures of settings as PNG beside it; the path of the first.

    Args:
        results: the best first.
    """
    scatter = draw_scatter(draws, results)
    parallel = draw_parallel(draws, results)
    write_atomically(folder / "scatter.png", png_bytes(scatter))
    write_atomically(folder / "parallel_coordinates.png", png_bytes(parallel))

    best = results[0]
    metric = html.escape(_metric_of(results))
    name = html.escape(title)
    text = f"""{page_head(name)}
<h1>{name}</h1>
<p>{len(results)} trials, judged by {metric} on the same validation requests. Best:
{html.escape(best.trial.name)} with {number_text(best.value)}. A seed moves the metric, too: what
lies closer together than that is equally good.</p>
<h2>Each setting</h2>
<p>Filled: trained to its end. Hollow: ended early, at the value it had there.</p>
{embedded_picture(scatter, "each setting against the metric")}
<h2>All settings together</h2>
{embedded_picture(parallel, "parallel coordinates of all trials")}
<h2>While training</h2>
{embedded_picture(_draw_curves(results), "the metric by epochs")}
<h2>Trials</h2>
{_trials_table(list(draws), results, metric)}
</body></html>
"""
    page = folder / "search.html"
    write_atomically(page, text)
    return page


def _metric_of(results: Sequence[TrialResult]) -> str:
    """The metric that all trials of a search are judged by."""
    return objective(results[0].trial.cfg.train.best_metric)


def _trials_table(keys: Sequence[str], results: Sequence[TrialResult], metric: str) -> str:
    codes = [f"<code>{html.escape(key)}</code>" for key in keys]

    rows = []
    for result in results:
        row = [html.escape(result.trial.name), number_text(result.value), f"{result.epochs:.2f}"]
        row.append(html.escape(f"{result.status} {result.why}".strip()))
        for key in keys:
            row.append(html.escape(str(result.trial.settings[key])))
        rows.append(row)
    return html_table(["", metric, "epochs", "", *codes], rows)


def draw_scatter(draws: dict[str, Draw], results: Sequence[TrialResult]) -> Figure:
    """One diagram a setting: its values against the metric."""
    columns = min(3, len(draws))
    rows = math.ceil(len(draws) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    metric = _metric_of(results)
    shown = _judged(results)

    for place, (key, draw) in enumerate(draws.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        positions, ticks = place_values(draw, _settings_of(shown, key))
        for result, position in zip(shown, positions, strict=True):
            inside = "C0" if result.status == FINISHED else "none"
            axes.plot(position, result.value, "o", color="C0", mfc=inside)

        axes.set(xlabel=key, ylabel=metric)
        _shape_axis(axes, draw, ticks)
    return figure


def _judged(results: Sequence[TrialResult]) -> list[TrialResult]:
    """The trials that have a value of the metric."""
    return [result for result in results if math.isfinite(result.value)]


def _settings_of(results: Sequence[TrialResult], key: str) -> list[Any]:
    return [result.trial.settings[key] for result in results]


def _shape_axis(axes: Axes, draw: Draw, ticks: list[str] | None) -> None:
    """The horizontal axis, as the values are drawn."""
    if ticks is not None:
        axes.set_xticks(range(len(ticks)), ticks)
    elif draw.kind == "integers":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    elif draw.kind == "loguniform":
        low, high = draw.values
        middle = math.sqrt(low * high)
        places = (low, middle, high)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(places, [_short(value) for value in places])


def place_values(draw: Draw, values: Sequence[Any]) -> tuple[list[float], list[str] | None]:
    """Where values lie on an axis; for choices their numbers, with the labels of the ticks.

    choices [a, b]    b, a        [1, 0], ["a", "b"]
    loguniform        0.1, 0.01   [0.1, 0.01], None
    """
    if draw.kind != "choices":
        # the preset's own value may be null
        return [math.nan if value is None else float(value) for value in values], None

    labels = [str(value) for value in draw.values]
    # the preset's own value need not be a choice
    for value in values:
        if str(value) not in labels:
            labels.append(str(value))
    return [float(labels.index(str(value))) for value in values], labels


def draw_parallel(draws: dict[str, Draw], results: Sequence[TrialResult]) -> Figure:
    """A line a trial over an axis a setting, the metric last; the better, the darker."""
    shown = _judged(results)
    figure = Figure(figsize=(2.2 * (len(draws) + 1) + 1, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-0.3, len(draws) + 0.3), ylim=(-0.12, 1.12))
    axes.set_axis_off()
    if not shown:
        return figure

    # an axis for each setting
    heights = []
    for number, (key, draw) in enumerate(draws.items()):
        positions, ticks = place_values(draw, _settings_of(shown, key))
        scaled, low, high = _to_unit(positions, log=draw.kind == "loguniform")
        heights.append(scaled)

        if ticks is None:
            labels = [(0.0, _short(low)), (1.0, _short(high))]
        else:
            last = max(positions) or 1.0
            labels = [(i / last, tick) for i, tick in enumerate(ticks)]
        _draw_axis(axes, number, key, labels)

    # and one for the metric
    scaled, low, high = _to_unit([result.value for result in shown], log=False)
    heights.append(scaled)
    ends = [(0.0, _short(low, 4)), (1.0, _short(high, 4))]
    _draw_axis(axes, len(draws), _metric_of(shown), ends)

    # a line for each trial
    colours = matplotlib.colormaps[COLOURS](np.linspace(1, 0, len(shown)))
    lines = list(zip(np.array(heights).T, colours, strict=True))
    for line, colour in reversed(lines):  # the best on top
        axes.plot(range(len(draws) + 1), line, color=colour, linewidth=1.6)
    return figure


def _to_unit(values: Sequence[float], *, log: bool) -> tuple[np.ndarray, float, float]:
    """The values between 0 and 1, and the two that lie there.

    2, 3, 6             0, 0.25, 1    2 and 6
    1, 10, 100, log     0, 0.5, 1     1 and 100
    7, 7                0.5, 0.5      7 and 7
    """
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low == high:
        return np.full(len(values), 0.5), low, high

    found, ends = np.array(values), np.array([low, high])
    if log and low > 0:
        found, ends = np.log(found), np.log(ends)
    return (found - ends[0]) / (ends[1] - ends[0]), low, high


def _draw_axis(axes: Axes, number: int, name: str, ticks: Sequence[tuple[float, str]]) -> None:
    axes.axvline(number, 0.1, 0.9, color="grey", linewidth=0.8)
    axes.text(number, 1.1, name, ha="center", fontsize=9)
    for height, label in ticks:
        if height <= 1:
            axes.text(number + 0.03, height, label, va="center", fontsize=8, bbox=LABEL_BOX)


def _short(value: float, digits: int = SHOWN_DIGITS) -> str:
    return f"{value:.{digits}g}"


def _draw_curves(results: Sequence[TrialResult]) -> Figure:
    """The metric while the trials trained; the best have a name, those that ended early dots."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()

    for number, result in enumerate(results):
        if not result.curve:
            continue
        epochs, values = zip(*result.curve, strict=True)
        line = "-" if result.status == FINISHED else ":"
        label = result.trial.name if number < NAMED else None
        axes.plot(epochs, values, line, marker=".", label=label)

    axes.set(xlabel="epochs", ylabel=_metric_of(results))
    if axes.lines:
        axes.legend(title="the best")
    return figure
