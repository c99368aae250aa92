"""The whole chain: logs → sequences → training → evaluation → registry → gate → server → ranking
requests over HTTP.
"""

import argparse
import json
import logging
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import cli
from pipeline import config
from pipeline.config import IndexConfig, RunConfig, ServeConfig, SplitConfig, UserError
from pipeline.files import json_text, write_atomically

if TYPE_CHECKING:
    from pipeline import tracking
    from pipeline.sequences.store import Manifest
    from serve_app.feedback.turn import Decide
    from serve_app.replay import DemoRequest, PastPeriod

# what takes seconds to import is imported where it is used, after the settings were read

logger = logging.getLogger(__name__)

SAMPLES = 200  # of users, for the intervals of the comparison
RUN_FILE = "run.json"  # marks a folder as a run's own, so that --fresh removes nothing else


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--force-first",
        action="store_true",
        help="promote a first champion that does not beat the item's smoothed rate; the registry "
        "says so",
    )
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="at the end train the same preset with this setting changed, and compare; may repeat",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--fresh",
        action="store_true",
        help="remove what an earlier run of this name left, then begin",
    )
    choice.add_argument(
        "--append",
        action="store_true",
        help="add the logs that came since, and train on them from the champion",
    )
    choice.add_argument(
        "--loop",
        type=int,
        nargs="?",
        const=1000,
        metavar="VISITS",
        help="serve a demo's champion to people who do not exist for five days, and append what "
        "they were shown and clicked; default: 1000 lists",
    )
    parser.add_argument(
        "--promote-if",
        metavar="TASK",
        help="with --loop: the next version answers half of the people for a day, and becomes "
        "champion if they do more of TASK with it and it passes the gate (jobs.verdict)",
    )


def run_job(job: cli.Job) -> None:
    from pipeline.train.one_at_a_time import only_training

    cfg = job.cfg
    check_options(job)
    with only_training(cfg.runs_dir, cfg.name):
        summary = run_alone(job)

    path = cfg.run_dir / "summary.json"
    write_atomically(path, json_text(summary))
    print_summary(cfg.name, cfg.tasks, summary)
    print(f"all of it in {path}")


def run_alone(job: cli.Job) -> dict[str, Any]:
    """All stages while no other job trains under this name; returns what `summary.json` holds."""
    from pipeline import tracking
    from pipeline.cluster import ray_cluster
    from pipeline.train import supervision

    cfg = job.cfg
    check_settings(cfg)
    baseline = read_baseline(job)
    supervision.refuse_impossible_size(cfg.ray, cfg.train)
    if job.options.fresh:
        remove_run(cfg.run_dir)
        if baseline is not None:
            shutil.rmtree(baseline.train_dir, ignore_errors=True)

    write_atomically(cfg.run_dir / RUN_FILE, json.dumps(config.to_dict(cfg), indent=2))
    with (
        tracking.session(cfg) as tracker,
        ray_cluster(
            cfg.ray,
            runs_dir=cfg.runs_dir,
            include_dashboard=True,
            keep_logs=cfg.run_dir / "serving" / "logs",
        ) as cluster,
    ):
        looped = job.options.loop is not None
        run_whole = partial(
            run_chain,
            tracker=tracker,
            dashboard_url=cluster.dashboard_url,
            append=job.options.append or looped,
            force_first=job.options.force_first,
            baseline=baseline,
        )
        if not looped:
            return run_whole(cfg)

        from serve_app.feedback import turn

        url, visits = cluster.dashboard_url, job.options.loop
        return turn.run_turn(cfg, tracker, url, visits, run_whole, job.options.promote_if)


