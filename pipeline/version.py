"""The one version number of this software: that of pyproject.toml."""

import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGE = "ultra-hstu-pipeline"
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


@cache
def package_version() -> str:
    """Version of the code that runs, as the server, the registry and the API's document name it.

    In a source tree it is read from pyproject.toml: an editable installation, or another one that
    the same environment holds, may say an older number. Elsewhere the installation knows it.

    Raises:
        PackageNotFoundError: neither a source tree nor installed.
    """
    if PYPROJECT.exists():
        project = tomllib.loads(PYPROJECT.read_text()).get("project", {})
        if project.get("name") == PACKAGE:
            return project["version"]
    return metadata.version(PACKAGE)
