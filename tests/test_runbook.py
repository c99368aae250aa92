"""What the documents name exists: jobs, options, settings, modules, targets, files, links."""

import contextlib
import importlib.util
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from docs.images import draw
from pipeline import config
from pipeline.model.encoders import check_model

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
# docs/reference/ is written from the code, see test_reference.py
BY_HAND = [name for name in DOCUMENTS if not name.startswith("docs/reference/")]
# they start servers of their own or read a person's disk
LOCAL = {"serve", "mlflow_ui", "mlflow_import", "inspect"}
# what the recipes of docs/extend invent
INVENTED = ("csv_days", "mean_pool", "scale_rows", "$YESTERDAY", "$TODAY", "<", "{")
FOLDERS = "pipeline|kernels|serve_app|jobs|tests|benchmarks|configs|deploy|docs"


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
    helps, before = {}, sys.argv
    for job in sorted(jobs()):
        sys.argv = [job, "--help"]
        with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as stop:
            runpy.run_module(f"jobs.{job}", run_name="__main__")
        assert stop.value.code == 0
        helps[job] = said.getvalue()
    sys.argv = before
    return helps


@pytest.mark.parametrize("document", BY_HAND)
def test_every_option_of_a_command_exists(document: str, options_of: dict[str, str]):
    for job, words in commands(document):
        assert job in options_of, f"{document}: there is no jobs.{job}"
        for word in words:
            if word.startswith("--"):
                assert re.search(rf"{re.escape(word)}\b", options_of[job]), (
                    f"{document}: jobs.{job} has no {word}"
                )


def refused_on_purpose(document: str, words: list[str]) -> bool:
    """The one command that is shown with its error."""
    shown = (ROOT / document).read_text()
    return f"$ python -m jobs.pipeline {shlex.join(words)}\nerror: " in shown


@pytest.mark.parametrize("document", BY_HAND)
def test_every_setting_of_a_command_is_a_key(document: str):
    for job, words in commands(document):
        changing = ("--set", "--beside")
        overrides = [words[at + 1] for at, word in enumerate(words) if word in changing]
        settings = [word for word in words if re.match(r"[a-z_]+(\.[a-z_0-9]+)+=", word)]
        assert set(settings) <= set(overrides), f"{document}: a --set for each of {settings}"
        assert all("=" in override for override in overrides), f"{document}: jobs.{job} {words}"
        unknown = ("...", *INVENTED)
        known = [each for each in overrides if not each.endswith(unknown)]
        preset = preset_of(words)
        # an unknown key is an error, and so are settings that do not go together
        if refused_on_purpose(document, words):
            with pytest.raises(config.UserError):
                check_model(config.load(preset, known).model)
        else:
            check_model(config.load(preset, known).model)


def preset_of(words: list[str]) -> Path:
    """The file that a command names, where it is one of ours; else the demo's."""
    if "--config" in words:
        named = ROOT / words[words.index("--config") + 1]
        if named.is_file():
            return named
    return ROOT / "configs" / "demo.yaml"


@pytest.mark.parametrize("document", BY_HAND)
def test_every_setting_in_backticks_is_a_key(document: str):
    flat = config.flatten(config.to_dict(config.load(ROOT / "configs" / "demo.yaml")))
    sections = {key.partition(".")[0] for key in flat if "." in key}
    keys = set()
    for key in flat:
        parts = key.split(".")
        keys |= {".".join(parts[: i + 1]) for i in range(len(parts))}

    for name in re.findall(r"`(\w+(?:\.\w+)+)`", (ROOT / document).read_text()):
        first = name.partition(".")[0]
        is_file = name.endswith((".py", ".md", ".json", ".yaml", ".sh"))
        if first in sections and not is_file:
            assert name in keys or _in_a_mapping(name, keys), f"{document}: there is no {name}"


def _in_a_mapping(name: str, keys: set[str]) -> bool:
    """A key below a mapping that the demo leaves empty, such as train.tables.item_id."""
    parent = name.rpartition(".")[0]
    return parent in keys and parent.count(".") >= 1


@pytest.mark.parametrize("document", BY_HAND)
def test_every_module_target_and_file_exists(document: str):
    text = (ROOT / document).read_text()
    makefile = (ROOT / "Makefile").read_text()

    for module in re.findall(r"-m ((?:benchmarks|serve_app)(?:\.\w+)+)", text):
        assert importlib.util.find_spec(module), f"{document}: there is no {module}"
    for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{document}: make {target}"
    for path in re.findall(rf"`((?:{FOLDERS})/[^\s`]+)`", text):
        if not any(word in path for word in INVENTED):
            assert (ROOT / path).exists(), f"{document}: there is no {path}"


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md", "benchmarks/RESULTS.md"])
def test_every_link_leads_somewhere(document: str):
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    folder = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            path = folder / target.partition("#")[0]
            assert path.exists(), f"{document}: {target} leads nowhere"


def test_the_journey_names_files_that_exist():
    """A heading of the journey names its folders, the first column of a table their files."""
    text = (ROOT / "docs/how-it-works/journey.md").read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    num_files = 0
    for each in sections:
        heading, _, body = each.partition("\n")
        folders = re.findall(r"`([\w/]+/)`", heading) or [""]
        for cell in re.findall(r"^\| (`[^|]+) \|", body, re.MULTILINE):
            for name in re.findall(r"`([^`]+)`", cell):
                found = [folder for folder in folders if (ROOT / folder / name).exists()]
                same_folder = cell.split("`")[1].rpartition("/")[0]
                found += [same_folder] if (ROOT / same_folder / name).exists() else []
                assert found, f"{heading}: there is no {name}"
                num_files += 1
    assert num_files > 50


def test_the_journey_names_every_file_of_a_stage():
    text = (ROOT / "docs/how-it-works/journey.md").read_text()
    missing = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        for folder in re.findall(r"`(pipeline/\w+/)`", heading):
            for path in sorted((ROOT / folder).glob("*.py")):
                if path.name != "__init__.py" and f"`{path.name}`" not in body:
                    missing.append(f"{folder}{path.name}")
    assert missing == []


def test_pictures_are_those_of_the_script():
    for name, svg in draw.all_pictures().items():
        assert (ROOT / "docs/images" / name).read_text() == svg, "python docs/images/draw.py"


def test_every_job_is_shown_as_a_submitted_one():
    rows = [
        line
        for line in (ROOT / "docs/operate/cluster.md").read_text().splitlines()
        if line.startswith("| `ray job submit")
    ]
    shown = [re.search(r"-- python -m jobs\.(\w+) \$RUN", row) for row in rows]
    assert {found[1] for found in shown if found} == jobs() - LOCAL


def test_failures_have_three_answers():
    text = (ROOT / "docs/operate/failures.md").read_text()
    entries = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    assert len(entries) > 15
    for entry in entries:
        for answer in ("- **Shows**:", "- **By itself**:", "- **You**:"):
            assert answer in entry, entry.partition("\n")[0]
