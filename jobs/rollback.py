"""Move the alias champion back to the version before; jobs.deploy then serves it."""

from jobs import cli

# what takes seconds to import is imported where it is used, after the settings were read


def run_job(job: cli.Job) -> None:
    from pipeline import tracking

    with tracking.session(job.cfg) as tracker:
        version = tracker.roll_back()
    print(f"champion={version}")


def plan_job(job: cli.Job) -> dict[str, object]:
    from pipeline import tracking

    return tracking.plan_session(job.cfg)


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, plan=plan_job)
