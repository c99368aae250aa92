"""A study as one HTML file that needs no other, for somebody who decides on a budget."""

import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pipeline.evaluate.page_parts import (
    embedded_picture,
    html_table,
    number_text,
    page_head,
    png_bytes,
)
from pipeline.files import json_text, write_atomically
from pipeline.study.figures import share_reached
from pipeline.study.laws import pareto_front
from pipeline.study.measured import COSTS

Figures = dict[str, Any]
PAPER = {"train_gflop": 5.3, "infer_gflop": 21.4}  # ULTRA-HSTU, arXiv:2602.16986, figure 1
MARKERS = "ov^sDP*X"
WANTED_SIZES, WANTED_DECADES = 5, 2.5
NEARLY = 0.005  # of AUC, below the best, or of NE above it
WORTH_SAYING = 1.1  # times the FLOP of the cheaper point


def write_study(folder: Path, figures: Figures) -> Path:
    """study.html, figures.json, and its pictures as PNG beside it; the path of the first."""
    pictures = {"slopes": draw_slopes(figures), "fronts": draw_fronts(figures)}
    if figures["laws"]:
        pictures["laws"] = draw_laws(figures)
    for name, picture in pictures.items():
        write_atomically(folder / f"{name}.png", png_bytes(picture))
    write_atomically(folder / "figures.json", json_text(figures))
    page = folder / "study.html"
    write_atomically(page, render_page(figures, pictures))
    return page


def render_page(figures: Figures, pictures: dict[str, Figure]) -> str:
    """The whole page."""
    name = html.escape(figures["name"])
    return f"""{page_head(name)}
<h1>{name}</h1>
<p>{figures["rows"]:,} rows of {figures["users"]:,} users, split {figures["split"]}, task
{html.escape(figures["task"])}; all points have scored the same rows. {seeds_text(figures)} a point.
Intervals hold 95 % of {figures["samples"]} draws of users{_seed_words(figures)}.</p>
<h2>For the budget</h2>
{_advice(figures)}
<h2>Gain for FLOP, as the paper has it</h2>
<p>Sizes and lengths grow together, a step a length ({_ladder_words(figures)}). The slope of NE gain
over analytic GFLOP per item is the scaling efficiency; it is no speed-up. A slope below 0: more
cost, and a worse NE. The paper's ratios, ULTRA-HSTU over the interleaved HSTU on its own data:
{PAPER["train_gflop"]} in training, {PAPER["infer_gflop"]} in inference. The second row is the same
against measured time, which another machine or a busy one changes.</p>
{embedded_picture(pictures["slopes"], "NE gain against cost, by encoder")}
{_slope_table(figures)}
<h2>What a larger model gives</h2>
{_laws_part(figures, pictures.get("laws"))}
<h2>What more data gives</h2>
{_data_part(figures)}
<h2>Quality against cost</h2>
<p>AUC of every point. Those on the line are beaten by no other in both; figures in bold in the
table of points are on the front of inference FLOP.</p>
{embedded_picture(pictures["fronts"], "AUC against FLOP and seconds, Pareto fronts")}
<h2>All points</h2>
{_reachable_table(figures)}
{_points_table(figures)}
{_failed_part(figures)}
</body></html>
"""


def seeds_text(figures: Figures) -> str:
    """`3 seeds`, or `1 to 3 seeds` where some points have fewer."""
    counts = [point["seeds"] for point in figures["points"]]
    fewest, most = min(counts), max(counts)
    several = "s" if most > 1 else ""
    return f"{most} seed{several}" if fewest == most else f"{fewest} to {most} seeds"


def _seed_words(figures: Figures) -> str:
    if max(point["seeds"] for point in figures["points"]) > 1:
        return " and of seeds where there are several"
    return "; they do not hold what another seed of the training would change"


def _ladder_words(figures: Figures) -> str:
    return ", ".join(f"{size} at {length}" for size, length in figures["ladder"])


# In words


def _advice(figures: Figures) -> str:
    """Sentences that a figure stands behind, each with its interval."""
    lines = [*_best_lines(figures), *_ratio_lines(figures), *next_lines(figures)]
    return "<ul>" + "".join(f"<li>{line}</li>" for line in lines) + "</ul>"


