"""What a model cannot answer in a request that the schema allows."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import ServeConfig
from pipeline.schema import DAY_MS, EventColumns
from serve_app.columns import RankColumns
from serve_app.history.rows import find_refused_outcome, refuse_other_kind, refuse_text_values
from serve_app.ids import read_id
from serve_app.schemas import HistoryRow, RankHead, Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRules:
    """What the requests of one model must keep to."""

    limits: ServeConfig
    tasks: Sequence[str]
    request_columns: Sequence[str]  # that a request may give
    trained: EventColumns  # that the model was trained on
    published: EventColumns  # of the sequences behind user_id
    earliest_ms: int  # of a request

    def find_refusal(self, request: RankColumns) -> Refusal | None:
        """The first thing that is refused, None where there is none."""
        return (
            self._refuse_size_and_time(request)
            or self._refuse_kinds(request)
            or self._refuse_features(["request_features"], request.head.request_features)
            or self._refuse_features(
                ["candidates", "request_features"], request.features, request.feature_texts
            )
            or self._refuse_history(request.head)
        )

    def _refuse_size_and_time(self, request: RankColumns) -> Refusal | None:
        """Too many candidates, a time that cannot be, or a task that there is not."""
        head, most = request.head, self.limits.max_candidates
        if len(request) > most:
            return _refuse(["candidates"], f"at most {most} candidates", len(request))

        latest = int(time.time() * 1000) + DAY_MS
        if not self.earliest_ms <= head.request_time_ms <= latest:
            rule = (
                f"request_time_ms must be in ms since 1970, between {self.earliest_ms} and a "
                f"day from now ({latest})"
            )
            return _refuse(["request_time_ms"], rule, head.request_time_ms)

        if head.order_by is not None and head.order_by not in self.tasks:
            return _refuse(["order_by"], f"one of the tasks {list(self.tasks)}", head.order_by)
        return None

    def _refuse_kinds(self, request: RankColumns) -> Refusal | None:
        """The first id that is text where the sequences have integers, or the other way round."""
        text_ids = self.published.text_ids
        refusal = refuse_other_kind(["body", "user_id"], request.user_id, "user_id", text_ids)
        if refusal is None and len(request):
            text = None if request.item_text is None else request.item_text[0]
            first = read_id(int(request.item_id[0]), text)
            where = ["body", "candidates", 0, "item_id"]
            refusal = refuse_other_kind(where, first, "item_id", text_ids)
        return refusal

    def _refuse_features(
        self,
        loc: list[str | int],
        features: Mapping[str, Any],
        texts: Mapping[str, int] | None = None,
    ) -> Refusal | None:
        """`texts`: values of the features that came as text, where `features` has codes alone."""
        for name in features:
            if name not in self.request_columns:
                return _refuse(loc, f"one of {list(self.request_columns)}", name)

        values = features if texts is None else texts
        return refuse_text_values(["body", *loc], values, self.trained)

    def _refuse_history(self, head: RankHead) -> Refusal | None:
        """Too many rows, or what the first wrong one has."""
        rows = head.history or []
        if len(rows) > self.limits.max_history:
            return _refuse(["history"], f"at most {self.limits.max_history} rows", len(rows))

        for i, row in enumerate(rows):
            refusal = self._refuse_row(["history", i], row, head.request_time_ms)
            if refusal is not None:
                return refusal
        return None

    def _refuse_row(
        self, loc: list[str | int], row: HistoryRow, request_time_ms: int
    ) -> Refusal | None:
        """The first thing that is wrong with a row of a history, which lies at `loc`."""
        if row.event_time >= request_time_ms:
            rule = f"must be before request_time_ms {request_time_ms}"
            return _refuse([*loc, "event_time"], rule, row.event_time)

        actions = self.trained.actions
        for name in row.actions:
            if name not in actions:
                return _refuse([*loc, "actions"], f"one of {list(actions)}", name)

        where = ["body", *loc, "item_id"]
        return (
            refuse_other_kind(where, row.item_id, "item_id", self.published.text_ids)
            or self._refuse_features([*loc, "request_features"], row.request_features)
            or find_refused_outcome(["body", *loc], row, self.published)
        )


def _refuse(loc: list[str | int], rule: str, value: object) -> Refusal:
    return Refusal.of(["body", *loc], rule, value)
