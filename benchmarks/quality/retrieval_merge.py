"""Lines of the retrieval benchmarks, put into the files that RESULTS.md is written from.

    python -m benchmarks.quality.retrieval_merge LINES.jsonl … --device "NVIDIA H200"
    python -m benchmarks.results retrieval

    memory_…, test        → retrieval_memory.json
    others of ML-1M, test → retrieval_ml1m.json
    ML-1M, val            → retrieval_ml1m_val.json
    KuaiRand, test        → retrieval_kuairand.json
    KuaiRand, val         → retrieval_kuairand_choice.json

A run that is there already, by name, seed, split, epoch and settings, is replaced.
"""

import argparse
from pathlib import Path

from benchmarks.report import RUNS, read_run, write_run
from pipeline.figures import Figures, read_runs


def file_of(run: Figures) -> str | None:
    """The name of the file that a run belongs to; None for one that is not shown."""
    test, of_memory = run["split"] == "test", run["name"].startswith("memory_")
    if "validation" in run:  # lines of KuaiRand alone have it
        return "retrieval_kuairand" if test else "retrieval_kuairand_choice"
    if not test:
        return None if of_memory else "retrieval_ml1m_val"
    if not run.get("end", True):
        return None
    return "retrieval_memory" if of_memory else "retrieval_ml1m"


def key_of(run: Figures) -> str:
    return str([run.get(part) for part in ("name", "seed", "split", "epoch", "set")])


def merge_lines(lines: list[Figures], device: str, folder: Path = RUNS) -> dict[str, int]:
    """How many runs each file got."""
    added: dict[str, int] = {}
    for line in lines:
        name = file_of(line)
        if name is None:
            continue
        path = folder / f"{name}.json"
        whole = read_run(path) if path.exists() else {"device": device, "runs": []}
        run = line | {"device": device}
        others = [other for other in whole["runs"] if key_of(other) != key_of(run)]
        write_run(path, whole | {"runs": [*others, run]})
        added[name] = added.get(name, 0) + 1
    return added


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("files", type=Path, nargs="+", help="JSON lines")
    parser.add_argument("--device", required=True, help="what they were run on")
    parser.add_argument("--into", type=Path, default=RUNS, help="folder of the files")
    options = parser.parse_args()

    lines = [line for path in options.files for line in read_runs(path)]
    for name, count in merge_lines(lines, options.device, options.into).items():
        print(f"{name}: {count} runs")


if __name__ == "__main__":
    main()
