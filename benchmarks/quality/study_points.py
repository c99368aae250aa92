"""Points of scaling studies without Ray and MLflow: processes side by side on one GPU, or on one
CPU box, and home again as a file.

    study.yaml → count the FLOP → train and score point by point → a line of POINTS each

    python -m benchmarks.quality.study_points configs/drifting.yaml:configs/studies/drifting.yaml \\
        --processes 14 --budget-s 380 --out points.jsonl --set train.use_gpu=true
    python -m benchmarks.quality.study_points configs/drifting.yaml:configs/studies/drifting.yaml \\
        --unpack points.jsonl --set train.use_gpu=true

Plan, points and their files are those of `jobs.scaling_study`, which after `--unpack` makes the
page (`--no-tracking`) and goes on with points that are missing. `--count-only` ends before the
first training: another machine goes on from `runs/` as it is then. `--only` runs the points that a
pattern matches, 'drifting-study-*-d640-*'. Several studies share the processes. A study's largest
size waits until those of its seed that it is predicted from have ended. With `--gpus 2` every
second process has the second GPU.
"""

import argparse
import json
import logging
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch

from pipeline import config
from pipeline.batches.features import fit_features
from pipeline.config import RunConfig, UserError
from pipeline.files import json_text, write_atomically
from pipeline.search.trial import shares_features
from pipeline.study.measured import is_finished
from pipeline.study.opening import check_study, open_study
from pipeline.study.plan import Point, StudyPlan, plan_points, read_plan, study_config
from pipeline.study.point import POINT, WORK, count_work, run_point
from pipeline.study.predictions import PREDICTIONS, predict_largest
from pipeline.study.users import USERS

logger = logging.getLogger(__name__)

FILES = (WORK, POINT, USERS)  # of a point, that travel
_HAD_ERROR = threading.Event()  # in this process
# PyTorch has types for some errors of CUDA alone; cuBLAS, Triton and a capture's generators say it
# in words
CUDA_WORDS = ("CUDA error", "Triton Error [CUDA]", "graph capture")
FEATURES = "features.json"  # the last file of the maps that a study's points share


@dataclass
class OpenStudy:
    """A study whose points are being run."""

    base: RunConfig
    plan: StudyPlan
    waiting: list[Point]
    running: list[Point] = field(default_factory=list)
    failed: int = 0

    @property
    def folder(self) -> Path:
        return study_config(self.base).run_dir

    def is_largest(self, point: Point) -> bool:
        return len(self.plan.sizes) > 1 and point.size == list(self.plan.sizes)[-1]

    def predicts(self, point: Point) -> bool:
        """True for a smaller size at a length at which the largest is predicted."""
        if len(self.plan.sizes) == 1 or self.is_largest(point):
            return False
        in_all_sizes = self.plan.study.at_length in (None, point.length)
        return in_all_sizes and point.encoder in self.plan.encoders

    def is_ready(self, point: Point) -> bool:
        """False for the largest size as long as its seed's smaller ones do not predict it."""
        if not self.is_largest(point):
            return True
        for other in (*self.waiting, *self.running):
            if self.predicts(other) and other.seed == point.seed:
                return False
        return True


def open_studies(
    pairs: Sequence[str],
    overrides: Sequence[str],
    seeds: Sequence[int] | None,
    only: Sequence[str] = ("*",),
) -> list[OpenStudy]:
    """The studies of `PRESET:STUDY` pairs with the points that are left of each, of those whose
    folders one of the patterns `only` matches.

    Raises:
        UserError: a preset, plan or setting that is refused, no sequences, or a pattern that
            matches no point.
    """
    opened: list[OpenStudy] = []
    names: list[str] = []
    for pair in pairs:
        preset, _, path = pair.partition(":")
        base = config.load(preset, list(overrides))
        plan = read_plan(Path(path), base.tasks)
        if seeds:
            plan = replace(plan, study=replace(plan.study, seeds=tuple(seeds)))
        points = plan_points(base, plan)
        check_study(points)
        open_study(base, plan)
        names += [point.trial.name for point in points]
        left = []
        for point in points:
            is_wanted = any(fnmatchcase(point.trial.name, pattern) for pattern in only)
            if is_wanted and not is_finished(point):
                left.append(point)
        opened.append(OpenStudy(base, plan, left))

    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"--only: {pattern!r} matches no point, such as {names[0]}")
    return opened


