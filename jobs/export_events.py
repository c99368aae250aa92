"""Take the events that the server was sent, and what it served (`serve.exposures`), over into the
logs; or forget the events that the published sequences hold.

    jobs.export_events → jobs.build_sequences --append → jobs.deploy → jobs.export_events --prune

The server may go on meanwhile: an event counts once, whether it is in the log, in the sequences or
in both.
"""

import argparse

from jobs import cli

# what takes seconds to import is imported where it is used, after the settings were read


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prune",
        action="store_true",
        help="forget what the sequences hold; only after jobs.deploy has served them",
    )


def run_job(job: cli.Job) -> None:
    from serve_app.deployment import served_folder
    from serve_app.feedback.exposures import ServedAnswers
    from serve_app.history.export import export_events, prune_events
    from serve_app.ranking.rollout import open_events

    log = open_events(job.cfg.serve, job.cfg.run_dir / "serving")
    if job.options.prune:
        print(f"removed={prune_events(job.cfg.sequence_dir, job.cfg.sequences, log)}")
        return

    cfg, served = job.cfg, None
    if cfg.serve.exposures is not None:
        served = ServedAnswers(served_folder(cfg.serve, cfg.run_dir), cfg.serve.exposures)
    done = export_events(cfg.source, cfg.sequences, cfg.run_dir, log, served)
    print(
        f"file={done.path} events={done.num_events} exposures={done.num_exposures} "
        f"dropped={done.dropped} refused={done.refused} left_out={done.left_out}"
    )


def plan_job(job: cli.Job) -> dict[str, object]:
    from pipeline.logs import live_log_dir

    cfg = job.cfg
    events = cfg.serve.redis_url or str(cfg.run_dir / "serving" / "events.sqlite")
    return {"reads": events, "writes": str(live_log_dir(cfg.run_dir))}


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
