"""Bars and lines as SVG, for a page that needs no other file.

Drawn by hand: matplotlib takes a second to import and to draw a report's two figures, in which a
build's processors have nothing else to do.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, LEFT, RIGHT = 760, 80, 640  # pixels: of a figure, and where its axes begin and end
COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#7f7f7f")
MOST_DATES = 12  # below an axis
NUM_BINS = 32  # of a histogram
SOME_TICKS = 5
STEPS = (1, 2, 5)  # of a digit, between ticks


@dataclass(frozen=True)
class Axis:
    """A scale from the values `low` to `high` to the pixels `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """The pixel of a value, to a tenth."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        share = (value - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round values from `low` to `high`, some `SOME_TICKS` of them; whole ones, where it is
        not logarithmic.

        0 to 93         0, 20, 40, 60, 80
        3 to 700, log   10, 100
        3 to 70, log    5, 10, 20, 50
        """
        return self._log_ticks() if self.is_log else self._linear_ticks()

    def _linear_ticks(self) -> list[float]:
        power = 10 ** max(0, math.floor(math.log10((self.high - self.low) / SOME_TICKS)))
        steps = [digit * power for digit in (*STEPS, 10)]
        step = next(step for step in steps if (self.high - self.low) / step <= SOME_TICKS)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [float(number * step) for number in range(first, last + 1)]

    def _log_ticks(self) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        digits = STEPS if len(powers) <= 3 else STEPS[:1]
        ticks = []
        for power in powers:
            for digit in digits:
                tick = float(f"{digit}e{power}")
                if self.low <= tick <= self.high:
                    ticks.append(tick)
        return ticks


def length_chart(lengths: Mapping[str, int]) -> str:
    """A histogram of the users, on a logarithmic axis, by the rows that they have; `lengths` are
    users by number of rows.
    """
    sizes = np.array(list(map(int, lengths)))
    edges = np.unique(np.geomspace(1, sizes.max() + 1, NUM_BINS + 1).round())
    users, _ = np.histogram(sizes, edges, weights=list(lengths.values()))

    x = Axis(1.0, float(edges[-1]), LEFT, RIGHT, is_log=True)
    y = Axis(0.0, float(users.max()), 170, 10)
    drawn = [_y_axis(y, "users")]
    for low, high, count in zip(edges[:-1], edges[1:], users, strict=True):
        if count == 0:
            continue
        of = f"{low:,.0f} to {high - 1:,.0f} rows: {count:,.0f} users"
        drawn.append(_bar(x.place(low), x.place(high), y, count, of))
    for tick in x.ticks():
        drawn.append(_text(x.place(tick), 186, _number(tick), "middle"))
    drawn.append(_text((LEFT + RIGHT) / 2, 204, "rows", "middle"))
    return _figure(212, "Users by rows", drawn)


def day_chart(days: Sequence[str], rows: Sequence[int], rates: Mapping[str, np.ndarray]) -> str:
    """Bars of the rows of each day, and below them lines of the rate of each action, on a
    logarithmic axis; a rate that is NaN interrupts its line.
    """
    x = Axis(-0.5, len(days) - 0.5, LEFT, RIGHT)
    y = Axis(0.0, float(max(rows)), 170, 10)
    drawn = [_y_axis(y, "rows")]
    for place, (day, count) in enumerate(zip(days, rows, strict=True)):
        drawn.append(
            _bar(x.place(place - 0.4), x.place(place + 0.4), y, count, f"{day}: {count:,}")
        )

    drawn += _rate_lines(days, x, rates)
    for place in range(0, len(days), max(1, len(days) // MOST_DATES)):
        at = f'transform="translate({x.place(place)} 368) rotate(-45)"'
        drawn.append(f'<text {at} text-anchor="end">{html.escape(days[place])}</text>')
    return _figure(430, "Rows and rates by day", drawn)


def _rate_lines(days: Sequence[str], x: Axis, rates: Mapping[str, np.ndarray]) -> list[str]:
    known = np.concatenate([np.zeros(0), *rates.values()])
    known = known[~np.isnan(known)]
    if len(known) == 0:
        return [_text(LEFT, 270, "no action happened", "start")]

    y = Axis(float(known.min()) / 1.2, float(known.max()) * 1.2, 350, 190, is_log=True)
    drawn = [_y_axis(y, "share of known rows")]
    for number, (action, rate) in enumerate(rates.items()):
        colour = COLOURS[number % len(COLOURS)]
        points, begins = [], True
        for place, value in enumerate(rate.tolist()):
            if math.isnan(value):
                begins = True
                continue
            at_x, at_y = x.place(place), y.place(value)
            points.append(f"{'M' if begins else 'L'}{at_x} {at_y}")
            about = html.escape(f"{days[place]}, {action}: {value:.4g}")
            dot = f'<circle cx="{at_x}" cy="{at_y}" r="2" fill="{colour}">'
            drawn.append(f"{dot}<title>{about}</title></circle>")
            begins = False
        if points:
            drawn.append(f'<path d="{" ".join(points)}" fill="none" stroke="{colour}"/>')
        drawn.append(_text(RIGHT + 12, 200 + 16 * number, action, "start", colour))
    return drawn


def _figure(height: int, about: str, drawn: Sequence[str]) -> str:
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    inside = "\n".join(drawn)
    return f'<svg {size} role="img" aria-label="{about}" font-size="11">\n{inside}\n</svg>'


def _y_axis(y: Axis, label: str) -> str:
    """Lines across at its ticks, with their numbers, and what they count beside them."""
    drawn = []
    for tick in y.ticks():
        at = y.place(tick)
        drawn.append(f'<path d="M{LEFT} {at}H{RIGHT}" stroke="#ddd"/>')
        drawn.append(_text(LEFT - 6, at + 4, _number(tick), "end"))
    middle = (y.start + y.end) / 2
    turned = f'transform="translate(14 {middle}) rotate(-90)" text-anchor="middle"'
    drawn.append(f"<text {turned}>{label}</text>")
    return "\n".join(drawn)


def _bar(left: float, right: float, y: Axis, value: float, about: str) -> str:
    top = y.place(value)
    width, height = round(right - left, 1), round(y.start - top, 1)
    shape = f'x="{left}" y="{top}" width="{width}" height="{height}" fill="{COLOURS[0]}"'
    return f"<rect {shape}><title>{html.escape(about)}</title></rect>"


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#222") -> str:
    where = f'x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {where}>{html.escape(text)}</text>"


def _number(value: float) -> str:
    """A tick as people write it: 0.02, 500, 20,000, 3M."""
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"
