"""Commands in the documents are commands that exist: each job, each of its options, each
configuration key.
"""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from pipeline import config

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/runbook.md", "docs/data.md", "docs/failures.md")
# they start servers of their own or read a person's disk
LOCAL = {"serve", "mlflow_ui", "mlflow_import"}


def commands(name: str) -> list[tuple[str, list[str]]]:
    """(job, its words) of every `python -m jobs.JOB ...` in the document."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    found = []
    for job, rest in re.findall(r"python -m jobs\.(\w+)([^`\n|&]*)", text):
        words = shlex.split(rest.partition(" #")[0].partition(" > ")[0], comments=False)
        found.append((job, [word for word in words if word != "..."]))
    return found


def jobs() -> set[str]:
    return {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__", "cli"}


@pytest.fixture(scope="module")
def options_of() -> dict[str, str]:
    """What `--help` of each job says."""
    import contextlib
    import io

    helps, before = {}, sys.argv
    for job in sorted(jobs()):
        sys.argv = [job, "--help"]
        with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as stop:
            runpy.run_module(f"jobs.{job}", run_name="__main__")
        assert stop.value.code == 0
        helps[job] = said.getvalue()
    sys.argv = before
    return helps


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_option_of_a_command_exists(document: str, options_of: dict[str, str]):
    for job, words in commands(document):
        assert job in options_of, f"{document}: there is no jobs.{job}"
        for word in words:
            if word.startswith("--"):
                assert re.search(rf"{re.escape(word)}\b", options_of[job]), (
                    f"{document}: jobs.{job} has no {word}"
                )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_setting_of_a_command_is_a_key(document: str):
    demo = config.load(ROOT / "configs" / "demo.yaml")
    for job, words in commands(document):
        for at, word in enumerate(words):
            if word == "--set":
                key, equals, value = words[at + 1].partition("=")
                assert equals, f"{document}: jobs.{job} --set {words[at + 1]}"
                if value != "...":
                    # an unknown key is an error
                    config.load(ROOT / "configs" / "demo.yaml", [f"{key}={value}"])
    assert demo.name == "demo"


def test_every_job_is_shown_as_a_submitted_one():
    rows = [
        line
        for line in (ROOT / "docs/runbook.md").read_text().splitlines()
        if line.startswith("| `ray job submit")
    ]
    shown = [re.search(r"-- python -m jobs\.(\w+) \$RUN", row) for row in rows]
    assert {found[1] for found in shown if found} == jobs() - LOCAL


def test_failures_are_linked_and_name_keys_that_exist():
    text = (ROOT / "docs/failures.md").read_text()
    assert "(failures.md)" in (ROOT / "docs/runbook.md").read_text()
    flat = config.flatten(config.to_dict(config.load(ROOT / "configs" / "demo.yaml")))
    sections = {key.partition(".")[0] for key in flat}
    named = re.findall(r"`(\w+)\.(\w+)`", text)
    for section, key in named:
        if section in sections:
            assert f"{section}.{key}" in flat, f"docs/failures.md: there is no {section}.{key}"
    assert len(named) > 8
    for path in re.findall(r"`(?:tests/)?(test_\w+\.py)`", text):
        assert (ROOT / "tests" / path).exists(), path
