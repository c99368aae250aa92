"""What a version of the sequences is built from, by digest: the settings that decide it, the files
of the logs and the side tables. The same contents again are found and not built.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline import config
from pipeline.config import FileFormat, SequenceConfig, SideTable, SourceConfig
from pipeline.logs import LogFiles
from pipeline.logs.files import PLAIN, file_digest, file_stamp
from pipeline.sequences import store
from pipeline.sequences.parts import Part
from pipeline.sequences.side_tables import side_files
from pipeline.sequences.store import Manifest

logger = logging.getLogger(__name__)


def form_settings(form: FileFormat) -> dict[str, Any]:
    """The format's settings. Those that came later than others stand only where they are given:
    parts and sequences without them keep their digests.
    """
    settings = config.to_dict(form)
    for name in ("decimal", "flatten"):
        if getattr(form, name) == getattr(PLAIN, name):
            del settings[name]
    return settings


def content_settings(source: SourceConfig, sequences: SequenceConfig) -> dict[str, Any]:
    """The settings that the sequences depend on."""
    of_source, of_sequences = config.to_dict(source), config.to_dict(sequences)
    # a column under its own name is the same as one that is not named
    columns = of_source["columns"].items()
    of_source["columns"] = {ours: theirs for ours, theirs in columns if ours != theirs}
    keys = ["columns", "actions", "request_columns"]
    if source.format != PLAIN:
        keys.append("format")
        of_source["format"] = form_settings(source.format)
    if source.outcome_columns:  # sequences without such columns keep their digests
        keys.append("outcome_columns")
    return {
        "source": {key: of_source[key] for key in keys},
        "sequences": {
            "num_buckets": of_sequences["num_buckets"],
            "max_rows_per_user": of_sequences["max_rows_per_user"],
            "repeats": of_sequences["repeats"],
            "repeated_outcomes": of_sequences["repeated_outcomes"],
            "earliest_time": of_sequences["earliest_time"],
            "latest_time": of_sequences["latest_time"],
        },
    }


def other_settings(manifest: Manifest, settings: dict[str, Any]) -> str:
    """The keys in which these differ from the settings that a version was built with, in words; ""
    where none does.
    """
    old, new = config.flatten(manifest.config), config.flatten(settings)
    different = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
    return ", ".join(sorted(different))


def source_digests(all_parts: Iterable[Part]) -> set[str]:
    """The digests of the log files that the parts were made from."""
    found: set[str] = set()
    for part in all_parts:
        found.update(source.digest for source in part.sources)
    return found


def inputs_digest(settings: dict[str, Any], files: Iterable[str], sides: Sequence[object]) -> str:
    """Digest of everything that a version is built from: the files of the logs by their digests, in
    no order.
    """
    return content_digest([store.SCHEMA_VERSION, settings, sorted(files), sides])


def inputs_of_parts(settings: dict[str, Any], logs: LogFiles, all_parts: Sequence[Part]) -> str:
    """`inputs_digest` of a version that is made of these parts."""
    return inputs_digest(settings, source_digests(all_parts), side_digests(logs))


def digests_of_files(files: Sequence[str], folder: Path) -> dict[str, str]:
    """Digest -> file; of files with the same contents the first.

    Those seen before, by their stamps, are not read.
    """
    memory = folder / store.DIGESTS
    try:
        seen = json.loads(memory.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        seen = {}

    def digest_unless_seen(file: str) -> tuple[str, str]:
        stamp = file_stamp(file)
        stamp_seen, digest_seen = seen.get(file, (None, ""))
        return stamp, digest_seen if stamp == stamp_seen else file_digest(file)

    now, found = {}, {}
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        for file, (stamp, digest) in zip(files, pool.map(digest_unless_seen, files), strict=True):
            now[file] = [stamp, digest]
            if digest in found:
                logger.warning("%s is the same file as %s: it is read once", file, found[digest])
            found.setdefault(digest, file)

    if now != seen:
        store.write_json(memory, now)
    return found


def side_digests(logs: LogFiles) -> list[object]:
    sides: dict[str, SideTable | None] = {"users": logs.users, "items": logs.items}
    digests: list[object] = []
    for name, table in sides.items():
        if table is not None:
            files = [file_digest(file) for file in side_files(name, table)]
            digests.append([name, table.id_column, files])
            if table.format != PLAIN:
                digests.append([name, form_settings(table.format)])
            if table.repeats != "refuse":
                digests.append([name, table.repeats])
    return digests


def content_digest(what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
