"""Compare two versions of the sequences; exit code 1 when a limit of `drift` is crossed.

Sizes, action rates, rows per user, request values and items of both, a distance for each, as a
table and as JSON.
"""

import argparse
import json
import sys
from dataclasses import asdict

from jobs import cli
from pipeline import config
from pipeline.files import write_atomically

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
    from pipeline.sequences import store
    from pipeline.sequences.quality import drift

    cfg, options = job.cfg, job.options
    if options.days is not None and options.days < 1:
        raise config.UserError(f"--days must be 1 or more, got {options.days}")

    # the two versions: a folder that was named, else the published sequences and those before
    later = drift.find_store(options.after) if options.after else cfg.sequence_dir
    earlier = drift.find_store(options.before) if options.before else later
    manifest = store.read_manifest(earlier) if options.before else drift.version_before(later)

    before = drift.count_profile(earlier, manifest, options.days)
    after = drift.count_profile(later, store.read_manifest(later), options.days)
    changes = drift.compare_profiles(before, after, cfg.drift)

    crossed = [change.quantity for change in changes if change.crossed]
    page = cfg.run_dir / "report" / "drift.json"
    content = {
        "before": before.digest,
        "after": after.digest,
        "days": options.days,
        "crossed": crossed,
        "changes": [asdict(change) for change in changes],
    }
    write_atomically(page, json.dumps(content, indent=1) + "\n")

    print(drift.format_table(changes))
    print(f"before={before.digest[:16]} after={after.digest[:16]} crossed={crossed} report={page}")
    if crossed:
        sys.exit(1)


def plan_job(job: cli.Job) -> dict[str, object]:
    cfg = job.cfg
    limits = {name: limit for name, limit in config.to_dict(cfg.drift).items() if limit is not None}
    return {
        "after": str(cfg.sequence_dir),
        "limits": limits,
        "writes": str(cfg.run_dir / "report" / "drift.json"),
    }


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
