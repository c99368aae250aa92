"""docs/reference/configuration.md: every setting with its type, range, default and meaning."""

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from pipeline.config import RunConfig
from pipeline.config.setting import Setting, find_setting, has_default
from tests.support.reference.markdown import anchor, plain, table

INTRODUCTION = """\
# Configuration

A preset is a YAML file in `configs/`. Every key that it leaves out has the default below. Change
one with `--set`, whose value is YAML too:

```bash
python -m jobs.train --config configs/demo.yaml --set train.epochs=3 --set serve.port=0
```

A wrong key, type or value stops a job before it starts anything, with one message that names key
and value. `--dry-run` prints the whole configuration that a job would use. NAME in a key is a name
that you choose: a column, an action, a channel.
"""

WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Entry:
    """One setting and where it stands."""

    key: str
    field: "dataclasses.Field[Any]"
    declared: Setting | None


@dataclass(frozen=True)
class Section:
    """A dataclass of settings, under one key or more."""

    keys: list[str]  # "" at the top
    cls: type
    entries: list[Entry]


def find_sections() -> list[Section]:
    """Every section in the order of `RunConfig`. A dataclass that stands under several keys is one
    section.
    """
    found: dict[type, Section] = {}
    for key, cls in _walk(RunConfig, ""):
        if cls in found:
            found[cls].keys.append(key)
            continue
        prefix = f"{key}." if key else ""
        entries = [
            Entry(f"{prefix}{field.name}", field, find_setting(field))
            for field in dataclasses.fields(cls)
            if not dataclasses.is_dataclass(field.type)
        ]
        found[cls] = Section([key], cls, entries)
    return list(found.values())


def _walk(cls: type, key: str) -> Iterator[tuple[str, type]]:
    """The key and the class of a section, then of those inside it."""
    yield key, cls
    for field in dataclasses.fields(cls):
        inner = f"{key}.{field.name}" if key else field.name
        hint = typing.cast(Any, field.type)
        if dataclasses.is_dataclass(hint):
            yield from _walk(typing.cast(type, hint), inner)
        for part in _parts(hint):
            if dataclasses.is_dataclass(part):
                name = f"{inner}.NAME" if typing.get_origin(hint) is dict else inner
                yield from _walk(typing.cast(type, part), name)


def _parts(hint: Any) -> list[Any]:
    """The types inside a type: of a mapping to one of several, those several."""
    found = []
    for part in typing.get_args(hint):
        inside = typing.get_args(part)
        found += inside if typing.get_origin(part) in (types.UnionType, typing.Union) else [part]
    return found


def type_words(hint: Any) -> str:
    """A field's type as a reader of YAML says it: `list of numbers, or null`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        words = [type_words(part) for part in args if part is not type(None)]
        null = ", or null" if type(None) in args else ""
        return " or ".join(words) + null
    if origin is Literal:
        return ", ".join(f"`{_yaml(choice)}`" for choice in args)
    if origin is tuple:
        return f"list of {_plural(args[0])}"
    if origin is dict:
        return f"mapping of names to {_plural(args[1])}"
    if dataclasses.is_dataclass(hint):
        return "section"
    return WORDS[hint]


def _plural(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return type_words(hint)
    words = type_words(hint)
    if words.startswith("text"):
        return words.replace("text", "texts").replace("section", "sections")
    return words.replace("list of", "lists of") if words.startswith("list") else f"{words}s"


def value_words(entry: Entry) -> str:
    """Type and range of a setting in one phrase: `number in [0, 1)`. A section is a link to it."""
    inner = section_key(entry)
    words = type_words(entry.field.type)
    if inner is not None:
        return words.replace("section", f"[section](#{inner})")
    rule = entry.declared.range_words() if entry.declared else ""
    if not rule:
        return words

    base, comma, null = words.partition(", or null")
    if base.startswith(("list", "mapping")):
        return f"{base}, each {rule}{comma}{null}"
    joint = " " if rule.startswith(("greater", "between", "in ", "below")) else ", "
    return f"{base}{joint}{rule}{comma}{null}"


def section_key(entry: Entry) -> str | None:
    """Key of the section that a setting holds, or holds by name; None for plain values."""
    for part in _parts(entry.field.type):
        if dataclasses.is_dataclass(part):
            named = typing.get_origin(entry.field.type) is dict
            return f"{entry.key}.NAME" if named else entry.key
    return None


def default_words(field: "dataclasses.Field[Any]") -> str:
    if not has_default(field):
        return "required"
    if field.default is not dataclasses.MISSING:
        return f"`{_yaml(field.default)}`"
    assert field.default_factory is not dataclasses.MISSING
    return f"`{_yaml(field.default_factory())}`"


def _yaml(value: Any) -> str:
    """A value as one writes it in a preset."""
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, float):
        return f"{value:g}"
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


def write_page() -> str:
    sections = find_sections()
    entries = [entry for section in sections for entry in section.entries]
    known = {entry.key for entry in entries if "." in entry.key and "NAME" not in entry.key}

    parts = [INTRODUCTION, _contents(sections)]
    for section in sections:
        parts.append(_write_section(section, known))
    return "\n".join(parts)


def _contents(sections: list[Section]) -> str:
    lines = []
    for section in sections:
        key = section.keys[0]
        if key and "." not in key:
            about = _first_sentence(section.cls)
            lines.append(f"- [`{key}`](#{key}): {plain(about)}")
    return "\n".join(lines) + "\n"


def _first_sentence(cls: type) -> str:
    text = " ".join((cls.__doc__ or "").split())
    return re.split(r"(?<=[a-z)])\. ", text)[0].rstrip(".")


def _write_section(section: Section, known: set[str]) -> str:
    keys = " and ".join(f"`{key}`" for key in section.keys)
    level = "###" if "." in section.keys[0] else "##"
    title = keys if section.keys[0] else "The whole run"
    anchors = "".join(anchor(key) for key in section.keys if key)
    about = "\n\n".join(
        " ".join(paragraph.split()) for paragraph in (section.cls.__doc__ or "").split("\n\n")
    )

    rows = []
    for entry in section.entries:
        meaning = entry.declared.doc if entry.declared else ""
        own_anchor = "" if section_key(entry) == entry.key else anchor(entry.key)
        rows.append(
            [
                f"{own_anchor}`{entry.field.name}`",
                value_words(entry),
                default_words(entry.field),
                _linked(plain(meaning), known - {entry.key}),
            ]
        )
    settings = table(["Setting", "Value", "Default", "Meaning"], rows)
    opening = f"{anchors}\n\n" if anchors else ""
    return f"{opening}{level} {title}\n\n{_linked(plain(about), known)}\n\n{settings}"


def _linked(text: str, known: set[str]) -> str:
    """`text` with a link from every whole key in it, `train.batch_users` say, to its own row."""

    def link(match: re.Match[str]) -> str:
        key = match[0].strip("`")
        return f"[`{key}`](#{key})" if key in known else match[0]

    return re.sub(r"`?\b[a-z]\w*(?:\.[a-z]\w*)+\b`?", link, text)