def check_options(job: cli.Job) -> None:
    """Say now what a turn of the loop would find later.

    Raises:
        UserError: the logs are of its user's own, nobody is to visit, or `--promote-if` names no
            task or has no `--loop`.
    """
    visits, promote_if = job.options.loop, job.options.promote_if
    looped = visits is not None
    if promote_if is not None and not looped:
        raise UserError("--promote-if goes with --loop; for a server that runs see jobs.verdict")
    cli.require_task(job.cfg.tasks, promote_if)
    if looped:
        from serve_app.feedback import turn

        turn.refuse_real_logs(job.cfg.source.kind)
        if visits < turn.DAYS:
            raise UserError(f"--loop must be {turn.DAYS} or more, a visit a day, got {visits}")


def check_settings(cfg: RunConfig) -> None:
    """Say now, not after the build or the training, what no stage could use.

    Raises:
        UserError: a setting that the encoder does not know, a key that cannot be read.
    """

    from pipeline.model.encoders import check_run
    from serve_app import deployment, replay

    check_run(cfg.model, cfg.train, retrieval=cfg.retrieval.enabled)
    deployment.check_protection(cfg.serve)
    replay.key_header(cfg.serve)


def run_chain(
    cfg: RunConfig,
    tracker: "tracking.Tracker",
    dashboard_url: str,
    *,
    append: bool = False,
    force_first: bool = False,
    baseline: RunConfig | None = None,
    decide: "Decide | None" = None,
) -> dict[str, Any]:
    """Every stage once, in order; returns what `summary.json` holds.

    With `append` new files of the logs join the published sequences. Where the last training read
    others, or had another split, a new one begins, with the champion's weights if they fit and rows
    have joined the training period; with neither, or after a kill, it goes on where it was.
    `baseline` is trained on the same sequences at the end, to be compared with. `decide` says in
    the gate's place whether the version becomes champion.
    """

    from pipeline import tracking
    from pipeline.evaluate import evaluator
    from pipeline.train import trainer

    manifest = prepare_sequences(cfg, append=append)
    report_sequences(cfg.split, manifest)
    check_item_columns(cfg.sequence_dir, cfg.index, cfg.serve)

    print_stage(3, "training")
    restart = append and trainer.trained_on_other_rows(cfg, manifest.digest)
    cfg, beginning = choose_start(cfg, tracker, append=append, restart=restart)
    trained = train_and_register(cfg, tracker, manifest, restart=restart, beginning=beginning)

    rows = tracking.RowsAtHand(
        evaluator.row_tags(cfg.sequence_dir, cfg.split),
        lambda folder: evaluator.score_model(cfg, folder),
    )
    if decide is None:
        decision = tracker.promote_version(trained.version, rows=rows, force_first=force_first)
    else:
        decision = decide(cfg, trained.version, rows)
    logger.info("version %d: %s", trained.version, decision.reason)

    champion = find_servable(tracker, manifest, decision)
    served = trained.model_dir if decision.promoted else tracker.download_champion()[0]
    over_http = serve_and_replay(cfg, dashboard_url, champion, served)

    print("== comparison", flush=True)
    page = compare(cfg, tracker, manifest, trained.metrics, baseline)

    return summarise_run(cfg.tasks, manifest, trained.train_seconds, trained.metrics) | {
        "mlflow_run_id": trained.run_id,
        "model_version": trained.version,
        "promoted": decision.promoted,
        "promotion": decision.reason,
        **over_http,
        "comparison": None if page is None else str(page),
    }


@dataclass(frozen=True, slots=True)
class TrainedVersion:
    """A registered version, and what came of its training and evaluation."""

    version: int
    model_dir: Path
    train_seconds: float
    metrics: dict[str, float]
    run_id: str  # of MLflow


