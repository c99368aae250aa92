"""RESULTS.md written anew from the committed figures: every table and every generated sentence.

    python -m benchmarks.results [SECTION …]      # all of them where none is named

Benchmarks write their figures to benchmarks/runs/ and call this for their own section. A test holds
RESULTS.md equal to what this writes, so that a figure in it is always one that was measured.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.build import at_size_report
from benchmarks.kernels import attention_report, layer_report, tables_report
from benchmarks.quality import (
    anchor_report,
    day_by_day_report,
    kuairand_report,
    long_histories,
    number_formats,
    retrieval_report,
    search,
    study_report,
)
from benchmarks.quality import report as quality_report
from benchmarks.report import RESULTS, RUNS, merge_runs, read_run, write_section
from benchmarks.serving import (
    deployed,
    gpu_load,
    gpu_replica,
    peeking,
    ranker,
    recommend,
    under_load_report,
)
from benchmarks.training import (
    collate,
    cpu_step,
    feeding,
    graph_sizes,
    load_balance,
    model,
    reading,
    real_loop,
    sharding,
    train_job,
)

ENCODERS = ("ultra_hstu", "hstu", "hstu_merged", "transformer", "sasrec", "din")
ABLATION = (
    "whole",
    "causal",
    "whole-no_mixture",
    "whole-no_heterogeneous_actions",
    "whole-window_0",
    "whole-full_rows_0",
    "whole-no_truncation",
    "stochastic_length",
    "exact",
    "exact_window_0",
    "exact_full_rows_0",
    "exact_no_truncation",
    "exact_stochastic_length",
    "whole-no_dense_features",
    "no_recent_rates",
    "no_item_id_dropout",
    "no_towers",
    "whole-fp8",
    "whole-fp8_served",
    "whole-int4_served",
)


def encoders() -> str:
    return quality_report.section(
        RUNS / "quality.jsonl",
        ENCODERS,
        split="test",
        title="Encoders at equal training FLOP, KuaiRand subset",
        differences=read_run(RUNS / "quality_differences.json"),
    )


def ablation() -> str:
    runs = RUNS / "ablation.jsonl"
    measured = {run["name"] for run in quality_report.read_runs(runs)}
    return quality_report.section(
        runs,
        [name for name in ABLATION if name in measured],
        split="val",
        title="Ablation of the tuned setting, KuaiRand subset, validation",
    )


def runs_of(*names: str) -> list[Path]:
    return [RUNS / f"{name}.json" for name in names]


def runs_read(*names: str) -> list[dict]:
    return [read_run(path) for path in runs_of(*names)]


# Sections by the name between their marks.
SECTIONS: dict[str, Callable[[], str]] = {
    "attention": lambda: attention_report.section(
        merge_runs(*runs_of("attention_h200", "attention_cpu"))
    ),
    "data path": lambda: collate.section(*runs_read("collate")),
    "kuairand": lambda: anchor_report.section(*runs_read("kuairand_anchor", "demo")),
    "load balance": lambda: load_balance.section(*runs_read("load_balance")),
    "serving": lambda: under_load_report.section(*runs_read("serving")),
    "peeking": lambda: peeking.section(*runs_read("peeking")),
    "recommend": lambda: recommend.section(*runs_read("recommend")),
    "tables": lambda: tables_report.section(*runs_read("tables_h200")),
    "layer": lambda: layer_report.section(*runs_read("layer_h200")),
    "ranker": lambda: ranker.section(runs_read("ranker_cpu", "ranker_h100")),
    "formats": lambda: number_formats.section(runs_read("formats_h100", "formats_cpu")),
    "model": lambda: model.section(*runs_read("model_h200", "model_h100")),
    "graph_sizes": lambda: graph_sizes.section(*runs_read("graph_sizes")),
    "real_loop": lambda: real_loop.section(
        *runs_read("real_loop_65536", "real_loop_196608", "real_loop_count")
    ),
    "quality": encoders,
    "ablation": ablation,
    "day by day": lambda: day_by_day_report.section(
        day_by_day_report.read_days(day_by_day_report.RUNS_FILE),
        *runs_read("day_by_day_differences"),
    ),
    "long histories": lambda: long_histories.section(RUNS / "long_histories.jsonl"),
    "scaling studies": lambda: study_report.section(study_report.read_studies()),
    "retrieval": retrieval_report.measured_section,
    "feeding": lambda: feeding.section(*runs_read("feeding")),
    "cpu_step": lambda: cpu_step.section(cpu_step.read_runs()),
    "reading": lambda: reading.section(*runs_read("reading")),
    "build": lambda: at_size_report.section(*runs_read("build")),
    "sharding": lambda: sharding.section(
        runs_read(
            "sharding_h200_parity",
            "sharding_h200_killed",
            "sharding_h200_killed_to_one",
            "sharding_h200_graphs",
            "sharding_h200_now",
            "sharding_h200_tables",
            "sharding_h200_100gb",
            "sharding_h200_loader",
            "sharding_h200",
        )
    ),
    "train_job": lambda: train_job.section(train_job.read_runs()),
    "serve_gpu": lambda: gpu_replica.section(*runs_read("serve_gpu_h100")),
    "serve_gpu_load": lambda: gpu_load.section(gpu_load.read_runs()),
    "deployed": lambda: deployed.section(*runs_read("deployed")),
}


if search.read_runs():  # a search wants an idle machine for minutes
    SECTIONS["search"] = lambda: search.section(search.read_runs())
if kuairand_report.RUNS_FILE.exists():  # its runs need a machine of many cores
    SECTIONS["kuairand variants"] = lambda: kuairand_report.variants_section(
        differences=read_run(kuairand_report.DIFFERENCES)
        if kuairand_report.DIFFERENCES.exists()
        else None
    )
    if kuairand_report.masks_section():
        SECTIONS["masks"] = kuairand_report.masks_section


def write_sections(names: Sequence[str], path: Path = RESULTS) -> None:
    for name in names:
        write_section(name, SECTIONS[name](), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    options = parser.parse_args()

    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {sorted(unknown)}; there are {', '.join(SECTIONS)}")
    write_sections(options.sections or list(SECTIONS))


if __name__ == "__main__":
    main()
