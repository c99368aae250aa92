"""The build of the sequences at size: beside Polars and Ray's `map_groups`, its memory, and killed
at random.

    python -m benchmarks.build.at_size speed
        25M rows: rows/s of the build, Polars and map_groups, the same lists out
    python -m benchmarks.build.at_size memory
        25M and 100M rows with an object store of 2 GB: peak memory of all processes
    python -m benchmarks.build.at_size kills
        SIGKILL at a random moment, run again: the same manifest?
    python -m benchmarks.build.at_size text_ids
        100M rows, 10M users: the same logs with ids of text and of integers, in turn; time, peak
        memory, and the former killed and resumed

Each writes its part of benchmarks/runs/build.json and the section of benchmarks/RESULTS.md. Logs
come from the synthetic generator (one file a day, 20 days, 200 rows a user on average, Zipf lengths
up to 16,384) and stay in `--folder`, which is to be removed by hand: 100M rows take some 2 GB,
their sequences about as much again. Everything is timed as a whole command, from the start of
Python to its end, Ray's start included. `--rows` makes it a smoke test.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from benchmarks.build.at_size_report import section
from benchmarks.build.process_tree import Command, Measured
from benchmarks.report import write_run, write_section
from pipeline.sequences import store

RUN = Path(__file__).parents[1] / "runs" / "build.json"
LONGEST = 16_384
ROWS_PER_USER = 200
ROWS_PER_TEXT_USER = 10  # most rows are of users with few: the dictionary is large
DAYS = 20
PEER_LISTS = (
    "item_id",
    "event_time",
    "action_mask",
    "known_mask",
    "watch_ms",
    "request_index",
    "order_only",
    "tab",
)  # what build_peers writes


def zipf_exponent(rows: int, users: int, shortest: int) -> float:
    """So that the user of rank r having LONGEST / r**exponent rows, but at least `shortest`, makes
    `rows` rows.
    """
    rank = np.arange(1, users + 1, dtype=np.float64)
    low, high = 0.0, 4.0
    for _ in range(50):
        middle = (low + high) / 2
        total = np.clip(np.floor(LONGEST / rank**middle), shortest, LONGEST).sum()
        low, high = (middle, high) if total > rows else (low, middle)
    return round(high, 6)


def preset(
    options: argparse.Namespace, rows: int, name: str, rows_per_user: int = ROWS_PER_USER
) -> Path:
    """A configuration file for logs of about so many rows."""
    users = max(1, rows // rows_per_user)
    shortest = 16 if rows_per_user == ROWS_PER_USER else 4
    content = {
        "name": name,
        "runs_dir": str(options.folder),
        "source": {
            "kind": "synthetic",
            "actions": ["is_click", "long_view", "is_like"],
            "request_columns": ["tab"],
            "synthetic": {
                "num_users": users,
                "num_items": 1_000_000,
                "max_history": LONGEST,
                "length_exponent": zipf_exponent(rows, users, shortest),
                "min_history": shortest,
                "num_days": DAYS,
                "by_day": True,
            },
        },
        # not the clock's: the settings are part of a build
        "sequences": {"latest_time": "2030-01-01T00:00:00+00:00"},
        "ray": {"num_cpus": options.cpus, "object_store_mb": options.object_store_mb},
        "tasks": ["is_click"],
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def job(name: str, path: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"jobs.{name}", "--config", str(path), *arguments]


def run(
    options: argparse.Namespace, command: Sequence[str], *, sample_memory: bool = False
) -> Measured:
    return Command(command, options.folder / "output.log").finish(sample_memory=sample_memory)


def make_logs(
    options: argparse.Namespace, rows: int, name: str, rows_per_user: int = ROWS_PER_USER
) -> tuple[Path, Path, int]:
    """The preset, the folder of the logs and how many rows there are; made once."""
    path = preset(options, rows, name, rows_per_user)
    run(options, job("import_logs", path))
    logs = options.folder / name / "logs" / "log"
    return path, logs, sum(pq.read_metadata(file).num_rows for file in logs.glob("*.parquet"))


def sequences_of(options: argparse.Namespace, name: str) -> Path:
    return options.folder / name / "sequences"


def check_same_lists(folder: Path, peer: Path) -> int:
    """Every user's lists in the store are those that the peer wrote; returns the users compared.

    Raises:
        AssertionError: users, or a list, differ.
    """
    theirs = pa.concat_tables([pq.read_table(file) for file in sorted(peer.glob("*.parquet"))])
    theirs = theirs.take(pc.sort_indices(theirs["user_id"]))
    manifest, users = store.read_manifest(folder), 0
    for index in range(len(manifest.buckets)):
        ours = store.read_bucket(folder, manifest, index)
        same = theirs.take(pc.index_in(ours["user_id"], value_set=theirs["user_id"]))
        for name in ("user_id", *PEER_LISTS):
            assert same[name].cast(ours[name].type).equals(ours[name]), (
                f"{name} of {manifest.buckets[index].file}"
            )
        users += ours.num_rows
    assert users == theirs.num_rows, f"{users} users in the store, {theirs.num_rows} from the peer"
    return users


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    path, logs, rows = make_logs(options, options.rows, "speed")
    few_path, few_logs, few_rows = make_logs(options, options.map_groups_rows, "map_groups")
    peer = options.folder / "peer"
    cluster = ["--cpus", str(options.cpus), "--object-store-mb", str(options.object_store_mb)]
    polars = lambda kind: (
        lambda: [sys.executable, "-m", "benchmarks.build.peers", kind, str(logs), str(peer)]
    )
    contestants: dict[str, tuple[int, Path, Callable[[], list[str]]]] = {
        "build": (rows, sequences_of(options, "speed"), lambda: job("build_sequences", path)),
        "polars": (rows, peer, polars("polars")),
        "polars-streaming": (rows, peer, polars("polars-streaming")),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*contestants, "map_groups")}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in seconds}
    load_average = [os.getloadavg()[0]]
    for turn in range(options.repeats):  # side by side: what the machine does else hits all alike
        for name, (_, out, command) in contestants.items():
            shutil.rmtree(out, ignore_errors=True)
            measured = run(options, command())
            seconds[name].append(measured.seconds)
            cpu_seconds[name].append(measured.cpu_seconds)
            load_average.append(os.getloadavg()[0])
            print(name, round(measured.seconds, 1), round(measured.cpu_seconds, 1), flush=True)
            if name != "build" and turn == 0:
                check_same_lists(sequences_of(options, "speed"), peer)
    run(options, job("build_sequences", few_path))
    for _ in range(options.map_groups_repeats):
        shutil.rmtree(peer, ignore_errors=True)
        command = [
            sys.executable,
            "-m",
            "benchmarks.build.peers",
            "map_groups",
            str(few_logs),
            str(peer),
            *cluster,
        ]
        measured = run(options, command)
        seconds["map_groups"].append(measured.seconds)
        cpu_seconds["map_groups"].append(measured.cpu_seconds)
        print("map_groups", round(measured.seconds, 1), round(measured.cpu_seconds, 1), flush=True)
        check_same_lists(sequences_of(options, "map_groups"), peer)
    shutil.rmtree(peer)
    of = dict.fromkeys(contestants, rows) | {"map_groups": few_rows}
    found: dict[str, Any] = {"load_average": [round(value, 1) for value in load_average]}
    for name, times in seconds.items():
        found[name] = {
            "rows": of[name],
            "seconds": [round(value, 2) for value in times],
            "cpu_seconds": [round(value, 1) for value in cpu_seconds[name]],
            "rows_per_s": round(of[name] / statistics.median(times)),
        }
    return found


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for name, wanted in (("small", options.small_rows), ("large", options.rows)):
        path, _, rows = make_logs(options, wanted, f"memory_{name}")
        peaks, seconds = [], []
        for _ in range(options.repeats):
            shutil.rmtree(sequences_of(options, f"memory_{name}"), ignore_errors=True)
            measured = run(options, job("build_sequences", path), sample_memory=True)
            peaks.append(measured.peak_bytes)
            seconds.append(measured.seconds)
        manifest = store.read_manifest(sequences_of(options, f"memory_{name}"))
        assert manifest.rows_in == rows, (
            f"{manifest.rows_in} rows in the manifest, {rows} in the logs"
        )
        found[name] = {
            "rows": rows,
            "users": manifest.num_users,
            "buckets": len(manifest.buckets),
            "peak_mb": [round(peak / 2**20) for peak in peaks],
            "seconds": [round(value, 1) for value in seconds],
        }
    found["object_store_mb"] = options.object_store_mb
    found["ratio"] = round(
        statistics.median(found["large"]["peak_mb"]) / statistics.median(found["small"]["peak_mb"]),
        3,
    )
    return found


def measure_kills(options: argparse.Namespace) -> dict[str, Any]:
    path, _, rows = make_logs(options, options.rows, "kills")
    folder = sequences_of(options, "kills")
    build = job("build_sequences", path)
    shutil.rmtree(folder, ignore_errors=True)
    unbroken = run(options, build).seconds
    wanted = store.read_manifest(folder).digest
    rng, killed = random.Random(options.seed), []
    while len(killed) < options.kills:
        shutil.rmtree(folder)
        only_driver = len(killed) % 2 == 0
        after = rng.uniform(0, unbroken)
        command = Command(build, options.folder / "output.log")
        if not command.kill_after(after, only_driver=only_driver):
            continue  # it was done already
        done = {kind: len(list(folder.glob(f"{kind}/*.json"))) for kind in ("parts", "records")}
        resumed = run(options, build).seconds
        killed.append(
            {
                "after_s": round(after, 1),
                "only_driver": only_driver,
                "done": done,
                "resumed_s": round(resumed, 1),
                "same_digest": store.read_manifest(folder).digest == wanted,
            }
        )
        print(killed[-1], flush=True)
    return {"rows": rows, "unbroken_s": round(unbroken, 1), "seed": options.seed, "kills": killed}


def write_text_logs(logs: Path, folder: Path) -> None:
    """The logs with a UUID in the place of each user_id, and 24 hexadecimal digits of item_id."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for file in sorted(logs.glob("*.parquet")):
        if not (folder / file.name).exists():
            missing.append(file)
    if not missing:
        return

    texts = {name: _texts_of(missing, name) for name in ("user_id", "item_id")}
    for file in missing:
        rows = pq.read_table(file)
        for name, text in texts.items():
            place = rows.column_names.index(name)
            named = pa.chunked_array([text.take(part) for part in rows[name].chunks])
            rows = rows.set_column(place, name, named)
        pq.write_table(rows, folder / file.name, row_group_size=2**17)


