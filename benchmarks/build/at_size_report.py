"""benchmarks/runs/build.json as the section "Building the sequences" of RESULTS.md."""

import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

from benchmarks.report import table

NAMES = {
    "build": "**jobs.build_sequences**",
    "polars": "Polars, in-memory engine",
    "polars-streaming": "Polars, streaming engine",
    "map_groups": "Ray Data, `groupby().map_groups`",
}


def section(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [
        "## Building the sequences",
        "",
        f"{found['machine']}; {versions}.",
    ]
    sections = {"speed": speed, "memory": memory, "kills": kills, "text_ids": text_ids}
    for name, write in sections.items():
        if name in found:
            lines += ["", *write(found[name])]
    return "\n".join(lines)


def speed(found: dict[str, Any]) -> list[str]:
    ours = found["build"]["rows_per_s"]
    rows = []
    for name, what in NAMES.items():
        figures = found[name]
        seconds, rate = figures["seconds"], figures["rows_per_s"]
        spread = f"{statistics.median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f})"
        cells = (
            f"{figures['rows'] / 1e6:.2f}M",
            spread,
            f"{rate / 1e3:,.0f}k",
            f"{ours / rate:.2f}x",
        )
        rows.append([what, *cells])
    return [
        _paragraph(
            "`python -m benchmarks.build.at_size speed`: Parquet to Parquet, whole commands with "
            "Ray's start, medians (least",
            f"to most) of {len(found['build']['seconds'])} runs in turn; map_groups gets fewer "
            "rows. The peers write",
            "the same lists, compared user by user with the build's, and nothing else; the build "
            "also checks every",
            "row, looks for duplicates, hashes its files and counts the report.",
        ),
        "",
        table(["", "rows", "seconds", "rows/s", "the build's rate over it"], rows),
    ]


def memory(found: dict[str, Any]) -> list[str]:
    rows = []
    for name in ("small", "large"):
        figures = found[name]
        what = (
            f"{figures['rows'] / 1e6:.1f}M rows, {figures['users']:,} users, "
            f"{figures['buckets']} buckets"
        )
        rows.append(
            [
                what,
                f"{statistics.median(figures['peak_mb']):,.0f}",
                f"{statistics.median(figures['seconds']):.0f}",
            ]
        )
    return [
        _paragraph(
            "`python -m benchmarks.build.at_size memory`, object store of "
            f"{found['object_store_mb']:,} MB: peak over all",
            "processes of the job, sampled twice a second: Pss_Anon and Pss_File of each and the "
            "allocated blocks of",
            "the object store, so that what is shared counts once. The larger is",
            f"{found['ratio']:.2f} times the smaller.",
        ),
        "",
        table(["", "peak, MiB", "seconds"], rows),
    ]


def kills(found: dict[str, Any]) -> list[str]:
    cases = found["kills"]
    same = sum(case["same_digest"] for case in cases)
    return [
        _paragraph(
            f"`python -m benchmarks.build.at_size kills`, {found['rows'] / 1e6:.1f}M rows: "
            "SIGKILL at a random moment of the",
            f"{found['unbroken_s']} s that a build takes, in turn to the driver alone and to all "
            "its processes. Run",
            f"again, the manifest has the digest of the unbroken build in **{same} of "
            f"{len(cases)}** cases.",
        ),
        "",
        table(
            ["killed after, s", *_column(cases, "after_s")],
            [
                [
                    "parts and buckets done",
                    *(f"{case['done']['parts']}, {case['done']['records']}" for case in cases),
                ],
                ["second run, s", *_column(cases, "resumed_s")],
            ],
        ),
    ]


def text_ids(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, what in (("integers", "ids of integers"), ("texts", "ids of text")):
        figures = found[name]
        seconds = ", ".join(map(str, figures["seconds"]))
        cpu_seconds = ", ".join(map(str, figures["cpu_seconds"]))
        peak = f"{statistics.median(figures['peak_mb']):,.0f}"
        rows.append([what, seconds, cpu_seconds, peak])
    kills = found["kills"]
    same = sum(kill["same_digest"] for kill in kills)
    load = found["load_average"]
    return [
        _paragraph(
            f"`python -m benchmarks.build.at_size text_ids --rows {found['rows']}`: the same logs "
            f"of {found['users']:,} users with integers, and with UUIDs of users and 24 digits of "
            "items, in turn, whole commands. The machine did other work meanwhile (load average "
            f"{min(load)} to {max(load)}). Text takes **{found['ratio']:.2f} times** as long and "
            f"**{found['cpu_ratio']:.2f} times** the processor's seconds, medians of the pairs; "
            f"its dictionaries are {found['dictionary_mb']} MiB. Killed at a random moment and run "
            f"again, a build of {found['kill_rows'] / 1e6:.1f}M rows has the same digest in {same} "
            f"of {len(kills)} cases.",
        ),
        "",
        table(["", "seconds", "seconds of processors", "peak, MiB"], rows),
    ]


def _paragraph(*words: str) -> str:
    return textwrap.fill(" ".join(words), 120, break_on_hyphens=False, break_long_words=False)


def _column(cases: Sequence[dict[str, Any]], name: str) -> list[str]:
    return [str(case[name]) for case in cases]
