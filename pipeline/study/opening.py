"""Before a study begins: what would end a point is told, and what the study began with is kept."""

from collections.abc import Sequence

from pipeline import config
from pipeline.config import RunConfig, UserError
from pipeline.model.encoders import check_run
from pipeline.search.begun import hold_to_beginning
from pipeline.sequences import store
from pipeline.study.plan import Point, StudyPlan, study_config

STUDY = "study.json"  # in the study's folder
# in the study's record: what points are made of
RECORDED = ("source", "split", "tasks", "examples", "features", "model", "train")


def check_study(points: Sequence[Point]) -> None:
    """Tell what would end a point before any of them starts.

    Raises:
        UserError: no sequences, a setting that an encoder does not know, or retrieval.
    """
    for point in points:
        own = point.trial.cfg
        if own.split.refit:
            raise UserError("split.refit leaves no validation period to study")
        if not own.tasks or own.retrieval.enabled:
            raise UserError("a study is of ranking: it needs tasks, and retrieval.enabled: false")
        try:
            check_run(own.model, own.train, retrieval=own.retrieval.enabled)
        except UserError as error:
            where = f"{point.encoder}, {point.size}, length {point.length}"
            raise UserError(f"--study: {where} is refused: {error}") from None
    store.read_manifest(points[0].trial.cfg.sequence_dir)


def open_study(base: RunConfig, plan: StudyPlan) -> None:
    """Make the study's folder, or hold what an earlier start left there against this one.

    Raises:
        UserError: the study of this name began with another plan, other settings or sequences.
    """
    own = study_config(base)
    settings = config.to_dict(base)
    facts = {"sequences": store.read_manifest(own.sequence_dir).digest}
    facts |= config.flatten(plan.as_figures())
    facts |= config.flatten({key: settings[key] for key in RECORDED})
    hold_to_beginning(
        own.run_dir / STUDY, facts, f"the study {own.name}", str(own.sequences.from_run)
    )
