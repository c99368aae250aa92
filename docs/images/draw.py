"""Draws the pictures of the documents as SVG: `python docs/images/draw.py`.

    flow.svg      the stages from logs to the server
    mask.svg      which row sees which column, from the kernels' reference mask
    examples.svg  what the requests of one user may see
    build.svg     the two passes of a build
    request.svg   a request's way through the server

Colours are of middle brightness, so that the pictures can be read on light and on dark pages.
"""

from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

from kernels.semi_local_attention.reference import semi_local_mask

FOLDER = Path(__file__).parent

BLUE, GREEN, ORANGE, PURPLE = "#3b7dd8", "#2f9e6e", "#d9822b", "#8a63d2"
WHITE = "#ffffff"
GREY = "#7a8490"  # text and arrows on an unknown background
FAINT = "#7a849033"  # cells that are empty
FONT = "font-family='Helvetica, Arial, sans-serif'"


def text(x: float, y: float, words: str, *, size: int = 15, fill: str = GREY, bold: bool = False,
         anchor: str = "middle") -> str:  # fmt: skip
    weight = " font-weight='600'" if bold else ""
    return (
        f"<text x='{x:g}' y='{y:g}' font-size='{size}' fill='{fill}' text-anchor='{anchor}'"
        f"{weight}>{escape(words)}</text>"
    )


def box(x: float, y: float, width: float, height: float, fill: str, radius: int = 8) -> str:
    size = f"width='{width:g}' height='{height:g}' rx='{radius}'"
    return f"<rect x='{x:g}' y='{y:g}' {size} fill='{fill}'/>"


def arrow(path: str, dashed: bool = False) -> str:
    dashes = " stroke-dasharray='6 5'" if dashed else ""
    return f"<path d='{path}' fill='none' stroke='{GREY}' stroke-width='2'{dashes} {HEAD}/>"


HEAD = "marker-end='url(#head)'"
MARKER = (
    "<defs><marker id='head' viewBox='0 0 10 10' refX='8' refY='5' markerWidth='7' "
    f"markerHeight='7' orient='auto'><path d='M0 0L10 5L0 10z' fill='{GREY}'/></marker></defs>"
)


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    frame = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' {FONT}>"
    return "\n".join([frame, f"<title>{escape(title)}</title>", MARKER, *parts, "</svg>"]) + "\n"


STAGES = (
    ("logs", "your Parquet", "or KuaiRand, synthetic", BLUE),
    ("sequences", "Ray Data", "one row per user", BLUE),
    ("batches", "one collate", "packed, no padding", GREEN),
    ("model", "Ray Train, Triton", "semi-local attention", ORANGE),
    ("checkpoint", "safetensors", "resumes exactly", ORANGE),
    ("registry", "MLflow", "gate, champion", PURPLE),
    ("server", "Ray Serve", "POST /v1/rank", PURPLE),
)


def flow() -> str:
    """The stages in a row, and the two ways back from the server."""
    width, gap, top = 134, 22, 24
    middles = [width / 2 + 8 + i * (width + gap) for i in range(len(STAGES))]
    parts = []

    for middle, (name, tool, note, colour) in zip(middles, STAGES, strict=True):
        parts.append(box(middle - width / 2, top, width, 62, colour))
        parts.append(text(middle, top + 27, name, size=18, fill=WHITE, bold=True))
        parts.append(text(middle, top + 49, tool, size=14, fill=WHITE))
        parts.append(text(middle, top + 84, note, size=13))

    for left, right in pairwise(middles):
        parts.append(arrow(f"M{left + width / 2 + 2:g} {top + 31}H{right - width / 2 - 3:g}"))

    logs, batches, server = middles[0], middles[2], middles[-1]
    low = top + 94
    parts.append(arrow(f"M{server - 20:g} {low}V{low + 30}H{batches:g}V{low + 3}", dashed=True))
    parts.append(
        text((server + batches) / 2, low + 23, "a request is read by the same code as training")
    )
    parts.append(arrow(f"M{server + 20:g} {low}V{low + 66}H{logs:g}V{low + 3}", dashed=True))
    parts.append(
        text((server + logs) / 2, low + 59, "POST /v1/events: what users do joins their history")
    )
    title = "From logs to a ranking server: sequences, batches, model, checkpoint, registry"
    return picture(1086, 200, title, parts)


