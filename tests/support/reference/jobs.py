"""docs/reference/jobs.md: every job with its description, options and an example."""

import argparse
import runpy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from jobs import cli, inspect
from tests.support.reference.markdown import anchor, plain, table

ROOT = Path(__file__).parents[3]

# In the order in which one meets them; what stands behind --config in the example.
EXAMPLES = {
    "pipeline": "configs/demo.yaml --fresh",
    "import_logs": "configs/demo.yaml",
    "build_sequences": "configs/demo.yaml --dry-run",
    "train": "configs/demo.yaml --set train.epochs=2 --restart",
    "evaluate": "configs/demo.yaml --splits val",
    "compare": "configs/demo.yaml demo demo_sasrec --item-rate",
    "tune": "configs/demo.yaml --space configs/spaces/demo.yaml",
    "scaling_study": "configs/drifting_small.yaml --study configs/studies/smallest.yaml",
    "ablation": "configs/demo.yaml --split val",
    "promote": "configs/demo.yaml --version 3",
    "rollback": "configs/demo.yaml",
    "refresh_index": "configs/demo.yaml",
    "recommend": "configs/demo.yaml --as-of 2022-05-03T00:00:00+08:00",
    "serve": "configs/demo.yaml --set serve.port=8000",
    "deploy": "configs/demo.yaml --set ray.address=auto",
    "export_events": "configs/demo.yaml",
    "verdict": "configs/demo.yaml --canary 4",
    "drift": "configs/demo.yaml --days 7",
    "compact_sequences": "configs/demo.yaml --set sequences.keep_days=90",
    "forget_user": "configs/demo.yaml --user 17 --user 42",
    "mlflow_ui": "configs/demo.yaml --port 5000",
    "mlflow_import": "configs/demo.yaml --folder benchmarks/runs",
}

INTRODUCTION = """\
# Jobs

A job is `python -m jobs.NAME`. All of them but `jobs.inspect` take these options. A mistake of
yours is one message on stderr and exit code 2.
"""


@dataclass(frozen=True)
class JobFace:
    """What `python -m jobs.NAME --help` is made of."""

    name: str
    about: str
    parser: argparse.ArgumentParser


def job_names() -> list[str]:
    """Every module of jobs/ that runs: those that hand themselves to `cli.run`."""
    paths = sorted((ROOT / "jobs").glob("*.py"))
    return [path.stem for path in paths if "cli.run(" in path.read_text()]


def read_job(name: str) -> JobFace:
    """Run the module as `python -m` does, with `cli.run` replaced by one that only looks."""
    seen: list[tuple[str, Any]] = []

    def look(what: str, main: object, add_options: Any = None, plan: object = None) -> None:
        seen.append((what, add_options))

    with mock.patch.object(cli, "run", look), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the module may be imported already
        runpy.run_module(f"jobs.{name}", run_name="__main__")

    ((what, add_options),) = seen
    return JobFace(name, what, cli.make_parser(name, what, add_options))


def own_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options of this job alone, without those that all jobs share."""
    shared = {option for action in shared_options() for option in action.option_strings}
    return [action for action in parser._actions if not shared.intersection(action.option_strings)]


def shared_options() -> list[argparse.Action]:
    return cli.make_parser("NAME", "", None)._actions


def write_page() -> str:
    known = job_names()
    faces = [read_job(name) for name in EXAMPLES if name in known]

    about = inspect.__doc__ or ""
    looking = JobFace("inspect", about, inspect.make_parser())  # it has no configuration yet

    parts = [INTRODUCTION, _options_table(shared_options()), _contents([looking, *faces])]
    parts.append(_write_job(looking, "data/my_logs -o my_logs.yaml"))
    for face in faces:
        parts.append(_write_job(face, f"--config {EXAMPLES[face.name]}"))
    return "\n".join(parts)


def _contents(faces: list[JobFace]) -> str:
    rows = []
    for face in faces:
        first = face.about.strip().split("\n\n")[0]
        rows.append([f"[`jobs.{face.name}`](#jobs.{face.name})", plain(first)])
    return table(["Job", "What it does"], rows)


def _write_job(face: JobFace, example: str) -> str:
    name = f"jobs.{face.name}"
    lines = [anchor(name), "", f"## `{name}`", ""]
    for paragraph in face.about.strip().split("\n\n"):
        if paragraph.startswith("    "):  # a line to be shown as it is
            lines += ["```text", paragraph.strip(), "```", ""]
        else:
            lines += [plain(" ".join(paragraph.split())), ""]

    lines += ["```bash", f"python -m {name} {example}", "```", ""]
    options = own_options(face.parser)
    if options:
        lines.append(_options_table(options))
    return "\n".join(lines)


def _options_table(actions: list[argparse.Action]) -> str:
    return table(["Option", "Meaning"], [[_spelling(each), _meaning(each)] for each in actions])


def _spelling(action: argparse.Action) -> str:
    if not action.option_strings:
        more = " ..." if action.nargs == "+" else ""
        return f"`{action.metavar}{more}`"

    names = ", ".join(action.option_strings)
    if action.nargs == 0:
        return f"`{names}`"

    value = action.metavar or (action.dest.upper() if action.choices is None else "")
    if action.choices is not None and not value:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    more = " ..." if action.nargs == "+" else ""
    return f"`{names} {value}{more}`"


def _meaning(action: argparse.Action) -> str:
    text = plain(action.help or "")
    if action.required:
        return f"{text}; required"
    if action.nargs == 0 or action.default in (None, [], argparse.SUPPRESS):
        return text

    default = action.default
    if isinstance(default, list):
        default = " ".join(map(str, default))
    return f"{text}; default `{default}`"
