"""Where a run comes from: who started what, with which code, on which machine. No tracking server
here.
"""

import getpass
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "kernels", "serve_app", "jobs")
LIBRARIES = ("torch", "ray", "mlflow", "triton", "pyarrow", "numpy")
COMMIT = "GIT_SHA"  # in the environment of an image that was built from a commit
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's own, in the environment of a submitted job


def provenance_tags() -> dict[str, str]:
    """Tags of a run: those under `mlflow.` are shown by MLflow in columns of their own."""
    tags = {
        "mlflow.user": _user(),
        "mlflow.source.name": _entry_point(),
        "mlflow.source.type": "JOB" if _ray_submission() else "LOCAL",
        "host": socket.gethostname(),
        "code_digest": code_digest(),
        **_commit(),
        **_ray_submission(),
        "version.python": platform.python_version(),
    }
    for name in LIBRARIES:
        try:
            tags[f"version.{name}"] = metadata.version(name)
        except metadata.PackageNotFoundError:  # triton is of Linux alone
            continue
    return tags


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _entry_point() -> str:
    """`jobs.train` for `python -m jobs.train`, the script's path otherwise."""
    path = Path(sys.argv[0])
    return f"jobs.{path.stem}" if path.parent.name == "jobs" else str(path)


@cache
def code_digest() -> str:
    """SHA-256, its first 16 digits, of our own source files: the same for a tree, an installation
    and the package of a submitted job, which have no commit in common.
    """
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _commit() -> dict[str, str]:
    """The commit of the source tree, or the one that `GIT_SHA` names; none where nobody knows.

    An installation may lie inside of another project's repository, whose commit is not ours.
    """
    found = os.environ.get(COMMIT, "")
    if not found and (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = done.stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return {}
    if not found:
        return {}
    return {"git_sha": found, "mlflow.source.git.commit": found.removesuffix("-dirty")}


def _ray_submission() -> dict[str, str]:
    """Ray's name of this job, where `ray job submit` started it, and of the code that came along.

    It is in the environment of the entry point before Ray is asked for anything.
    """
    config = os.environ.get(JOB_CONFIG, "")
    if not config:
        return {}
    found = json.loads(config)
    tags = {}
    submission = found.get("metadata", {}).get("job_submission_id")
    if submission:
        tags["ray_submission_id"] = submission
    package = found.get("runtime_env", {}).get("working_dir", "")
    if package.startswith("gcs://"):
        tags["ray_package"] = package
    return tags