def train_and_register(
    cfg: RunConfig,
    tracker: "tracking.Tracker",
    manifest: "Manifest",
    *,
    restart: bool,
    beginning: Path | None,
) -> TrainedVersion:
    """Train from the weights in `beginning`, evaluate and register, in one MLflow run.

    With `restart` from the first step, whatever checkpoints there are.
    """

    from pipeline.evaluate import evaluator
    from pipeline.train import trainer

    if not restart:
        trainer.earlier_checkpoint(cfg)  # a mistake is told before the MLflow run is touched

    with tracker.training_run(manifest, restart=restart) as run:
        run.log_artifacts(cfg.run_dir / "report", "validation_report")
        started = time.perf_counter()
        model_dir = trainer.fit_model(cfg, run, restart=restart, champion=beginning)
        train_seconds = time.perf_counter() - started

        print_stage(4, "evaluation on validation and test")
        metrics = evaluator.evaluate_model(cfg, model_dir)
        folder = evaluator.evaluation_folder(cfg.run_dir, cfg.evaluate)
        tracker.log_evaluation(model_dir, metrics, folder)

        print_stage(5, "registry and gate")
        version = tracker.register_trained()
    return TrainedVersion(version, model_dir, train_seconds, metrics, run.run_id)


def report_sequences(split: SplitConfig, manifest: "Manifest") -> None:
    """Say what the sequences hold and what was left out.

    Raises:
        UserError: the validation period holds nothing, so that no model could be judged.
    """

    from pipeline.evaluate import evaluator

    logger.info(
        "%d users, %d rows; merged %d, beyond sequences.max_rows_per_user %d, quarantined %s",
        manifest.num_users,
        manifest.num_rows,
        manifest.rows_merged,
        manifest.rows_capped,
        manifest.quarantined,
    )
    if "val" in evaluator.tell_empty_splits(split, manifest):
        raise UserError(
            "split.t_val: the validation period holds no request, so no model of it could pass the "
            "gate; nothing is trained"
        )


def check_item_columns(sequence_dir: Path, index: IndexConfig, serve: ServeConfig) -> None:
    """Say now, not after the training, which columns the item table lacks.

    Raises:
        UserError: one that the index or the page is to have.
    """

    from pipeline.index.catalogue import wanted_columns
    from pipeline.sequences import store
    from serve_app.page.catalogue import check_columns

    if index.enabled:
        wanted_columns(store.read_side_table(sequence_dir, "items"), index)
    check_columns(sequence_dir, serve)


def serve_and_replay(
    cfg: RunConfig, dashboard_url: str, champion: "tracking.PinnedModel", served: Path
) -> dict[str, Any]:
    """Deploy the champion, whose model lies in `served` too, and hold its answers against it."""

    from serve_app import deployment, replay

    print_stage(6, f"serving version {champion.version} of {champion.name}")
    url = deployment.deploy_model(cfg.folders, cfg.serve, dashboard_url, champion)

    print_stage(7, "requests over HTTP")
    period = replay.PastPeriod.of_run(cfg)
    demo = replay.demo_request(period, cfg.model_dir, cfg.serve.demo_candidates)
    print(replay.demo_table(demo, cfg.tasks, cfg.serve, url))

    parity = replay.replay(period, cfg.serve, url, served)
    recommended = {}
    if cfg.index.enabled:
        recommended = recommend(period, demo, cfg.serve, url, served)

    return {
        "parity_requests": parity.num_requests,
        "parity_max_abs_diff": parity.max_abs_diff,
        "http_p50_ms": parity.p50_ms,
        "http_p99_ms": parity.p99_ms,
        **recommended,
    }


def recommend(
    period: "PastPeriod", demo: "DemoRequest", serve: ServeConfig, url: str, served: Path
) -> dict[str, Any]:
    """Show a list recommended to the demo's user, and hold lists over HTTP against offline ones."""

    from serve_app.recommend import replay as replay_lists

    print(replay_lists.demo_list(demo, serve, url))
    lists = replay_lists.replay_lists(period, serve, url, served)
    return {
        "list_requests": lists.num_requests,
        "lists_equal": lists.num_equal,
        "lists_max_abs_diff": lists.max_abs_diff,
        "lists_http_p50_ms": lists.p50_ms,
        "lists_http_p99_ms": lists.p99_ms,
    }


