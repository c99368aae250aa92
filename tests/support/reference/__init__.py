"""The pages of docs/reference/, written from the code: settings, jobs, HTTP, metrics.

`make docs-reference` (or `python -m tests.support.reference`) writes them. tests/test_reference.py
fails where a committed page says something else.
"""

from pathlib import Path

from tests.support.reference import configuration, http, jobs, metrics

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "docs" / "reference"
COMMAND = "make docs-reference"
NOTICE = f"<!-- Written from the code by `{COMMAND}`: change the code, not this page. -->\n\n"

PAGES = {
    "configuration.md": configuration.write_page,
    "jobs.md": jobs.write_page,
    "http.md": http.write_page,
    "metrics.md": metrics.write_page,
}


def generate_page(name: str) -> str:
    return NOTICE + PAGES[name]()