def _texts_of(files: Sequence[Path], name: str) -> pa.Array:
    """The text of each number from 0 to the largest in a column of these files."""
    largest = 0
    for file in files:
        numbers = pq.read_table(file, columns=[name])[name]
        largest = max(largest, pc.max(numbers).as_py())
    of = _user_text if name == "user_id" else _item_text
    return pa.array([of(number) for number in range(largest + 1)], pa.string())


def _user_text(number: int) -> str:
    digits = hashlib.blake2b(number.to_bytes(8), digest_size=16).hexdigest()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _item_text(number: int) -> str:
    return hashlib.blake2b(number.to_bytes(8), digest_size=12).hexdigest()


def own_logs(options: argparse.Namespace, made_by: Path, name: str, logs: Path) -> Path:
    """A preset that reads logs like a user's own; `made_by`: the preset that has made them."""
    content = yaml.safe_load(made_by.read_text())
    content["name"] = name
    kept = {key: content["source"][key] for key in ("actions", "request_columns")}
    optional = {key: key for key in ("request_id", "watch_ms", "tie_breaker")}
    content["source"] = kept | {"kind": "parquet", "path": str(logs), "columns": optional}
    path = options.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def make_text_logs(options: argparse.Namespace, rows: int, name: str) -> tuple[Path, Path, int]:
    """The presets of the same logs with ids of integers and of text, and their rows."""
    made_by, logs, rows = make_logs(options, rows, name, ROWS_PER_TEXT_USER)
    texts = options.folder / f"{name}_as_text"
    write_text_logs(logs, texts)
    integers = own_logs(options, made_by, f"{name}_integers", logs)
    return integers, own_logs(options, made_by, f"{name}_texts", texts), rows


