"""Recommend items to every user of the published sequences with the champion: Parquet files of
user_id, place, item_id, score, retrieval_score and source.

The lists are those that POST /v1/recommend would answer with, for the same request at the same time
and without events posted since.
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import cli
from pipeline import config
from pipeline.config import RunConfig, UserError

if TYPE_CHECKING:
    from pipeline.recommend.everybody import SharedRequest
    from serve_app.recommend.schemas import ArrowOptions

# what takes seconds to import is imported where it is used, after the settings were read


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--request",
        default="{}",
        metavar="JSON",
        help="n, exclude, filter, diversify, order_by and request_features, as in the body of POST "
        "/v1/recommend",
    )
    parser.add_argument(
        "--as-of",
        metavar="TIME",
        help="recommend by what happened before, as 2022-05-03T00:00:00+08:00; default: now",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the lists; default: recommendations of the run"
    )


def run_job(job: cli.Job) -> None:
    from pipeline import tracking
    from pipeline.recommend.everybody import recommend_everybody
    from pipeline.sequences import store

    cfg, options = job.cfg, job.options
    request = _shared_request(job, _read_options(job))
    store.read_manifest(cfg.sequence_dir)  # a mistake is told before MLflow is started
    out = options.out or cfg.run_dir / "recommendations"
    with tracking.session(cfg) as tracker:
        model_dir, version = tracker.download_champion()

    summary = recommend_everybody(cfg, model_dir, request, out)
    print(f"version={version} lists={out}")
    for key, value in summary.items():
        print(f"{key:22}{value}")


def _read_options(job: cli.Job) -> "ArrowOptions":
    """What `--request` says of every list."""
    from pydantic import ValidationError

    from serve_app.recommend.schemas import ArrowOptions

    try:
        asked = ArrowOptions.model_validate_json(job.options.request)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        named = f"--request {where}" if where else "--request"  # what is no JSON has no place
        raise UserError(f"{named}: {first['msg']}, got {first['input']!r}") from None

    limit = job.cfg.serve.max_recommended
    if asked.n > limit:
        raise UserError(
            f"--request n: at most {limit} items (serve.max_recommended), got {asked.n}"
        )
    return asked


def _shared_request(job: cli.Job, asked: "ArrowOptions") -> "SharedRequest":
    """The request of every user; a mistake that the settings show is told before anything starts.

    The version that answers is asked again: it may have been trained with other settings.
    """
    from pipeline.recommend.everybody import SharedRequest, check_settings

    cfg, as_of = job.cfg, job.options.as_of
    if not cfg.tasks:
        raise UserError("tasks: []: lists are ordered by a task's score, and there is none")

    time_ms = int(time.time() * 1000)
    if as_of is not None:
        time_ms = config.parse_time("--as-of", as_of)

    request = SharedRequest(
        wish=asked.wish(),
        task=asked.order_by or cfg.tasks[0],
        time_ms=time_ms,
        features=asked.request_features,
    )
    check_settings(cfg.tasks, cfg.features, request)
    return request


def plan_job(job: cli.Job) -> dict[str, object]:
    from pipeline import tracking
    from pipeline.sequences import store

    cfg: RunConfig = job.cfg
    asked = _read_options(job)
    request = _shared_request(job, asked)
    manifest = store.read_manifest(cfg.sequence_dir)
    return {
        **tracking.plan_session(cfg),
        "users": manifest.num_users,
        "tasks": len(manifest.buckets),
        "time_ms": request.time_ms,
        "request": asked.model_dump(exclude_defaults=True, exclude={"request_time_ms"}),
        "out": str(job.options.out or cfg.run_dir / "recommendations"),
    }


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
