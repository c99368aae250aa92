"""Gather the parts that a store keeps for its next build into few, and drop rows older than
sequences.keep_days.
"""

from jobs import cli

# what takes seconds to import is imported where it is used, after the settings were read


def run_job(job: cli.Job) -> None:
    from pipeline.sequences.upkeep import maintenance

    manifest = maintenance.compact_sequences(job.cfg)
    print(
        f"sequences={job.cfg.sequence_dir} digest={manifest.digest[:16]} "
        f"users={manifest.num_users} "
        f"rows={manifest.num_rows} parts={len(manifest.parts)} "
        f"kept_since_ms={manifest.kept_since_ms}"
    )


def plan_job(job: cli.Job) -> dict[str, object]:
    from pipeline.sequences.upkeep import maintenance

    cfg = job.cfg
    manifest = maintenance.published_with(cfg.sequence_dir, cfg.source, cfg.sequences)
    since_ms = maintenance.oldest_kept_ms(cfg.sequences, cfg.sequence_dir, manifest)
    return {"parts": len(manifest.parts), "rows": manifest.rows_in, "drops_before_ms": since_ms}


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, plan=plan_job)
