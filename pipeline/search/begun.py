"""What a search or a study began with: a later start goes on with the same, or is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import UserError
from pipeline.files import json_text, write_atomically


def hold_to_beginning(path: Path, facts: Mapping[str, Any], whole: str, from_run: str) -> None:
    """Note in `path` what `whole`, as "the search x", goes on with, unless it began with something
    else. `from_run` is the run whose sequences it reads.

    Raises:
        UserError: a fact differs from that of an earlier start; names it with both values.
    """
    facts = json.loads(json_text(facts))
    if path.exists():
        began = json.loads(path.read_text())
        for key in sorted(began.keys() | facts.keys()):
            if began.get(key) != facts.get(key):
                raise UserError(
                    f"{whole} began with {key} = {began.get(key)!r} and would go on with "
                    f"{facts.get(key)!r}: --restart forgets it, or --set name=... and --set "
                    f"sequences.from_run={from_run} begin another"
                )
    write_atomically(path, json_text(facts))
