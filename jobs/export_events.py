"""Take the events that the server was sent, and what it served (`serve.exposures`), over into the
logs; or forget the events that the published sequences hold.

    jobs.export_events → jobs.build_sequences --append → jobs.deploy → jobs.export_events --prune

The server may go on meanwhile: an event counts once, whether it is in the log, in the sequences or
in both.
"""

import argparse
import math

from jobs import cli

# what takes seconds to import is imported where it is used, after the settings were read


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prune",
        action="store_true",
        help="forget what the sequences hold; only after jobs.deploy has served them",
    )


def run_job(job: cli.Job) -> None:
    from pipeline.logs import live_log_dir
    from serve_app.deployment import served_folder
    from serve_app.feedback.exposures import ServedAnswers, settled_before
    from serve_app.history.export import export_events, prune_events
    from serve_app.ranking.rollout import open_events

    cfg, wanted = job.cfg, job.cfg.serve.exposures
    log = open_events(cfg.serve, cfg.run_dir / "serving")
    if job.options.prune:
        settled_ms = math.inf
        if wanted is not None:
            folder, flush_s = live_log_dir(cfg.run_dir), cfg.serve.served_flush_s
            settled_ms = settled_before(folder, wanted, flush_s)
        print(f"removed={prune_events(cfg.sequence_dir, cfg.sequences, log, settled_ms)}")
        return

    served = None
    if wanted is not None:
        served = ServedAnswers(served_folder(cfg.serve, cfg.run_dir), wanted)
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
