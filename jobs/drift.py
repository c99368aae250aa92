"""Compare two versions of the sequences; exit code 1 when a limit of `drift` is crossed.

Sizes, action rates, rows per user, request values and items of both, a distance for each, as a
table and as JSON.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import cli
from pipeline import config
from pipeline.files import write_atomically

if TYPE_CHECKING:
    from pipeline.sequences.store import Manifest

# what takes seconds to import is imported where it is used, after the settings were read


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--before",
        help="folder of a run or of its sequences; else the version before the published one",
    )
    parser.add_argument("--after", help="the same; else the published sequences of --config")
    parser.add_argument(
        "--days", type=int, help="only the newest so many days of each: a month hides a bad day"
    )


def run_job(job: cli.Job) -> None:
    from pipeline.sequences.quality import drift

    cfg, days = job.cfg, job.options.days
    earlier, later = find_versions(job)
    before = drift.count_profile(*earlier, days)
    after = drift.count_profile(*later, days)
    changes = drift.compare_profiles(before, after, cfg.drift)

    crossed = [change.quantity for change in changes if change.crossed]
    page = cfg.run_dir / "report" / "drift.json"
    content = {
        "before": before.digest,
        "after": after.digest,
        "days": days,
        "crossed": crossed,
        "changes": [asdict(change) for change in changes],
    }
    write_atomically(page, json.dumps(content, indent=1) + "\n")

    print(drift.format_table(changes))
    print(f"before={before.digest[:16]} after={after.digest[:16]} crossed={crossed} report={page}")
    if crossed:
        sys.exit(1)


def find_versions(job: cli.Job) -> "tuple[tuple[Path, Manifest], tuple[Path, Manifest]]":
    """The earlier and the later version, each as its folder and manifest: of a folder that was
    named, else the published sequences and those before.

    Raises:
        UserError: there is no such version, or no day to look at.
    """
    from pipeline.sequences import store
    from pipeline.sequences.quality import drift

    options = job.options
    if options.days is not None and options.days < 1:
        raise config.UserError(f"--days must be 1 or more, got {options.days}")

    later = drift.find_store(options.after) if options.after else job.cfg.sequence_dir
    published = store.read_manifest(later)
    if options.before:
        earlier = drift.find_store(options.before)
        return (earlier, store.read_manifest(earlier)), (later, published)
    return (later, drift.version_before(later)), (later, published)


def plan_job(job: cli.Job) -> dict[str, object]:
    cfg = job.cfg
    (before, _), (after, _) = find_versions(job)
    limits = {name: limit for name, limit in config.to_dict(cfg.drift).items() if limit is not None}
    return {
        "before": str(before),
        "after": str(after),
        "limits": limits,
        "writes": str(cfg.run_dir / "report" / "drift.json"),
    }


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
