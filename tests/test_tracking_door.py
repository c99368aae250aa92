"""Tracking has one door, so that another tracker in MLflow's place costs five files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("folder", ["pipeline", "kernels", "serve_app", "jobs", "benchmarks"])
def test_tracking_has_one_door(folder: str) -> None:
    """Nobody outside imports MLflow, or a module of the package: a new tracker touches it alone."""
    inside = ROOT / "pipeline" / "tracking"
    breaches = []
    for path in (ROOT / folder).rglob("*.py"):
        if path.is_relative_to(inside):
            continue
        for name in imported_names(path):
            if name.split(".")[0] == "mlflow" or name.startswith("pipeline.tracking."):
                breaches.append(f"{path.relative_to(ROOT)} imports {name}")
    assert breaches == []


def test_mlflow_is_spoken_in_five_files() -> None:
    inside = ROOT / "pipeline" / "tracking"
    speakers = set()
    for path in inside.glob("*.py"):
        if any(name.split(".")[0] == "mlflow" for name in imported_names(path)):
            speakers.add(path.name)
    assert speakers == {"server.py", "runs.py", "registry.py", "evaluation.py", "forgetting.py"}


def imported_names(path: Path) -> list[str]:
    """Modules that a file imports, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
    return found