# the mask's example: [context | history, oldest first | candidates]
CONTEXT, HISTORY, CANDIDATES, WINDOW, FULL_ROWS = 1, 21, 4, 3, 3
CELL = 15


def mask() -> str:
    """Semi-local attention beside a causal mask, over the same sequence."""
    length = CONTEXT + HISTORY + CANDIDATES
    semi_local = semi_local_mask(length, CANDIDATES, WINDOW, FULL_ROWS, prefix=CONTEXT)
    causal = semi_local_mask(length, CANDIDATES, None, 0)
    side = length * CELL
    left, right, top = 110, 110 + side + 60, 62

    parts = [
        text(left + side / 2, 24, "semi-local", size=18, bold=True),
        text(left + side / 2, 46, f"{int(semi_local.sum())} pairs"),
        text(right + side / 2, 24, "plain causal", size=18, bold=True),
        text(right + side / 2, 46, f"{int(causal.sum())} pairs"),
    ]
    for begin, seen in ((left, semi_local), (right, causal)):
        for row in range(length):
            for column in range(length):
                fill = FAINT
                if seen[row, column]:
                    fill = colour(row, column) if seen is semi_local else GREY
                x, y = begin + column * CELL, top + row * CELL
                parts.append(box(x + 1, y + 1, CELL - 2, CELL - 2, fill, radius=2))

    rows = ("context", CONTEXT), ("history", HISTORY), ("candidates", CANDIDATES)
    at = 0
    for name, count in rows:
        middle = top + (at + count / 2) * CELL + 5
        parts.append(text(left - 10, middle, name, anchor="end"))
        at += count

    legend = (
        (BLUE, "a row sees the window before it (K1)"),
        (ORANGE, "the newest rows see everything before them (K2)"),
        (PURPLE, "all rows see the context"),
        (GREEN, "candidates see the history and themselves, never each other"),
    )
    for number, (fill, words) in enumerate(legend):
        x, y = left, top + side + 30 + 24 * number
        parts.append(box(x, y - 12, 14, 14, fill, radius=2))
        parts.append(text(x + 22, y, words, size=14, anchor="start"))
    title = "Rows are queries, columns are keys: semi-local attention and a causal mask"
    return picture(right + side + 50, top + side + 116, title, parts)


def colour(row: int, column: int) -> str:
    """The rule by which a row of the mask sees a column; the narrower rule first."""
    history_end = CONTEXT + HISTORY
    if row >= history_end:
        return GREEN
    if row - column <= WINDOW:
        return BLUE
    if column < CONTEXT:
        return PURPLE
    return ORANGE if row >= history_end - FULL_ROWS else BLUE


def examples() -> str:
    """Three requests of one user on the line of time, and the history that each may read."""
    events = (70, 140, 200, 330, 400, 470, 620, 690)
    requests = (("training", 330, 3, BLUE), ("validation", 620, 6, ORANGE), ("test", 690, 7, GREEN))
    axis = 70
    parts = [arrow(f"M30 {axis}H900"), text(880, axis + 24, "time", size=14)]

    for border, name in ((540, "t_val"), (655, "t_test")):
        line = f"M{border} 26V{axis + 190}"
        parts.append(f"<path d='{line}' stroke='{GREY}' stroke-dasharray='3 4'/>")
        parts.append(text(border, 20, name, size=14))
    for x in events:
        parts.append(f"<circle cx='{x}' cy='{axis}' r='7' fill='{GREY}'/>")

    for number, (name, x, seen, fill) in enumerate(requests):
        y = axis + 48 + 52 * number
        begin = events[0] - 10
        parts.append(box(begin, y - 12, events[seen - 1] + 10 - begin, 22, fill + "99", radius=4))
        parts.append(text(begin + 8, y + 4, "history", size=13, fill=WHITE, anchor="start"))
        parts.append(f"<circle cx='{x}' cy='{y - 1}' r='9' fill='{fill}'/>")
        parts.append(text(720, y + 4, f"{name} request", size=14, anchor="start"))
    title = "A request reads only what happened strictly before it"
    return picture(930, 270, title, parts)