def count_points(studies: Sequence[OpenStudy], processes: int) -> None:
    """What comes before the first training: FLOP of every point, features of every study."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        _count_all(studies, pool)


def run_all(
    studies: Sequence[OpenStudy], processes: int, out: Path, budget_s: float, gpus: int = 1
) -> None:
    """Run what is left of the studies; after `budget_s` no other point begins.

    Seed by seed, and of a seed study by study. Of a study first what its largest size is predicted
    from, then encoder by encoder in the order of the plan, the points with the most FLOP first.
    """
    began = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    started = spawn.Value("i", 0)
    with ProcessPoolExecutor(processes, spawn, take_gpu, (started, gpus)) as pool:
        _count_all(studies, pool)
        order = _in_order(studies)
        running: dict[Future[str], tuple[OpenStudy, Point]] = {}
        while True:
            is_late = time.perf_counter() - began > budget_s
            while not is_late and len(running) < processes:
                chosen = _next(order, out)
                if chosen is None:
                    break
                running[pool.submit(_carry_out, *_arguments(*chosen))] = chosen
            if not running:
                break

            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                study, point = running.pop(future)
                study.running.remove(point)
                _note(study, point, future, out, time.perf_counter() - began)

    left = sum(len(study.waiting) for study in studies)
    failed = sum(study.failed for study in studies)
    print(f"{left} points did not begin, {failed} failed", flush=True)


def take_gpu(started: "Synchronized[int]", gpus: int) -> None:
    """Leave this process one of the GPUs that are visible, in turn, before it has used any."""
    if gpus == 1:
        return
    with started.get_lock():
        number = started.value
        started.value += 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % gpus]


def _in_order(studies: Sequence[OpenStudy]) -> list[tuple[OpenStudy, Point]]:
    """All points that wait, the first to begin first."""
    found = []
    for number, study in enumerate(studies):
        for point in study.waiting:
            # encoders before variants, since `names` has them so
            place = study.plan.names.index(point.encoder)
            last = not study.predicts(point), place, -_train_gflop(point)
            found.append(((point.seed, number, *last), (study, point)))
    return [chosen for _, chosen in sorted(found, key=lambda one: one[0])]


def _next(order: list[tuple[OpenStudy, Point]], out: Path) -> tuple[OpenStudy, Point] | None:
    """Take the first point that may begin out of those that wait. A study's largest size is
    predicted before the first point of it begins.
    """
    for number, (study, point) in enumerate(order):
        if not study.is_ready(point):
            continue
        if study.is_largest(point) and not (study.folder / PREDICTIONS).exists():
            _predict(study, out)
        study.waiting.remove(point)
        study.running.append(point)
        return order.pop(number)
    return None


def _predict(study: OpenStudy, out: Path) -> None:
    """Predict the largest size from the seeds of which every smaller size has ended."""
    points = plan_points(study.base, study.plan)
    in_parts = set()
    for point in points:
        if study.predicts(point) and not is_finished(point):
            in_parts.add(point.seed)

    whole = [point for point in points if point.seed not in in_parts]
    found = predict_largest(study.plan, whole)
    found["made"] = datetime.now(UTC).isoformat(timespec="seconds")
    write_atomically(study.folder / PREDICTIONS, json_text(found))
    append_line(out, study.folder.name, {PREDICTIONS: found})


def _count_all(studies: Sequence[OpenStudy], pool: ProcessPoolExecutor) -> None:
    """FLOP of every point, the seeds of a key share those of its first, which may have come from
    another machine; features of every study that has none. `open_study` sees to it that both are
    of this plan and these sequences.
    """
    first: dict[tuple[str, Any], Point] = {}
    futures = []
    for study in studies:
        for point in plan_points(study.base, study.plan):
            if (point.trial.cfg.run_dir / WORK).exists():
                first.setdefault((study.folder.name, point.key), point)
        shared = any(shares_features(point.trial.cfg, study.base) for point in study.waiting)
        if shared and not (study.folder / FEATURES).exists():
            fit_features(study.waiting[0].trial.cfg).save(study.folder)
        for point in study.waiting:
            key = study.folder.name, point.key
            if key not in first:
                first[key] = point
                futures.append(pool.submit(_count, *_arguments(study, point)))
    for future in futures:
        future.result()

    for study in studies:
        for point in study.waiting:
            counted = first[study.folder.name, point.key].trial.cfg.run_dir / WORK
            work = point.trial.cfg.run_dir / WORK
            if not work.exists():
                write_atomically(work, counted.read_text())


def _train_gflop(point: Point) -> float:
    return json.loads((point.trial.cfg.run_dir / WORK).read_text())["train_gflop"]


def _arguments(study: OpenStudy, point: Point) -> tuple[Any, ...]:
    shared = study.folder if shares_features(point.trial.cfg, study.base) else None
    task = study.plan.study.task or study.base.tasks[0]
    return point.trial.cfg, point.trial.settings, study.plan.study.split, task, shared


def _count(
    cfg: RunConfig, settings: dict[str, Any], split: str, task: str, shared: Path | None
) -> None:
    count_work(cfg, split, shared)


def _carry_out(
    cfg: RunConfig, settings: dict[str, Any], split: str, task: str, shared: Path | None
) -> str:
    """A point, in a process that takes one after another.

    After an error of CUDA, such as an illegal address, nothing else goes well in the process that
    had it: it hands this point, which goes on from its checkpoint, and all that come after it to
    fresh ones. Any other error is the point's own.
    """
    logging.basicConfig(level=logging.WARNING, format=f"{cfg.name} %(message)s", force=True)
    if not _HAD_ERROR.is_set():
        try:
            return run_point(cfg, settings, split, task, shared)
        except RuntimeError as error:
            if not is_cuda_error(error):
                raise
            logger.warning("once more in a fresh process: %s: %s", type(error).__name__, error)
            _HAD_ERROR.set()

    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as fresh:
        return fresh.submit(run_point, cfg, settings, split, task, shared).result()


def is_cuda_error(error: RuntimeError) -> bool:
    """True where the device or its memory is at fault rather than what was asked of it."""
    if isinstance(error, torch.AcceleratorError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in CUDA_WORDS)


def _note(study: OpenStudy, point: Point, future: Future[str], out: Path, seconds: float) -> None:
    """Write a finished point's line; say what became of it."""
    error = future.exception()
    why = future.result() if error is None else f"{type(error).__name__}: {error}"
    folder = point.trial.cfg.run_dir
    if why:
        study.failed += 1
        print(f"{seconds:5.0f} s  {folder.name} failed: {why[:500]}", flush=True)
        return

    files = pack(point, out)
    scores, work = files[POINT], files[WORK]
    print(
        f"{seconds:5.0f} s  {folder.name:44} NE {scores['ne']:.4f} AUC {scores['auc']:.4f}  "
        f"GFLOP {work['train_gflop']:.2g} / {work['infer_gflop']:.2g}  train "
        f"{scores['train_seconds']:.0f} s, score {scores['score_seconds']:.0f} s",
        flush=True,
    )
    # weights and checkpoints of a hundred points would fill the disk
    shutil.rmtree(point.trial.cfg.train_dir / "checkpoints", ignore_errors=True)


