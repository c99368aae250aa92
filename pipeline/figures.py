"""Figures of runs as lines of JSON, many in a file.

The configurations of a plan's runs are nearly the same, so each is kept as what it changes:

    {"base": "3f9c0d1e", "config": {…}}                       a configuration, once
    {"name": …, "seed": 0, "metrics": {…}, "base": "3f9c0d1e", "changes": {"train.lr": 0.1}}
"""

import fcntl
import hashlib
import json
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
        bases = [entry for entry in known if "base" in entry and "config" in entry]

        rest = {key: value for key, value in run.items() if key != "config"}
        lines = []
        close = [base for base in bases if _is_close(base["config"], run["config"])]
        if close:
            base = close[0]
        else:
            digest = hashlib.sha256(json.dumps(run["config"]).encode()).hexdigest()[:8]
            base = {"base": digest, "config": run["config"]}
            lines.append(base)

        changes = _changes(base["config"], run["config"])
        lines.append(rest | {"base": base["base"], "changes": changes})
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def read_runs(path: Path) -> list[Figures]:
    """All runs of a JSON Lines file, each with its whole `config`; none where there is no file."""
    if not path.exists():
        return []

    bases: dict[str, Figures] = {}
    runs = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if "base" in entry and "config" in entry:
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
    before, after = flatten(base), flatten(config)
    missing = object()
    return {key: value for key, value in after.items() if before.get(key, missing) != value}


def _changed(base: Figures, changes: Figures) -> Figures:
    copied = json.loads(json.dumps(base))
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = copied
        for name in parents:
            section = section.setdefault(name, {})
        section[last] = value
    return copied
