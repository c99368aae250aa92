"""Figures of runs as lines of JSON, many in a file.

The configurations of a plan's runs are nearly the same, so each is kept as what it changes:

    {"base": "3f9c0d1e", "config": {…}}                       a configuration, once
    {"name": …, "seed": 0, "metrics": {…}, "base": "3f9c0d1e", "changes": {"train.lr": 0.1}}
"""

import fcntl
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.config import flatten

MOST_CHANGES = 40  # a configuration further away than this becomes a base of its own

Figures = dict[str, Any]


def append_run(path: Path, run: Figures) -> None:
    """Add a run with its `config` to a JSON Lines file; processes may append at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        known = [json.loads(line) for line in file]
        base = _find_base(known, run["config"])
        if base is None:
            digest = hashlib.sha256(json.dumps(run["config"]).encode()).hexdigest()[:8]
            base = {"base": digest, "config": run["config"]}
            file.write(json.dumps(base) + "\n")

        changes = _changes(base["config"], run["config"])
        line = run | {"base": base["base"], "changes": changes}
        del line["config"]
        file.write(json.dumps(line) + "\n")


def _find_base(entries: Iterable[Figures], config: Figures) -> Figures | None:
    """The first base of which `config` is a change; None where all are too far away."""
    for entry in entries:
        if _is_base(entry) and _is_close(entry["config"], config):
            return entry
    return None


def _is_base(entry: Figures) -> bool:
    return "base" in entry and "config" in entry


def read_runs(path: Path) -> list[Figures]:
    """All runs of a JSON Lines file, each with its whole `config`; none where there is no file."""
    if not path.exists():
        return []

    bases: dict[str, Figures] = {}
    runs = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if _is_base(entry):
            bases[entry["base"]] = entry["config"]
            continue

        if "changes" in entry:
            changes, base = entry.pop("changes"), entry.pop("base")
            entry |= {"config": _changed(bases[base], changes)}
        runs.append(entry)
    return runs


def _is_close(base: Figures, config: Figures) -> bool:
    changes = _changes(base, config)
    return len(changes) <= MOST_CHANGES and _changed(base, changes) == config


def _changes(base: Figures, config: Figures) -> Figures:
    """Flat keys of `config` that `base` has with another value, or does not have."""
    before, changes = flatten(base), {}
    for key, value in flatten(config).items():
        if key not in before or before[key] != value:
            changes[key] = value
    return changes


def _changed(base: Figures, changes: Figures) -> Figures:
    """A copy of `base` with the flat `changes`."""
    copied = json.loads(json.dumps(base))
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = copied
        for name in parents:
            section = section.setdefault(name, {})
        section[last] = value
    return copied
