"""Hooks of the documents' site (mkdocs.yml): what `docs/` links to outside of itself.

The documents are read in two places. In the repository a link such as `../../benchmarks/RESULTS.md`
leads to a file; on the site the files of `OUTSIDE` are pages, and a link to any other file is shown
as its text.
"""

import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "benchmarks/RESULTS.md",
    "benchmarks/NOTES.md",
    "benchmarks/plots/attention.png",
    "benchmarks/plots/day_by_day.png",
    "benchmarks/plots/serving.png",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s:#]+)(#[^)]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of a folder in the place of its name in `nav`, its index first."""
    config.nav = [_with_pages(entry) for entry in config.nav or []]
    return config


def _with_pages(entry: object) -> object:
    if not isinstance(entry, dict):
        return entry
    ((title, place),) = entry.items()
    if not (isinstance(place, str) and place.endswith("/")):
        return entry
    pages = sorted((ROOT / "docs" / place).glob("*.md"), key=lambda page: page.name != "index.md")
    return {title: [place + page.name for page in pages]}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name in OUTSIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave `docs/` at the site's own pages, or leave their text alone."""
    place = PurePosixPath(page.file.src_uri)
    inside = place.as_posix() not in OUTSIDE

    def changed(link: re.Match[str]) -> str:
        mark, words, target, anchor = link.groups()
        source = PurePosixPath("docs") / place.parent if inside else place.parent
        found = _normal(source / target)
        if not (ROOT / found).exists():
            raise PluginError(f"{place}: there is no {found}")
        if found.parts[:1] == ("docs",):
            found = found.relative_to("docs")
        elif found.as_posix() not in OUTSIDE:
            return words
        up = "../" * len(place.parent.parts)
        return f"{mark}[{words}]({up}{found}{anchor or ''})"

    return LINK.sub(changed, markdown)


def _normal(path: PurePosixPath) -> PurePosixPath:
    """The path without `..`."""
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return PurePosixPath(*parts)