def _best_lines(figures: Figures) -> list[str]:
    """The best point, and the cheapest that is nearly as good."""
    points = _whole_points(figures)
    best = max(points, key=lambda point: point["auc"])
    near = [point for point in points if point["auc"] >= best["auc"] - NEARLY]
    cheapest = min(near, key=lambda point: (point["infer_gflop"], -point["auc"]))

    line = f"Best: {_point_words(best)}, AUC {best['auc']:.4f}"
    reached = share_reached(figures, best)
    if reached is not None:
        line += f", {reached:.0%} of what is reachable"

    lines = [line + "."]
    saved = best["infer_gflop"] / cheapest["infer_gflop"]
    if saved >= WORTH_SAYING:
        lines.append(
            f"Within .005 of it at {saved:.1f} times less inference FLOP: {_point_words(cheapest)},"
            f" AUC {cheapest['auc']:.4f}."
        )
    return lines


def _ratio_lines(figures: Figures) -> list[str]:
    """Each encoder's slope over the baseline's; one line for all where there is no ratio."""
    lines = []
    baseline = figures["baseline"]
    for cost in PAPER:
        slopes = figures["slopes"][cost]
        has_ratio = False
        for encoder, entry in slopes.items():
            if entry["ratio"] is not None:
                has_ratio = True
                lines.append(
                    f"{html.escape(encoder)} over {html.escape(baseline)}, {COSTS[cost]}: "
                    f"{interval_text(entry['ratio'], '.1f')} times the NE gain for a GFLOP."
                )
        if baseline in slopes and len(slopes) > 1 and not has_ratio:
            slope = slopes[baseline]["slope"]
            falls = slope["high"] is not None and slope["high"] < 0
            why = "gets worse with more of them" if falls else "gain is not told apart from 0"
            own = f"{html.escape(baseline)} itself" if falls else f"{html.escape(baseline)}'s own"
            lines.append(f"No ratio of gains for {COSTS[cost]}: {own} {why}.")
    return lines


def next_lines(figures: Figures) -> list[str]:
    """What a doubling of the model, of the history and of the data would give at the top."""
    lines = []
    for encoder in figures["encoders"]:
        parts = _next_parts(figures, encoder)
        if parts:
            lines.append(f"{html.escape(encoder)}: " + "; ".join(parts) + ".")
    return lines


def _next_parts(figures: Figures, encoder: str) -> list[str]:
    parts = []
    for law in figures["laws"]:
        if law["encoder"] == encoder:
            gain = interval_text(law["power"]["gain_of_doubling"], ".4f")
            parts.append(
                f"at {law['length']} rows twice the training FLOP in a larger model would lower "
                f"the NE by {gain}"
            )

    longer = _gain_of_length(figures, encoder)
    if longer is not None:
        size, gain = longer
        shorter, longest = figures["lengths"][-2:]
        name = html.escape(size)
        change = "lowered" if gain >= 0 else "raised"
        parts.append(
            f"{longest} rows in the place of {shorter} {change} the NE of {name} by {abs(gain):.4f}"
        )
        by_length = _by_length(figures, encoder, size)
        best = min(by_length, key=lambda length: by_length[length])
        if len(by_length) > 2 and by_length[longest] - by_length[best] > NEARLY:
            parts.append(f"of its lengths {best} rows have the lowest NE")

    less = figures["data"]["less"].get(encoder)
    if less is not None:
        lost = interval_text(less["lost"], ".4f")
        parts.append(f"training on {less['share']:.0%} of the data raises it by {lost}")
    return parts


def _gain_of_length(figures: Figures, encoder: str) -> tuple[str, float] | None:
    """The last step of length: NE gained, by the largest size that has both; None without one."""
    if len(figures["lengths"]) < 2:
        return None

    shorter, longest = figures["lengths"][-2:]
    for size in reversed(figures["sizes"]):
        by_length = _by_length(figures, encoder, size)
        if shorter in by_length and longest in by_length:
            return size, by_length[shorter] - by_length[longest]
    return None


def _by_length(figures: Figures, encoder: str, size: str) -> dict[int, float]:
    """NE of an encoder of one size at each length that it has."""
    found = {}
    for point in _whole_points(figures):
        if (point["encoder"], point["size"]) == (encoder, size):
            found[point["length"]] = point["ne"]["value"]
    return found


def _point_words(point: Figures) -> str:
    return f"{html.escape(point['encoder'])} {html.escape(point['size'])} at {point['length']} rows"


