"""Turn a public dataset, or a generator's output, into the run's LOG, USER and ITEM tables."""

import argparse

from jobs import cli

# what takes seconds to import is imported where it is used, after the settings were read


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="replace logs of another source or other settings"
    )


def run_job(job: cli.Job) -> None:
    from pipeline.logs import import_logs

    report = import_logs(job.cfg, overwrite=job.options.overwrite)
    print(
        f"rows={report.rows} files={len(report.files)} quarantined={report.quarantined} "
        f"counts={report.counts}"
    )


def plan_job(job: cli.Job) -> dict[str, object]:
    from pipeline.logs import plan_import

    return plan_import(job.cfg.source, job.cfg.folders)


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
