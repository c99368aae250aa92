"""Clean the logs, gather them by user and publish the sequences."""

import argparse

from jobs import cli

# what takes seconds to import is imported where it is used, after the settings were read


def add_options(parser: argparse.ArgumentParser) -> None:
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--append",
        action="store_true",
        help="add the files that the published sequences do not have",
    )
    choice.add_argument(
        "--overwrite", action="store_true", help="replace sequences of other logs or settings"
    )


def run_job(job: cli.Job) -> None:
    from pipeline.sequences import build

    manifest = build.build_sequences(
        job.cfg, overwrite=job.options.overwrite, append=job.options.append
    )
    print(
        f"sequences={job.cfg.sequence_dir} digest={manifest.digest[:16]} "
        f"users={manifest.num_users} "
        f"rows={manifest.num_rows} rows_in={manifest.rows_in} "
        f"merged={manifest.rows_merged} capped={manifest.rows_capped} "
        f"quarantined={manifest.quarantined}"
    )


def plan_job(job: cli.Job) -> dict[str, object]:
    from pipeline.sequences import build

    return build.plan_build(job.cfg)


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