def interval_text(found: Figures | None, form: str) -> str:
    """`0.012 (0.008 to 0.015)`"""
    if found is None or found["value"] is None:
        return "–"
    text = format(found["value"], form)
    if found["low"] is not None:
        text += f" ({format(found['low'], form)} to {format(found['high'], form)})"
    return text


def _whole_points(figures: Figures) -> list[Figures]:
    """The points that were trained on all data."""
    return [point for point in figures["points"] if point["data_share"] == 1.0]


def _laws_part(figures: Figures, picture: Figure | None) -> str:
    """The laws with their picture; where there is none, what they would take."""
    if picture is None:
        return (
            "<p>No law and no prediction: they take four and five sizes of an encoder at one "
            "length.</p>"
        )
    words = (
        "<p>NE over training GFLOP per item, all sizes of an encoder at one length; a + b ln C "
        "dotted, a + b C<sup>-c</sup> drawn. The star is the largest size as it was measured, the "
        "circle as the smaller ones had predicted it before it was run.</p>"
    )
    shown = embedded_picture(picture, "NE against training FLOP, with laws")
    return words + shown + _prediction_table(figures) + _law_table(figures)


# Tables


def _slope_table(figures: Figures) -> str:
    rows = []
    for cost, words in COSTS.items():
        for encoder, entry in figures["slopes"][cost].items():
            is_base = encoder == figures["baseline"]
            rows.append(
                [
                    words,
                    html.escape(encoder),
                    interval_text(entry["slope"], ".3g"),
                    "1" if is_base else interval_text(entry["ratio"], ".2f"),
                ]
            )
    head = ["", "encoder", "NE gain per unit", f"over {html.escape(figures['baseline'])}"]
    return html_table(head, rows)


def _prediction_table(figures: Figures) -> str:
    found = figures["predictions"]
    if not found:
        return (
            "<p>The largest size was not predicted: that takes five sizes of an encoder at one "
            "length.</p>"
        )

    rows = []
    for name, entry in found.items():
        rows.append(
            [
                html.escape(name),
                interval_text(entry["log"], ".4f"),
                interval_text(entry["power"], ".4f"),
                interval_text(entry["measured"], ".4f"),
                number_text(entry.get("log_error"), "+.4f"),
                number_text(entry.get("power_error"), "+.4f"),
                html.escape(str(entry["made"])),
            ]
        )
    head = ["NE of the largest", "ln, predicted", "power, predicted", "measured", "ln, error"]
    return html_table([*head, "power, error", "predicted at"], rows)


def _law_table(figures: Figures) -> str:
    rows, short = [], []
    for law in figures["laws"]:
        power = law["power"]
        rows.append(
            [
                f"{html.escape(law['encoder'])}, {law['length']}",
                f"{law['sizes']}",
                f"{law['decades']:.1f}",
                interval_text(law["log"]["b"], ".4f"),
                interval_text(power["a"], ".3f"),
                interval_text(power["c"], ".2f"),
                interval_text(power["gain_of_doubling"], ".4f"),
            ]
        )
        if law["sizes"] < WANTED_SIZES or law["decades"] < WANTED_DECADES:
            short.append(f"{html.escape(law['encoder'])}/{law['length']}")
    note = ""
    if short:
        note = (
            f"<p>Fewer than {WANTED_SIZES} sizes or {WANTED_DECADES} decades of FLOP, so that a "
            f"law says little: {', '.join(short)}.</p>"
        )
    head = ["encoder, length", "sizes", "decades", "b of ln", "limit a", "exponent c"]
    return html_table([*head, "NE gain of twice the FLOP"], rows) + note


def _data_part(figures: Figures) -> str:
    quality = figures["data"]["quality"]
    rows = [
        ["rows in training", f"{quality['tokens']:,}"],
        ["of these, an item that the user has had before", f"{quality['repeated_share']:.1%}"],
        ["approximate entropy, mean over users", number_text(quality["entropy"], ".3f")],
        ["D' = rows / approximate entropy", number_text(quality["effective_tokens"], ",.0f")],
    ]
    text = html_table(["", ""], rows) + (
        "<p>D' (arXiv:2412.00430) weighs rows by how regular the sequences are: at an equal number "
        "of rows the larger D' promises more. It compares data, not models; a sequence without "
        "repeats has an entropy near 0 by construction, so read it beside the share above.</p>"
    )

    less = []
    for encoder, entry in figures["data"]["less"].items():
        share = f"{entry['share']:.0%}"
        row = [html.escape(encoder), share, interval_text(entry["ne"], ".4f")]
        less.append([*row, interval_text(entry["lost"], "+.4f")])
    if less:
        text += html_table(["largest size", "trained on", "NE", "NE above that of all"], less)
    return text