def measure_text_ids(options: argparse.Namespace) -> dict[str, Any]:
    integers, texts, rows = make_text_logs(options, options.rows, "ids")
    presets = {"integers": integers, "texts": texts}
    found: dict[str, Any] = {"rows": rows, "load_average": [round(os.getloadavg()[0], 1)]}
    for name in presets:
        found[name] = {"seconds": [], "cpu_seconds": [], "peak_mb": []}
    for _ in range(options.repeats):  # in turn: what the machine does else hits both
        for name, path in presets.items():
            shutil.rmtree(sequences_of(options, f"ids_{name}"), ignore_errors=True)
            measured = run(options, job("build_sequences", path), sample_memory=True)
            found[name]["seconds"].append(round(measured.seconds, 1))
            found[name]["cpu_seconds"].append(round(measured.cpu_seconds, 1))
            found[name]["peak_mb"].append(round(measured.peak_bytes / 2**20))
            found["load_average"].append(round(os.getloadavg()[0], 1))
            print(name, found[name], flush=True)

    folder = sequences_of(options, "ids_texts")
    manifest = store.read_manifest(folder)
    found["users"] = manifest.num_users
    found["dictionary_mb"] = round(sum(one.bytes for one in manifest.dictionary_files) / 2**20)
    found["ratio"] = _median_ratio(found, "seconds")
    found["cpu_ratio"] = _median_ratio(found, "cpu_seconds")
    print(json.dumps(found), flush=True)  # what follows may take as long again
    return found | measure_text_kills(options)


