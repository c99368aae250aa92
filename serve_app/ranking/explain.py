"""Why candidates have their scores: the answer is computed again without each row of the history.

    answer → the history without one of its rows, in turn → scores → the five largest changes

Nothing is estimated: a change is what a request with that history would be answered. The work grows
with the square of the history, so `serve.max_explain_tokens` bounds it, and the answer says where
that left rows untried. It runs in a thread of its own, one explanation at a time: other requests
are ranked meanwhile.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa

from pipeline.batches.collate import candidates
from pipeline.batches.features import first_code
from pipeline.batches.rates import read_evidence
from serve_app.columns import RankColumns, RankedColumns
from serve_app.history.published import histories
from serve_app.ids import own_id
from serve_app.ranking.ranker import FoundHistory, PreparedRequest, Ranker
from serve_app.ranking.rollout import ReceivedRequest
from serve_app.schemas import (
    CandidateRates,
    CandidateReasons,
    RankExplanation,
    RowEffect,
)

MOST_EFFECTS = 5  # rows that a candidate's reasons name


class Explanations:
    """Explains answers beside the thread that ranks."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="explain")

    async def __call__(self, received: ReceivedRequest, answer: RankedColumns) -> RankedColumns:
        """The answer with its explanation."""
        found = received.found
        assert found is not None, "the request was prepared"
        loop = asyncio.get_running_loop()
        explanation = await loop.run_in_executor(
            self._pool, explain_answer, received.ranker, received.request, found, answer
        )
        return replace(answer, explanation=explanation)


def explain_answer(
    ranker: Ranker, request: RankColumns, found: FoundHistory, answer: RankedColumns
) -> RankExplanation:
    """Reasons for the scores of an answer's candidates.

    Args:
        ranker: that gave the answer.
        request: that it answers.
        found: the history behind it.
        answer: all of the request's candidates, or the best of them.
    """
    asked = request if answer.rows is None else request.take(answer.rows)
    prepared = ranker.prepare_request(asked, found)

    length = prepared.history_length
    tried = affordable_rows(length, len(asked), ranker.limits.max_explain_tokens)
    note = None
    if tried < length:
        note = f"the newest {tried} of {length} rows were tried (serve.max_explain_tokens)"

    scores = answer.scores[answer.head["ordered_by"]]
    changes = scores[:, None] - _scores_without(ranker, prepared, found, tried)
    names = _ItemNames(ranker, request)
    rates = _rates(ranker, prepared)
    unknown = _unknown_names(ranker, prepared)

    reasons = []
    for place in range(len(asked)):
        effects = _largest_effects(changes[place], prepared, length - tried, names)
        reasons.append(
            CandidateReasons.model_construct(
                history=effects, rates=rates[place], unknown=unknown[place]
            )
        )
    return RankExplanation.model_construct(rows_tried=tried, note=note, candidates=reasons)


