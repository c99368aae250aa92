"""docs/reference/ says what the code says, and leaves no setting, job, endpoint or metric out."""

import difflib

import pytest

from pipeline import config
from pipeline.evaluate.metrics import TaskMetrics
from serve_app.metrics import IngressMetrics, ReplicaMetrics
from tests.support import reference
from tests.support.reference import configuration, http, jobs, metrics

SECTIONS = configuration.find_sections()
ENTRIES = [entry for section in SECTIONS for entry in section.entries]


def committed(name: str) -> str:
    return (reference.FOLDER / name).read_text()


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_page_is_what_the_code_generates(name):
    expected = reference.generate_page(name)
    found = committed(name) if (reference.FOLDER / name).exists() else ""
    changed = difflib.unified_diff(
        found.splitlines(), expected.splitlines(), "committed", "generated", lineterm="", n=0
    )
    first = "\n".join(list(changed)[:10])
    assert found == expected, f"docs/reference/{name}: run `{reference.COMMAND}`\n{first}"


def test_every_setting_has_its_sentence():
    silent = [entry.key for entry in ENTRIES if entry.declared is None]
    assert silent == [], "declare it with setting(default, doc=...)"
    unfinished = [
        entry.key for entry in ENTRIES if entry.declared and not entry.declared.doc.endswith(".")
    ]
    assert unfinished == []


def test_every_section_has_its_sentence():
    silent = []
    for section in SECTIONS:
        doc = section.cls.__doc__ or ""
        if not doc or doc.startswith(f"{section.cls.__name__}("):  # what dataclass writes for none
            silent.append(section.keys)
    assert silent == []


def test_every_setting_is_on_the_page():
    page = committed("configuration.md")
    saved = config.flatten(config.to_dict(config.RunConfig()))
    missing = [key for key in saved if f'<a id="{key}"></a>' not in page]
    assert missing == []
    assert len(ENTRIES) >= len(saved)


def test_a_default_is_inside_its_range():
    outside = []
    for entry in ENTRIES:
        default, declared = entry.field.default, entry.declared
        if isinstance(default, int | float) and declared and not declared.allows(default):
            outside.append(entry.key)
    assert outside == []


def test_every_job_is_on_the_page_with_an_example():
    assert sorted(jobs.EXAMPLES) == jobs.job_names()
    page = committed("jobs.md")
    assert [name for name in jobs.job_names() if f"## `jobs.{name}`" not in page] == []


@pytest.mark.parametrize("name", jobs.job_names())
def test_an_example_runs_and_every_option_is_explained(name):
    face = jobs.read_job(name)
    options = face.parser.parse_args(["--config", *jobs.EXAMPLES[name].split()])
    config.load(reference.ROOT / options.config, options.overrides)
    assert face.about.strip()
    assert [action.dest for action in jobs.own_options(face.parser) if not action.help] == []


def test_every_endpoint_is_on_the_page():
    page = committed("http.md")
    found = [f"{method} {path}" for method, path, _ in http.endpoints(http.api_document())]
    assert found
    assert [name for name in found if f"## `{name}`" not in page] == []


def test_every_metric_is_on_the_page():
    assert metrics.written_run_metrics() == set(metrics.RUN_METRICS)
    assert TaskMetrics().result().keys() == metrics.SCORE_METRICS.keys()

    page = committed("metrics.md")
    assert [m.name for m in metrics.server_metrics() if f"`{m.name}`" not in page] == []

    # a group of metrics in an object of its own is registered all the same
    exported = [*IngressMetrics().registry.collect(), *ReplicaMetrics().registry.collect()]
    found = {metric.family.name for metric in metrics.server_metrics()}
    assert {family.name for family in exported} <= found