def compare(
    cfg: RunConfig,
    tracker: "tracking.Tracker",
    manifest: "Manifest",
    metrics: Mapping[str, float],
    baseline: RunConfig | None,
) -> Path | None:
    """Hold the run against the item's smoothed rate, and against a baseline where there is one,
    which is trained and evaluated first and not registered; returns the page.

    None where no row was scored that could be compared.
    """

    from pipeline.batches.stored import StoredUsers
    from pipeline.evaluate import comparison_page, evaluator
    from pipeline.evaluate.comparison import item_rate_logits
    from pipeline.train import trainer

    scored = []
    for split in ("test", "val"):
        if any(f"{split}/ne/{task}" in metrics for task in cfg.tasks):
            scored.append(split)
    if not scored:
        logger.info("nothing to compare: no row of a task was scored")
        return None

    names = [cfg.name]
    if baseline is not None:
        names.append(baseline.name)
        anew = trainer.trained_on_other_rows(baseline, manifest.digest)
        with tracker.start_run(baseline, manifest) as run:
            model = trainer.fit_model(baseline, run, restart=anew)
            found = evaluator.evaluate_model(baseline, model)
            folder = evaluator.evaluation_folder(baseline.run_dir, baseline.evaluate)
            tracker.log_evaluation(model, found, folder)

    stored = StoredUsers(cfg.sequence_dir, cfg.source, cfg.features)
    item_rate = partial(item_rate_logits, stored, cfg.split)
    comparison = comparison_page.compare_runs(cfg.runs_dir, names, scored[0], SAMPLES, item_rate)
    print(comparison_page.console_table(comparison))
    page = comparison_page.write_page(cfg.run_dir / "comparison", comparison)
    tracker.log_comparison(comparison.models, comparison.run_ids, page.parent)
    return page


def read_baseline(job: cli.Job) -> RunConfig | None:
    """The preset with the settings of `--beside`, under a name of its own, on the same sequences;
    None without that option.

    Raises:
        UserError: a setting that its encoder does not know.
    """

    from pipeline.model.encoders import check_run

    cfg, options = job.cfg, job.options
    if not options.beside:
        return None

    baseline = config.load(options.config, [*options.overrides, *options.beside])
    encoder = baseline.model.encoder
    other = encoder if encoder != cfg.model.encoder else "beside"
    shared = replace(baseline.sequences, from_run=cfg.sequences.from_run or cfg.name)
    baseline = replace(baseline, name=f"{cfg.name}_{other}", sequences=shared)
    check_run(baseline.model, baseline.train, retrieval=baseline.retrieval.enabled)
    return baseline


def find_servable(
    tracker: "tracking.Tracker", manifest: "Manifest", decision: "tracking.Decision"
) -> "tracking.PinnedModel":
    """The champion, if it reads what these sequences hold.

    Raises:
        UserError: there is none, or it is of other data.
    """
    try:
        champion = tracker.find_champion()
    except UserError as error:
        raise UserError(f"{decision.reason}: there is nothing to serve ({error})") from None

    if not decision.promoted:
        logger.info(
            "the champion is %s version %d, of runs/%s",
            champion.name,
            champion.version,
            champion.trained_as,
        )
    tracker.require_fit(champion, manifest)
    return champion


def prepare_sequences(cfg: RunConfig, *, append: bool) -> "Manifest":
    """The run's own sequences, built; or those of `sequences.from_run`, as they are."""

    from pipeline import logs
    from pipeline.sequences import build
    from pipeline.sequences.store import read_manifest

    if cfg.sequences.from_run is not None:
        print_stage(2, f"sequences of run {cfg.sequences.from_run}")
        return read_manifest(cfg.sequence_dir)

    print_stage(1, "logs")
    logs.import_logs(cfg)
    print_stage(2, "sequences")
    return build.build_sequences(cfg, append=append)