def card(x: float, y: float, width: float, fill: str, title: str, *notes: str) -> list[str]:
    """A box with a title, and its notes below it."""
    parts = [box(x, y, width, 34, fill), text(x + width / 2, y + 23, title, size=15, fill=WHITE)]
    for number, note in enumerate(notes):
        parts.append(text(x + width / 2, y + 54 + 18 * number, note, size=13))
    return parts


def build() -> str:
    """Files of logs become parts, parts become buckets, and one manifest publishes them."""
    parts = []
    columns = (
        (20, BLUE, "log file", 3),
        (270, ORANGE, "part", 3),
        (520, GREEN, "bucket of users", 4),
        (800, PURPLE, "manifest", 1),
    )
    middle = 106
    places = {}
    for x, fill, name, count in columns:
        tops = [middle - 22 * count + 44 * i + 6 for i in range(count)]
        places[name] = [(x, top + 16) for top in tops]
        for top in tops:
            parts.append(box(x, top, 150, 32, fill, radius=6))
            parts.append(text(x + 75, top + 21, name, size=14, fill=WHITE))

    for (x, y), (there, other) in zip(places["log file"], places["part"], strict=True):
        parts.append(arrow(f"M{x + 152} {y}L{there - 3} {other}"))
    for x, y in places["part"]:
        for there, other in places["bucket of users"]:
            parts.append(arrow(f"M{x + 152} {y}L{there - 3} {other}"))
    ((there, other),) = places["manifest"]
    for x, y in places["bucket of users"]:
        parts.append(arrow(f"M{x + 152} {y}L{there - 3} {other}"))

    notes = (
        (220, "1. check rows, sort by bucket"),
        (470, "2. gather the rows of a bucket"),
        (800, "3. verify, check, publish"),
    )
    for x, note in notes:
        parts.append(text(x, 226, note, size=14))
    return picture(970, 244, "A build: log files, parts, buckets of users, manifest", parts)


def request() -> str:
    """A request through the ingress to a replica, and what the replica reads."""
    top = 40
    parts = [
        *card(10, top, 120, GREY, "client", "POST /v1/rank"),
        *card(190, top, 210, BLUE, "ingress", "log, deadline, body limit,", "key, rate, admission"),
        *card(470, top, 180, GREEN, "history", "published sequences,", "live events"),
        *card(720, top, 150, GREEN, "collate", "as in training"),
        *card(940, top, 150, ORANGE, "model", "one pass for several"),
        *card(720, top + 118, 150, ORANGE, "encoded histories", "LRU, by content"),
        *card(940, top + 118, 150, PURPLE, "shadow", "ranks copies later"),
    ]
    level = top + 17
    for left, right in ((130, 190), (400, 470), (650, 720), (870, 940)):
        parts.append(arrow(f"M{left + 2} {level}H{right - 3}"))

    parts.append(arrow(f"M870 {top + 135}H905V{level + 12}H938", dashed=True))
    parts.append(arrow(f"M1015 {top + 68}V{top + 116}", dashed=True))
    parts.append(arrow(f"M1015 {top - 2}V14H70V{top - 3}"))
    parts.append(text(560, 32, "scores and order", size=14))
    frame = f"x='456' y='{top - 4}' width='648' height='188' rx='12'"
    parts.append(f"<rect {frame} fill='none' stroke='{GREY}' stroke-dasharray='3 5'/>")
    parts.append(text(560, top + 172, "a replica", size=14))
    return picture(1110, 236, "A request's way: ingress, history, collate, model", parts)


def all_pictures() -> dict[str, str]:
    """SVG text by file name."""
    return {
        "flow.svg": flow(),
        "mask.svg": mask(),
        "examples.svg": examples(),
        "build.svg": build(),
        "request.svg": request(),
    }


if __name__ == "__main__":
    for name, svg in all_pictures().items():
        (FOLDER / name).write_text(svg)