def _reachable_table(figures: Figures) -> str:
    if figures["reachable"] is None:
        return ""

    rows = []
    for length, best in figures["reachable"].items():
        rows.append([length, f"{best['auc']:.4f}", f"{best['ne']:.4f}"])
    head = ["newest rows read", "best AUC", "best NE"]
    return (
        "<p>The data are generated, so the best score is known, from so many rows:</p>"
        + html_table(head, rows)
    )


def _points_table(figures: Figures) -> str:
    fronts = [tuple(key) for key in figures["fronts"]["infer_gflop"]]
    rows = []
    for point in figures["points"]:
        key = point["encoder"], point["size"], point["length"]
        share = point["data_share"]
        auc = f"{point['auc']:.4f}"
        if share == 1.0 and key in fronts:
            auc = f"<b>{auc}</b>"

        reached = share_reached(figures, point)
        rows.append(
            [
                f"{html.escape(point['encoder'])} {html.escape(point['size'])}",
                f"{point['length']}",
                "" if share == 1.0 else f"{share:.0%}",
                f"{point['parameters']:,}",
                number_text(point["train_gflop"], ".3g"),
                number_text(point["infer_gflop"], ".3g"),
                number_text(point["train_seconds"], ",.1f"),
                number_text(point["score_ms_per_item"], ".3g"),
                interval_text(point["ne"], ".4f"),
                auc,
                number_text(reached, ".1%"),
            ]
        )
    head = ["", "length", "data", "parameters", "training GFLOP", "inference GFLOP", "training s"]
    return html_table([*head, "scoring, ms", "NE", "AUC", "of the reachable"], rows)


def _failed_part(figures: Figures) -> str:
    if not figures["failed"]:
        return ""

    rows = []
    for name, why in figures["failed"].items():
        rows.append([html.escape(name), html.escape(why)])
    words = "<h2>Not finished</h2><p>The same command tries these again.</p>"
    return words + html_table(["", "why"], rows)


# Pictures


