"""Runs, model versions and the champion. Others import this package and none of its modules."""

from pipeline.tracking.gate import Decision
from pipeline.tracking.registry import PinnedModel, RowsAtHand, fetch_model, find_version
from pipeline.tracking.runs import Run
from pipeline.tracking.session import Tracker, plan_session, session

__all__ = [
    "Decision",
    "PinnedModel",
    "RowsAtHand",
    "Run",
    "Tracker",
    "fetch_model",
    "find_version",
    "plan_session",
    "session",
]
