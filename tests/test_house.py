"""The plan of the house: arrows between its rooms point one way, no module reaches itself, and
functions stay short and take what they read.
"""

from tests.support.house import LIBRARY, circles, density, import_graph

# Functions that take the whole configuration (`python -m tests.support.house` counts them): most of
# them read four sections or more, or save all. Lower it where you mend some.
MOST_THAT_TAKE_RUN_CONFIG = 90

# Each imports from rooms above it alone (and from itself).
ROOMS = (
    "kernels",
    "pipeline.schema",
    "pipeline.files",
    "pipeline.version",
    "pipeline.lifeline",
    "pipeline.waiting",
    "pipeline.run_note",
    "pipeline.config",
    "pipeline.disk",
    "pipeline.figures",
    "pipeline.cluster",
    "pipeline.logs",
    "pipeline.sequences",
    "pipeline.batches",
    "pipeline.evaluate.metrics",  # definitions, of which a model's head makes use
    "pipeline.model",
    "pipeline.index",
    "pipeline.recommend",
    "pipeline.evaluate",
    "pipeline.tracking",
    "pipeline.train",
    "pipeline.search",
    "pipeline.study",
    "serve_app",
    "jobs",
)


def room_of(module: str) -> str | None:
    inside = [room for room in ROOMS if module == room or module.startswith(f"{room}.")]
    return inside[0] if inside else None


def test_every_module_has_a_room():
    homeless = [module for module in import_graph(*LIBRARY) if room_of(module) is None]
    assert homeless == ["pipeline"]  # the empty package around the rooms


def test_imports_point_one_way():
    upward = []
    for module, imported in import_graph(*LIBRARY).items():
        for other in imported:
            here, there = room_of(module), room_of(other)
            if here and there and ROOMS.index(there) > ROOMS.index(here):
                upward.append(f"{module} imports {other}")
    assert upward == []


def test_no_job_is_imported():
    graph = import_graph(*LIBRARY, "benchmarks")
    importers = {
        f"{module} imports {other}"
        for module, imported in graph.items()
        for other in imported
        if other.startswith("jobs.") and other != "jobs.cli"
    }
    assert importers == set()


def test_no_module_reaches_itself():
    assert circles(import_graph(*LIBRARY, "benchmarks")) == []


def test_functions_take_the_sections_that_they_read():
    assert density(*LIBRARY).take_run_config <= MOST_THAT_TAKE_RUN_CONFIG


def test_functions_are_short():
    """At most 60 lines, but for kernels, where a function is what a GPU runs."""
    assert density("pipeline", "serve_app", "jobs").long_functions == 0


def test_a_circle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(graph) == [["b", "c"]]
