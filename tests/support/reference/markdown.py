"""Small pieces of Markdown that every page is made of."""

import re
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_row(header), _row(["---"] * len(header))]
    lines += [_row(row) for row in rows]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", r"\|").split()) for cell in cells) + " |"


def plain(text: str) -> str:
    """Prose with the characters escaped that Markdown would read as emphasis or HTML, and with
    links to the pages that it names.
    """
    parts = text.split("`")
    for index in range(0, len(parts), 2):  # what stands between backquotes is shown as it is
        escaped = parts[index].replace("*", r"\*").replace("<", "&lt;")
        parts[index] = re.sub(r"\bdocs/([\w/-]+\.md)\b", r"[docs/\1](../\1)", escaped)
    return "`".join(parts)


def anchor(name: str) -> str:
    return f'<a id="{name}"></a>'