def affordable_rows(length: int, num_candidates: int, max_tokens: int) -> int:
    """History rows that can be left out in turn: each costs a pass over all that is left.

    length 100, 20 candidates: 119 tokens a row      max_tokens 1000: the newest 8
    """
    if length == 0:
        return 0
    return min(length, max_tokens // (length - 1 + num_candidates))


def _scores_without(
    ranker: Ranker, prepared: PreparedRequest, found: FoundHistory, tried: int
) -> np.ndarray:
    """float32 [C, tried]: the scores without each of the newest `tried` rows, the oldest first."""
    num_candidates = len(prepared.request)
    if tried == 0:
        return np.zeros((num_candidates, 0), np.float32)

    head = prepared.request.head
    assert found.sequence is not None, "there is a history"
    cfg, max_history = ranker.cfg, ranker.max_history
    shorter = sequences_without_one(found.sequence, head.request_time_ms, tried, max_history)
    times = np.full(tried, head.request_time_ms, np.int64)
    past = histories([shorter], times, cfg.source, cfg.features, max_history)

    features = {}
    for name in ranker.request_columns:
        features[name] = np.tile(prepared.request.feature(name), tried)
    targets = candidates(
        past.events,
        past.first_position,
        np.tile(prepared.request.item_id, tried),
        np.arange(tried + 1) * num_candidates,
        times,
        features,
        ranker.maps,
        ranker.inputs,
    )
    users = np.full(tried, prepared.user_id, np.int64)
    scores = ranker.score_apart(past.events, targets, users)

    task = cfg.tasks.index(head.order_by or cfg.tasks[0])
    return scores[:, task].reshape(tried, num_candidates).T


def sequences_without_one(
    sequence: pa.RecordBatch, request_time_ms: int, num_newest: int, max_history: int
) -> pa.RecordBatch:
    """A SEQUENCE row for each of the newest `num_newest` rows before the request: all but it.

    before the request   a b c      num_newest = 2
    rows                 a c | a b

    One row more than `max_history` is kept: it moves up where a newer one is left out.
    """
    times = sequence["event_time"].flatten().to_numpy()
    end = int(np.searchsorted(times, request_time_ms))
    begin = max(0, end - max_history - 1)

    # all rows once for each that is left out, then without it
    left_out = np.arange(end - num_newest, end)
    every = np.tile(np.arange(begin, end), num_newest)
    kept = every[every != np.repeat(left_out, end - begin)]
    offsets = np.arange(num_newest + 1) * (end - begin - 1)

    arrays: list[pa.Array] = []
    for field in sequence.schema:
        column = sequence[field.name]
        if pa.types.is_large_list(field.type):
            values = column.flatten().take(pa.array(kept))
            arrays.append(pa.LargeListArray.from_arrays(pa.array(offsets), values))
        else:
            shift = begin if field.name == "first_position" else 0
            value = column[0].as_py() + shift
            arrays.append(pa.array([value] * num_newest, field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=sequence.schema)


def _largest_effects(
    changes: np.ndarray, prepared: PreparedRequest, first_tried: int, names: "_ItemNames"
) -> list[RowEffect]:
    """The rows with the largest of `changes`, float32 [tried]; equal ones the newest first."""
    newest_first = np.argsort(-np.abs(changes[::-1]), kind="stable")[:MOST_EFFECTS]
    effects = []
    for place in (len(changes) - 1 - newest_first).tolist():
        row = first_tried + place
        effects.append(
            RowEffect.model_construct(
                row=row,
                item_id=names.find_name(int(prepared.past.item_id[row])),
                event_time=int(prepared.past.event_time[row]),
                change=float(changes[place]),
            )
        )
    return effects


class _ItemNames:
    """Ids of history rows as the client has them."""

    def __init__(self, ranker: Ranker, request: RankColumns) -> None:
        self.are_text = "item_id" in ranker.store.columns.text_ids
        self.catalogue = None if ranker.index is None else ranker.index.catalogue
        self.posted: dict[int, int | str] = {}
        for row in request.head.history or []:
            self.posted[int(row.item_id)] = own_id(row.item_id)

    def find_name(self, item_id: int) -> int | str | None:
        """The id; None of a text that only the sequences have."""
        if not self.are_text:
            return item_id
        if item_id in self.posted:
            return self.posted[item_id]
        if self.catalogue is None:
            return None
        rows = self.catalogue.find_rows(np.array([item_id]))
        return str(self.catalogue.own_ids(rows)[0]) if len(rows) else None


def _rates(ranker: Ranker, prepared: PreparedRequest) -> list[dict[str, CandidateRates]]:
    """For each candidate what `features.dense` says of it."""
    tasks, features = ranker.cfg.tasks, ranker.cfg.features.dense
    found: list[dict[str, CandidateRates]] = [{} for _ in range(len(prepared.request))]
    if not features:
        return found

    dense = prepared.targets.dense
    assert dense is not None, "candidates carry them"
    width = len(tasks) + 1
    for number, (name, feature) in enumerate(features.items()):
        base = np.array(ranker.maps.row_rates[feature.rows])
        rates, rows = read_evidence(dense[:, number * width : (number + 1) * width], base)
        for place, one in enumerate(found):
            by_task = dict(zip(tasks, rates[place].tolist(), strict=True))
            one[name] = CandidateRates.model_construct(
                rates=by_task, rows=round(float(rows[place]))
            )
    return found


def _unknown_names(ranker: Ranker, prepared: PreparedRequest) -> list[list[str]]:
    """For each candidate the columns whose value training did not see."""
    maps, features, targets = ranker.maps, ranker.cfg.features, prepared.targets
    codes = maps.item_codes[maps.item_rows(targets.item_id)]
    known: dict[str, np.ndarray] = {"item_id": codes[:, 0] > 0}

    for name, column in features.item.items():
        first = 1 + first_code(features.item, name)
        of_column = codes[:, first : first + column.num_codes]
        known[f"item.{name}"] = of_column.max(1) > 0

    asked = {name: prepared.request.feature(name) for name in ranker.request_columns}
    for name, values in asked.items():
        known[f"request.{name}"] = np.isin(values, maps.request_values[name])

    unknown: list[list[str]] = [[] for _ in range(len(codes))]
    for name, is_known in known.items():
        for place in np.flatnonzero(~is_known).tolist():
            unknown[place].append(name)
    return unknown
