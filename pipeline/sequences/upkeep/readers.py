"""The runs that read the sequences of a run: its own folder, and those beside it."""

import json
import re
from pathlib import Path

CONFIG = "config.json"  # of a model


def run_folders(run_dir: Path) -> list[Path]:
    """A run's own folder, and those of runs that were trained on its sequences
    (`sequences.from_run`), trials of a search included.
    """
    run = run_dir.name
    is_trial = re.compile(re.escape(run) + r"-tune(-\d+)?")
    folders = [run_dir]
    for folder in sorted(run_dir.parent.iterdir()):
        if folder == run_dir or not folder.is_dir():
            continue
        if is_trial.fullmatch(folder.name) or has_learned(folder / "model", run):
            folders.append(folder)
    return folders


def has_learned(model_dir: Path, run: str) -> bool:
    """True of a model that was trained on the sequences of the run."""
    try:
        settings = json.loads((model_dir / CONFIG).read_text())
    except FileNotFoundError:
        return False
    return (settings["sequences"]["from_run"] or settings["name"]) == run
