"""Take users out of everything that a run holds of them: sequences, posted events, and what was
made of either, their side features in models and in registered versions included.

The weights of models that were trained on their rows are not changed; docs/guide/deletion.md says
what else is left to do.
"""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path

from jobs import cli
from pipeline.config import UserError

# what takes seconds to import is imported where it is used, after the settings were read

logger = logging.getLogger(__name__)
MOST_NAMED = 20  # unknown users, of a list that was meant for another run perhaps


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--user", action="append", default=[], help="a user_id, as your logs have it; may repeat"
    )
    parser.add_argument("--users-file", help="a text file with one user_id a line")


def run_job(job: cli.Job) -> None:
    import numpy as np

    from pipeline import tracking
    from pipeline.logs import live_log_dir
    from pipeline.sequences.upkeep import maintenance
    from pipeline.sequences.upkeep.forgetting import are_unknown
    from serve_app import deployment
    from serve_app.feedback.served_log import forget_served
    from serve_app.history.export import only_export
    from serve_app.history.published import forget_copies
    from serve_app.ranking.rollout import open_events

    cfg, serving = job.cfg, job.cfg.run_dir / "serving"
    published = maintenance.published_with(cfg.sequence_dir, cfg.source, cfg.sequences)
    text = "user_id" in published.text_ids
    given = read_users(job.options.user, job.options.users_file, text=text)
    users = np.array(sorted(given), np.int64)

    with only_export(live_log_dir(cfg.run_dir)):
        unknown = are_unknown(cfg.sequence_dir, published, users)
        removed = maintenance.forget_users(cfg, users)
        if cfg.serve.redis_url is not None or serving.exists():
            events = open_events(cfg.serve, serving)
            unknown &= np.array(events.count_events(users.tolist())) == 0
            removed["posted_events"] = events.forget(users.tolist())
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
    _warn_of_unknown(users[unknown].tolist(), given)
    print(f"users={len(users)} unknown={unknown.sum()} removed: {' '.join(counts)}")


def _warn_of_unknown(unknown: list[int], given: Mapping[int, str]) -> None:
    """Name who is in no store of this run: a misspelt id has forgotten nobody."""
    if not unknown:
        return

    named = ", ".join(given[user] for user in unknown[:MOST_NAMED])
    if len(unknown) > MOST_NAMED:
        named += f" and {len(unknown) - MOST_NAMED} more"
    logger.warning(
        "neither in the sequences nor among the posted events: %s. Is the id as the logs have it?",
        named,
    )


def read_users(given: list[str], file: str | None, *, text: bool) -> dict[int, str]:
    """The ids of both, of text ids their codes, each with where it stands, in words that name no
    one of the file: what a job logs is kept longer than the file.

        {17: "--user '17'", 19: "line 2 of ids.txt"}
    """
    from pipeline.logs.ids import LONGEST_ID, text_codes

    words = list(given)
    places = [f"--user {word!r}" for word in given]
    if file is not None:
        try:
            lines = Path(file).read_text().splitlines()
        except OSError as error:
            raise UserError(f"--users-file {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--users-file {file} is no text in UTF-8: {error}") from None
        for number, line in enumerate(lines, start=1):
            found = [line] if text else line.split()  # text may have spaces within
            if line:
                words += found
                places += [f"line {number} of {file}"] * len(found)

    for word in words:
        if not text and (not word.isdecimal() or int(word) >= 2**63):
            raise UserError(f"a user_id must be an integer from 0 to 2**63 - 1, got {word!r}")
        if not 0 < len(word) <= LONGEST_ID:
            raise UserError(f"a user_id must have 1 to {LONGEST_ID} characters, got {word!r}")
    if not words:
        raise UserError("nobody to forget: give --user or --users-file")

    codes = text_codes(words).tolist() if text else list(map(int, words))
    return dict(zip(codes, places, strict=True))


def plan_job(job: cli.Job) -> dict[str, object]:
    import numpy as np

    from pipeline.sequences.upkeep import maintenance
    from pipeline.sequences.upkeep.forgetting import are_unknown

    cfg = job.cfg
    manifest = maintenance.published_with(cfg.sequence_dir, cfg.source, cfg.sequences)
    text = "user_id" in manifest.text_ids
    given = read_users(job.options.user, job.options.users_file, text=text)
    users = np.array(sorted(given), np.int64)
    events = cfg.serve.redis_url or str(cfg.run_dir / "serving" / "events.sqlite")
    return {
        "users": len(users),
        "not_in_sequences": int(are_unknown(cfg.sequence_dir, manifest, users).sum()),
        "sequences": str(cfg.sequence_dir),
        "parts": len(manifest.parts),
        "rows": manifest.rows_in,
        "events": events,
    }


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
