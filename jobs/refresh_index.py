"""Build the champion's item index anew, from the sequences and the item table of today, and make
the same model with it the champion.

    jobs.build_sequences --append → jobs.refresh_index → jobs.deploy

Items that came after the training can then be recommended and ranked: by their columns, with the id
of an unknown item. What is popular is counted again, over the model's training period. Exit code 1
if the gate keeps the champion.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from jobs import cli

# what takes seconds to import is imported where it is used, after the settings were read


def run_job(job: cli.Job) -> None:
    from pipeline import tracking
    from pipeline.index.folder import FOLDER
    from pipeline.sequences import store

    cfg = job.cfg
    manifest = store.read_manifest(cfg.sequence_dir)
    with tracking.session(cfg) as tracker, tempfile.TemporaryDirectory() as staging:
        champion, before = tracker.download_champion()
        # the model alone: its index and its card are made anew
        left_out = shutil.ignore_patterns(FOLDER, "README.md")
        folder = Path(shutil.copytree(champion, Path(staging) / "model", ignore=left_out))
        with tracker.start_run(cfg, manifest) as run:
            version = tracker.register_model(run, folder, same_as=before)
        decision = tracker.promote_version(version)

    print(f"version={version} of version {before} with a new index: {decision.reason}")
    if not decision.promoted:
        sys.exit(1)


def plan_job(job: cli.Job) -> dict[str, object]:
    from pipeline import tracking
    from pipeline.sequences import store

    manifest = store.read_manifest(job.cfg.sequence_dir)
    items = manifest.side_tables.get("items")
    return {
        **tracking.plan_session(job.cfg),
        "sequences": manifest.digest,
        "rows_of_the_item_table": None if items is None else items.rows,
    }


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, plan=plan_job)
