"""Runs, model versions and the champion. Others import this package and none of its modules."""

from pipeline.tracking.evaluation import is_tracked
from pipeline.tracking.forgetting import forget_in_cache, forget_in_folders
from pipeline.tracking.gate import Decision
from pipeline.tracking.registry import (
    PinnedModel,
    RowsAtHand,
    fetch_model,
    find_version,
    require_evaluated,
)
from pipeline.tracking.runs import Run
from pipeline.tracking.server import has_server
from pipeline.tracking.session import Tracker, plan_session, session

__all__ = [
    "Decision",
    "PinnedModel",
    "RowsAtHand",
    "Run",
    "Tracker",
    "fetch_model",
    "find_version",
    "forget_in_cache",
    "forget_in_folders",
    "has_server",
    "is_tracked",
    "plan_session",
    "require_evaluated",
    "session",
]
