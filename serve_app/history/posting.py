"""What an event must be for the sequences to have a place for it.

Asked when it is posted, and again when it is exported, by then perhaps for other settings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import config
from pipeline.config import SequenceConfig
from pipeline.schema import DAY_MS, NAMED_IDS, EventColumns
from serve_app.history.rows import (
    find_refused_outcome,
    refuse_other_kind,
    refuse_text_values,
)
from serve_app.schemas import Event, Refusal


@dataclass(frozen=True)
class PostingRules:
    """The columns and the times that the builder takes (`cleaning.LogRules`).

    The types of the fields have the ranges of LOG's columns already (serve_app/schemas.py).
    """

    columns: EventColumns
    earliest_ms: int
    latest_ms: int | None  # None: a day after the clock

    @classmethod
    def of(cls, cfg: SequenceConfig, columns: EventColumns) -> "PostingRules":
        latest_ms = None
        if cfg.latest_time is not None:
            latest_ms = config.parse_time("sequences.latest_time", cfg.latest_time)
        earliest_ms = config.parse_time("sequences.earliest_time", cfg.earliest_time)
        return cls(columns, earliest_ms, latest_ms)

    def latest_of(self, now_ms: int) -> int:
        """The latest time that an event may have."""
        day_from_now = now_ms + DAY_MS
        return day_from_now if self.latest_ms is None else min(self.latest_ms, day_from_now)

    def find_refusal(self, event: Event, loc: Sequence[str | int], now_ms: int) -> Refusal | None:
        """The first thing in the event, which lies at `loc`, that the sequences have no place
        for.
        """
        latest_ms, latest_rule = self.latest_of(now_ms), "a day from now"
        if latest_ms == self.latest_ms:
            latest_rule = "sequences.latest_time"
        if not self.earliest_ms <= event.event_time <= latest_ms:
            rule = f"in ms since 1970, between {self.earliest_ms} and {latest_rule} ({latest_ms})"
            return Refusal.of([*loc, "event_time"], rule, event.event_time)

        for name in NAMED_IDS:
            value = getattr(event, name)
            refusal = refuse_other_kind([*loc, name], value, name, self.columns.text_ids)
            if refusal is not None:
                return refusal

        actions, request_columns = list(self.columns.actions), list(self.columns.request)
        for name in event.actions:
            if name not in actions:
                return Refusal.of([*loc, "actions"], f"one of {actions}", name)
        for name in event.request_features:
            if name not in request_columns:
                return Refusal.of([*loc, "request_features"], f"one of {request_columns}", name)
        where = [*loc, "request_features"]
        refusal = refuse_text_values(where, event.request_features, self.columns)
        return refusal or find_refused_outcome(loc, event, self.columns)