def pack(point: Point, out: Path) -> dict[str, Any]:
    """Add the line of a finished point; its files, by name."""
    folder = point.trial.cfg.run_dir
    files = {name: json.loads((folder / name).read_text()) for name in FILES}
    append_line(out, folder.name, files)
    return files


def append_line(out: Path, name: str, files: dict[str, Any]) -> None:
    """Add the files of the folder `name`; whatever ends this process, the lines before it stay."""
    with out.open("a") as file:
        file.write(json.dumps({"name": name, "files": files}) + "\n")


def unpack(studies: Sequence[OpenStudy], lines: Path) -> int:
    """Write the files of `lines` into the folders of the studies; the number of points."""
    known = {study.folder.name: study.folder for study in studies}
    for study in studies:
        for point in study.waiting:
            known[point.trial.name] = point.trial.cfg.run_dir

    found = 0
    for text in lines.read_text().splitlines():
        line = json.loads(text)
        folder = known.get(line["name"])
        if folder is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for name, facts in line["files"].items():
            write_atomically(folder / name, json_text(facts))
        found += POINT in line["files"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("studies", nargs="+", metavar="PRESET:STUDY", help="two YAML files each")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", help="in the place of the plans'")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="folders of the points to run"
    )
    parser.add_argument("--processes", type=int, default=1, help="points at a time")
    parser.add_argument("--gpus", type=int, default=1, help="that the processes share")
    parser.add_argument("--budget-s", type=float, default=1e9, help="then no other point begins")
    parser.add_argument("--out", type=Path, default=Path("points.jsonl"), help="JSON Lines")
    parser.add_argument("--count-only", action="store_true", help="train nothing")
    parser.add_argument("--unpack", type=Path, metavar="POINTS", help="run nothing")
    options = parser.parse_args()
    if options.gpus > max(1, torch.cuda.device_count()):
        parser.error(f"--gpus {options.gpus}: {torch.cuda.device_count()} visible here")
    try:
        studies = open_studies(options.studies, options.overrides, options.seeds, options.only)
    except UserError as error:
        sys.exit(f"error: {error}")

    if options.unpack:
        print(f"points={unpack(studies, options.unpack)}")
    elif options.count_only:
        count_points(studies, options.processes)
    else:
        run_all(studies, options.processes, options.out, options.budget_s, options.gpus)


if __name__ == "__main__":
    main()
