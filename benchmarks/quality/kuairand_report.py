"""The sections "Variants of the KuaiRand preset" and "Masks that bite" of RESULTS.md.

They are of the lines that benchmarks/plans/kuairand.yaml, the plan of its test, kuairand_masks.yaml
and ml1m_masks.yaml leave.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality import choose, report
from benchmarks.quality.train_plan import read_plan_file
from benchmarks.report import RUNS
from pipeline.figures import Figures, read_runs

RUNS_FILE = RUNS / "kuairand.jsonl"
DIFFERENCES = (
    RUNS / "kuairand_differences.json"
)  # of the best on validation beside the preset, test
# the preset's seeds and those that they taught, side by side on one machine
TAUGHT_FILE = RUNS / "distilled.jsonl"
PLANS = report.ROOT / "benchmarks" / "plans"
TAUGHT = {  # what a row's label is
    "distilled": "half a row's label is its own and half the mean of their probabilities",
    "distilled_whole": "a row's label is the mean of their probabilities",
    "distilled_filled": (
        "half and half, and where nobody knows a row's is_click or is_profile_enter, nine rows of "
        "ten, the mean alone, counting a quarter"
    ),
}
SEEDS = 5  # fewest of a run that takes part in the choice


def measured_runs(plan: Path, lines: Sequence[Figures]) -> list[str]:
    """The plan's runs that have lines, in its order."""
    there = {line["name"] for line in lines}
    return [name for name in read_plan_file(plan)["runs"] if name in there]


def mean_runs(names: Sequence[str], lines: Sequence[Figures]) -> list[str]:
    """The lines that `benchmarks.quality.ensemble` left of these runs."""
    there = dict.fromkeys(line["name"] for line in lines)
    return [name for name in there if name.rpartition("-mean")[0] in names]


def variants_section(
    runs_file: Path = RUNS_FILE,
    differences: Figures | None = None,
    taught_file: Path = TAUGHT_FILE,
) -> str:
    """Validation, what it chose and by which rule, and the test of that beside the preset."""
    lines = read_runs(runs_file)
    names = measured_runs(PLANS / "kuairand.yaml", lines)
    text = report.section(
        runs_file,
        [*names, *mean_runs(names, lines)],
        split="val",
        title="Variants of the KuaiRand preset",
    )

    compared = choose.compare_runs(lines, names, "preset", SEEDS)
    chosen = (
        f"Chosen by `python -m benchmarks.quality.choose benchmarks/plans/kuairand.yaml --beside "
        f"preset`: the highest mean AUC on validation over the seeds that all have, {SEEDS} at "
        f"least. It is `{compared[0].name}`."
    )
    parts = [text, chosen, choose.comparison_table(compared, "preset")]
    tested = dict.fromkeys(["preset_test", f"{compared[0].name}_test"])
    there = [name for name in tested if any(line["name"] == name for line in lines)]
    if there:
        parts.append("The same on the test rows, trained to 2 May and scored once:")
        there += mean_runs(there, lines)
        parts.append(report.metrics_table(runs_file, there, "test"))
    if differences is not None:
        parts += report.difference_text(differences)
    if taught_file.exists():
        parts += taught_parts(taught_file)
    return "\n\n".join(parts)


def taught_parts(taught_file: Path) -> list[str]:
    """What one model learned from several seeds of the preset: validation, the best by the same
    rule, and the test where it was scored.
    """
    lines = read_runs(taught_file)
    names = measured_runs(PLANS / "kuairand.yaml", lines)
    seeds = report.read_seeds(taught_file, "preset")
    forms = "; ".join(f"`{name}`: {TAUGHT[name]}" for name in names if name in TAUGHT)
    words = (
        f"One model taught by {len(seeds)} seeds of the preset. {forms}. "
        f"`{seeds[0]['command']} --only {' '.join(names)} --device cuda`, "
        f"{seeds[0]['environment']['device']}; figures in `benchmarks/runs/{taught_file.name}`. "
        "Validation:"
    )
    table = report.metrics_table(taught_file, [*names, *mean_runs(names, lines)], "val")
    parts = [words, table]

    compared = choose.compare_runs(lines, names, "preset", min(SEEDS, len(seeds)))
    parts.append(f"By the same rule the best of these is `{compared[0].name}`.")
    parts.append(choose.comparison_table(compared, "preset"))

    tested = [f"{name}_test" for name in names]
    tested = [name for name in tested if any(line["name"] == name for line in lines)]
    if tested:
        parts.append("These on the test rows, trained to 2 May and scored once:")
        tested += mean_runs(tested, lines)
        parts.append(report.metrics_table(taught_file, tested, "test"))
    return parts


def masks_section(runs_file: Path = RUNS_FILE) -> str:
    """Both tables: KuaiRand's and that of MovieLens-1M."""
    lines = read_runs(runs_file)
    parts = []
    for plan, title in (
        ("kuairand_masks.yaml", "Masks that bite: KuaiRand subset"),
        ("ml1m_masks.yaml", "Masks that bite: MovieLens-1M by order, histories to 2,314"),
    ):
        names = measured_runs(PLANS / plan, lines)
        if names:
            parts.append(report.section(runs_file, names, split="val", title=title))
    return "\n\n".join(parts)
