"""Take users out of everything that a run holds of them: sequences, posted events, and what was
made of either, their side features in models and in registered versions included.

The weights of models that were trained on their rows are not changed; docs/guide/deletion.md says
what else is left to do.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import cli
from pipeline.config import UserError

if TYPE_CHECKING:
    import numpy as np

# what takes seconds to import is imported where it is used, after the settings were read


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--user", action="append", default=[], help="a user_id, as your logs have it; may repeat"
    )
    parser.add_argument("--users-file", help="a text file with one user_id a line")


def run_job(job: cli.Job) -> None:
    from pipeline import tracking
    from pipeline.logs import live_log_dir
    from pipeline.sequences.upkeep import maintenance
    from serve_app import deployment
    from serve_app.feedback.served_log import forget_served
    from serve_app.history.export import only_export
    from serve_app.history.published import forget_copies
    from serve_app.ranking.rollout import open_events

    cfg, serving = job.cfg, job.cfg.run_dir / "serving"
    published = maintenance.published_with(cfg.sequence_dir, cfg.source, cfg.sequences)
    text = "user_id" in published.text_ids
    users = read_users(job.options.user, job.options.users_file, text=text)

    with only_export(live_log_dir(cfg.run_dir)):
        removed = maintenance.forget_users(cfg, users)
        if cfg.serve.redis_url is not None or serving.exists():
            removed["posted_events"] = open_events(cfg.serve, serving).forget(users.tolist())
    removed["copies_of_the_server"] = forget_copies(serving)
    served = deployment.served_folder(cfg.serve, cfg.run_dir)
    removed["served_rows"] = forget_served(served, users.tolist())

    removed["models"] = tracking.forget_in_folders(cfg.run_dir, users)
    renamed = tracking.forget_in_cache(deployment.cache_folder(cfg.runs_dir), cfg.name, users)
    deployment.rename_champions(cfg.runs_dir, renamed)
    removed["cached_versions"] = len(renamed)
    if tracking.has_server(cfg.tracking, cfg.runs_dir):
        with tracking.session(cfg) as tracker:
            removed |= tracker.forget_users(users)

    counts = [f"{where}={rows}" for where, rows in removed.items()]
    print(f"users={len(users)} removed: {' '.join(counts)}")


def read_users(given: list[str], file: str | None, *, text: bool) -> "np.ndarray":
    """The ids of both, int64, ascending, each once; of text ids their codes."""

    import numpy as np

    from pipeline.logs.ids import LONGEST_ID, text_codes

    words = list(given)
    if file is not None:
        try:
            lines = Path(file).read_text().splitlines()
        except OSError as error:
            raise UserError(f"--users-file {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--users-file {file} is no text in UTF-8: {error}") from None
        for line in filter(None, lines):
            words += [line] if text else line.split()  # text may have spaces within

    for word in words:
        if not text and (not word.isdecimal() or int(word) >= 2**63):
            raise UserError(f"a user_id must be an integer from 0 to 2**63 - 1, got {word!r}")
        if not 0 < len(word) <= LONGEST_ID:
            raise UserError(f"a user_id must have 1 to {LONGEST_ID} characters, got {word!r}")
    if not words:
        raise UserError("nobody to forget: give --user or --users-file")

    return np.unique(text_codes(words) if text else np.array(list(map(int, words)), np.int64))


def plan_job(job: cli.Job) -> dict[str, object]:
    from pipeline.sequences.upkeep import maintenance

    cfg = job.cfg
    manifest = maintenance.published_with(cfg.sequence_dir, cfg.source, cfg.sequences)
    text = "user_id" in manifest.text_ids
    users = read_users(job.options.user, job.options.users_file, text=text)
    events = cfg.serve.redis_url or str(cfg.run_dir / "serving" / "events.sqlite")
    return {
        "users": len(users),
        "sequences": str(cfg.sequence_dir),
        "parts": len(manifest.parts),
        "rows": manifest.rows_in,
        "events": events,
    }


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
