"""Parts of HTML pages that need no other file: head, tables, numbers, pictures."""

import base64
import io
import math
from collections.abc import Iterable, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def page_head(title: str) -> str:
    """Everything up to the body's first line; `title` is HTML already."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem}}
table {{border-collapse: collapse; margin: .5rem 0 1.5rem}}
td, th {{padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right}}
td:first-child, th:first-child {{text-align: left}}
.better {{color: #0a7a2f}} .worse {{color: #b3261e}} .unclear {{color: #777}}
img {{max-width: 100%}}
</style></head><body>"""


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    text = "<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"
    for row in rows:
        text += "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
    return f"<table>{text}</table>"


def number_text(value: float | None, form: str = ".4f") -> str:
    """A number in the form of `format`; a dash where it is not defined."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def png_bytes(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def embedded_picture(figure: Figure, words: str) -> str:
    """An `img` that holds the picture itself; `words` say what it shows."""
    text = base64.b64encode(png_bytes(figure)).decode()
    return f'<img alt="{words}" src="data:image/png;base64,{text}">'