def choose_start(
    cfg: RunConfig, tracker: "tracking.Tracker", *, append: bool, restart: bool
) -> tuple[RunConfig, Path | None]:
    """The settings with `train.init`, and the champion's folder where a training begins with it."""

    from pipeline.train.warm_start import earlier_start, start_from

    with_champion = replace(cfg, train=replace(cfg.train, init="champion"))
    if cfg.train.init == "champion":
        return cfg, tracker.download_champion()[0]
    if not append:
        return cfg, None
    if not restart:
        return (with_champion if earlier_start(cfg.train_dir) else cfg), None

    try:
        folder, version = tracker.download_champion()
        start = start_from(with_champion, folder)
    except UserError as reason:
        logger.info("training begins anew: %s", reason)
        return cfg, None
    logger.info(
        "training goes on from champion %d: new are rows since %s, of those before a share of %g",
        version,
        start.targets_since,
        cfg.train.replay_share,
    )
    return with_champion, folder


def summarise_run(
    tasks: tuple[str, ...], manifest: "Manifest", train_seconds: float, metrics: dict[str, float]
) -> dict[str, Any]:
    def by_task(split: str, metric: str) -> dict[str, float]:
        # a period without a request has no metrics
        return {task: metrics.get(f"{split}/{metric}/{task}", math.nan) for task in tasks}

    tables = {}
    for split in ("val", "test"):
        for metric in ("auc", "ne", "gauc"):
            tables[f"{split}_{metric}"] = by_task(split, metric)

    return {
        "rows_in": manifest.rows_in,
        "rows_merged": manifest.rows_merged,
        "rows_capped": manifest.rows_capped,
        "quarantined": manifest.quarantined,
        "users": manifest.num_users,
        "sequences": sum(bucket.users for bucket in manifest.buckets),
        "tokens": manifest.num_rows,
        "train_seconds": round(train_seconds, 1),
        **tables,
        "masked_pair_share": metrics["masked_pair_share"],
        "truncated_token_share": metrics["truncated_token_share"],
    }


def print_summary(name: str, tasks: tuple[str, ...], summary: dict[str, Any]) -> None:
    print(f"\n{name}: version {summary['model_version']} {summary['promotion']}")
    print(f"{'':22}" + "".join(f"{task:>18}" for task in tasks))
    for key in ("val_auc", "val_ne", "test_auc", "test_ne", "test_gauc"):
        print(f"{key:22}" + "".join(f"{summary[key][task]:18.4f}" for task in tasks))

    for key, value in summary.items():
        if isinstance(value, dict) or key == "promotion":
            continue
        shown = f"{value:.3g}" if isinstance(value, float) else value
        print(f"{key:22}{shown}")
    print(f"{'quarantined':22}{summary['quarantined']}")


def print_stage(number: int, what: str) -> None:
    print(f"== {number}/7 {what}", flush=True)


def remove_run(folder: Path) -> None:
    """Remove a run's folder, of this job or of jobs.build_sequences.

    Raises:
        UserError: it holds files and no run was started there.
    """

    from pipeline.sequences.store import MANIFEST

    is_run = any((folder / name).exists() for name in (RUN_FILE, f"sequences/{MANIFEST}"))
    if folder.exists() and any(folder.iterdir()) and not is_run:
        raise UserError(
            f"--fresh: {folder} holds files, and no run was started there (it has no {RUN_FILE}): "
            "remove it yourself"
        )
    shutil.rmtree(folder, ignore_errors=True)


def plan_job(job: cli.Job) -> dict[str, object]:
    """The plans of the stages that need no earlier one."""

    from pipeline import logs

    cfg = job.cfg
    check_options(job)
    check_settings(cfg)
    baseline = read_baseline(job)
    return {
        "import_logs": logs.plan_import(cfg.source, cfg.folders),
        "beside": None if baseline is None else baseline.name,
        "workers": cfg.train.num_workers,
        "run": str(cfg.run_dir),
    }


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