def draw_slopes(figures: Figures) -> Figure:
    """NE gain of the ladder's points against each cost, over the baseline's smallest."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    points = {_key(point): point for point in _whole_points(figures)}
    steps = [tuple(step) for step in figures["ladder"]]
    zero = points.get((figures["baseline"], *steps[0]))
    start = zero["ne"]["value"] if zero is not None else math.nan

    for place, (cost, words) in enumerate(COSTS.items(), 1):
        axes = figure.add_subplot(2, 2, place)
        for number, encoder in enumerate(figures["encoders"]):
            rungs = [points[key] for step in steps if (key := (encoder, *step)) in points]
            costs = np.array([point[cost] for point in rungs])
            gains = np.array([start - point["ne"]["value"] for point in rungs])
            axes.plot(costs, gains, MARKERS[number % len(MARKERS)], color=f"C{number}")

            # the slope's line goes through the middle of the points
            if encoder in figures["slopes"][cost]:
                slope = figures["slopes"][cost][encoder]["slope"]["value"]
                line = gains.mean() + slope * (costs - costs.mean())
                axes.plot(costs, line, color=f"C{number}", label=f"{encoder}: {slope:.3g}")

        axes.set(xlabel=words, ylabel="NE gain")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(title="slope", fontsize=8)
    return figure


def draw_laws(figures: Figures) -> Figure:
    """A panel a length: NE over training FLOP of all sizes, with the laws. Where there are any,
    only the lengths and encoders that have one.
    """
    with_laws = dict.fromkeys((law["encoder"], law["length"]) for law in figures["laws"])
    lengths = list(dict.fromkeys(length for _, length in with_laws)) or figures["lengths"]
    columns = min(3, len(lengths))
    rows = math.ceil(len(lengths) / columns)
    figure = Figure(figsize=(4.5 * columns, 3.8 * rows), layout="constrained")

    for place, length in enumerate(lengths, 1):
        axes = figure.add_subplot(rows, columns, place)
        for number, encoder in enumerate(figures["encoders"]):
            marker = MARKERS[number % len(MARKERS)]
            if not with_laws or (encoder, length) in with_laws:
                _draw_law(axes, figures, encoder, length, f"C{number}", marker)

        axes.set(xlabel=COSTS["train_gflop"], ylabel="NE", title=f"{length} rows")
        _use_log_scale(axes)
        if place == 1 and axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


def _draw_law(
    axes: Axes, figures: Figures, encoder: str, length: int, colour: str, marker: str
) -> None:
    """The points of one encoder at one length with their intervals, the laws through them, and the
    largest size as it was predicted.
    """
    mine = []
    for point in _whole_points(figures):
        if (point["encoder"], point["length"]) == (encoder, length):
            mine.append(point)

    for point in mine:
        ne, error = point["ne"], None
        if ne["low"] is not None:
            below, above = ne["value"] - ne["low"], ne["high"] - ne["value"]
            error = [[max(below, 0)], [max(above, 0)]]

        is_largest = point["size"] == figures["sizes"][-1]
        form = "*" if is_largest else marker
        axes.errorbar(point["train_gflop"], ne["value"], error, fmt=form, color=colour, capsize=2)

    for law in figures["laws"]:
        if (law["encoder"], law["length"]) != (encoder, length):
            continue

        flops = np.array([point["train_gflop"] for point in mine])
        grid = np.geomspace(flops.min(), 2 * flops.max(), 60)
        log, power = law["log"], law["power"]

        straight = log["a"]["value"] + log["b"]["value"] * np.log(grid)
        curved = power["a"]["value"] + power["b"]["value"] * grid ** -power["c"]["value"]
        axes.plot(grid, straight, ":", color=colour)
        axes.plot(grid, curved, "-", color=colour, label=encoder)

    predicted = figures["predictions"].get(f"{encoder}/{length}")
    if predicted is not None:
        aim = predicted["train_gflop"], predicted["power"]["value"]
        axes.plot(*aim, "o", mfc="none", color=colour, markersize=11)


def draw_fronts(figures: Figures) -> Figure:
    """AUC against each cost, the points of an encoder in one colour, and the front of all."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    points = _whole_points(figures)

    for place, (cost, words) in enumerate(COSTS.items(), 1):
        axes = figure.add_subplot(2, 2, place)
        for number, encoder in enumerate(figures["encoders"]):
            mine = [point for point in points if point["encoder"] == encoder]
            values = _columns(mine, cost)
            axes.plot(*values, MARKERS[number % len(MARKERS)], label=encoder, color=f"C{number}")

        costs, aucs = _columns(points, cost)
        front = pareto_front(costs, aucs)
        order = np.argsort(costs[front])
        steps = costs[front][order], aucs[front][order]
        axes.step(*steps, where="post", color="grey", linewidth=1)

        if figures["reachable"] is not None:
            axes.axhline(figures["reachable"]["all"]["auc"], linestyle=":", color="black")
        axes.set(xlabel=words, ylabel="AUC")
        _use_log_scale(axes)
        if place == 1:
            axes.legend(fontsize=8)
    return figure


def _use_log_scale(axes: Axes) -> None:
    """Costs on a logarithmic scale, with few enough numbers that none lies over another."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    steps = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda cost, _: f"{cost:.3g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _columns(points: Sequence[Figures], cost: str) -> tuple[np.ndarray, np.ndarray]:
    read: Callable[[str], np.ndarray] = lambda key: np.array([point[key] for point in points])
    return read(cost), read("auc")


def _key(point: Figures) -> tuple[str, str, int]:
    return point["encoder"], point["size"], point["length"]


def console_table(figures: Figures) -> str:
    """A line a point, and the predictions of the largest size with their errors."""
    lines = []
    for point in figures["points"]:
        share = "" if point["data_share"] == 1.0 else f" of {point['data_share']:.0%}"
        name = f"{point['encoder']} {point['size']} {point['length']}{share}"
        lines.append(
            f"{name:32}  NE {number_text(point['ne']['value'])}  AUC {number_text(point['auc'])}  "
            f"GFLOP {point['train_gflop']:.3g} / {point['infer_gflop']:.3g}  "
            f"{point['train_seconds']:.0f} s"
        )

    for name, entry in figures["predictions"].items():
        for law in ("log", "power"):
            lines.append(
                f"predicted {name} by {law}: NE {number_text(entry[law]['value'])}, error "
                f"{number_text(entry.get(f'{law}_error'), '+.4f')}"
            )
    return "\n".join(lines)