def measure_text_kills(options: argparse.Namespace) -> dict[str, Any]:
    """Builds of text ids, killed at a random moment and run again, of `--kill-rows` rows."""
    _, preset, rows = make_text_logs(options, options.kill_rows or options.rows, "kill_ids")
    folder = sequences_of(options, "kill_ids_texts")
    shutil.rmtree(folder, ignore_errors=True)
    unbroken_s = run(options, job("build_sequences", preset)).seconds
    wanted = store.read_manifest(folder).digest
    return {"kill_rows": rows, "kills": _kill_text_build(options, preset, wanted, unbroken_s)}


def _median_ratio(found: dict[str, Any], what: str) -> float:
    """The median over the pairs of runs: text over integers."""
    ratios = []
    for text, number in zip(found["texts"][what], found["integers"][what], strict=True):
        ratios.append(text / number)
    return round(statistics.median(ratios), 2)


def _kill_text_build(
    options: argparse.Namespace, path: Path, wanted: str, unbroken_s: float
) -> list[dict[str, Any]]:
    rng, killed = random.Random(options.seed), []
    while len(killed) < options.kills:
        shutil.rmtree(sequences_of(options, "kill_ids_texts"))
        command = Command(job("build_sequences", path), options.folder / "output.log")
        after = rng.uniform(0, unbroken_s)
        if not command.kill_after(after, only_driver=len(killed) % 2 == 0):
            continue  # it was done already
        run(options, job("build_sequences", path))
        digest = store.read_manifest(sequences_of(options, "kill_ids_texts")).digest
        killed.append({"after_s": round(after, 1), "same_digest": digest == wanted})
        print(killed[-1], flush=True)
    return killed


def versions() -> dict[str, str]:
    packages = {}
    for name in ("ray", "polars", "pyarrow"):
        with contextlib.suppress(PackageNotFoundError):  # only the comparison needs Polars
            packages[name] = version(name)
    return packages | {"Python": platform.python_version()}


def machine() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return f"{len(names)} cores of {names[0]}, {memory:.0f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what",
        choices=["speed", "memory", "kills", "text_ids", "report"],
        help="report: only write the section again",
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_build").absolute())
    parser.add_argument(
        "--rows", type=int, help="of the logs; 25M for speed, 100M for memory, 3M for kills"
    )
    parser.add_argument(
        "--small-rows", type=int, default=25_000_000, help="memory: the build to compare with"
    )
    parser.add_argument("--map-groups-rows", type=int, default=2_500_000)
    parser.add_argument("--repeats", type=int, help="runs of each; 3 for speed, 1 for memory")
    parser.add_argument("--map-groups-repeats", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument(
        "--kill-rows", type=int, help="text_ids: rows of the builds that are killed; default: all"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--cpus", type=int, default=2, help="logical CPUs of Ray")
    parser.add_argument("--object-store-mb", type=int, default=2000)
    parser.add_argument(
        "--no-section", action="store_true", help="print the figures and leave the documents alone"
    )
    options = parser.parse_args()
    options.folder = options.folder.absolute()
    found = json.loads(RUN.read_text()) if RUN.exists() else {}
    if options.what != "report":
        measures = {
            "speed": measure_speed,
            "memory": measure_memory,
            "kills": measure_kills,
            "text_ids": measure_text_ids,
        }
        rows = {
            "speed": 25_000_000,
            "memory": 100_000_000,
            "kills": 3_000_000,
            "text_ids": 100_000_000,
        }
        repeats = {"speed": 3, "memory": 1, "kills": 1, "text_ids": 3}
        options.rows = options.rows or rows[options.what]
        options.repeats = options.repeats or repeats[options.what]
        found |= {
            "machine": machine(),
            "versions": found.get("versions", {}) | versions(),
            options.what: measures[options.what](options),
        }
        print(json.dumps(found[options.what], indent=1))
    if not options.no_section:
        write_run(RUN, found)
        write_section("build", section(found))


if __name__ == "__main__":
    main()
