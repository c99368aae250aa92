"""From requests to scores, without Ray and HTTP.

histories → keys → encoded histories, kept from earlier requests or new ─┐
candidates ──────────────────────────────────────────────────────────────┴→ scores
"""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from pipeline import config
from pipeline.batches.collate import SequenceBatch, candidates, collate
from pipeline.batches.events import Events, concatenate
from pipeline.config import ServeConfig
from pipeline.model.artifact import LoadedModel
from pipeline.model.inference.cached_scoring import HistoryCache, encode_history, score_candidates
from pipeline.model.inference.cuda_graph import GraphedScorer
from pipeline.model.inference.quantize import as_served
from pipeline.schema import DAY_MS
from serve_app.columns import RankColumns, RankedColumns
from serve_app.history.published import HistoryStore, histories, sequence_row
from serve_app.ranking.history_cache import HistoryCaches, history_key
from serve_app.schemas import HistoryRow, ModelInfo, RankHead, Refusal

NO_USER = -1  # in no vocabulary: the codes of an unknown user
LONG_HISTORY = 2048  # rows: beyond where kernels choose other tiles


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request with all that its scores depend on, `past` and `targets` of one sequence each."""

    request: RankColumns
    user_id: int
    unknown_user: bool
    past: Events
    targets: Events
    key: bytes  # of the encoded history; empty for a model that keeps none

    @property
    def history_length(self) -> int:
        return len(self.past.item_id)

    @property
    def num_tokens(self) -> int:
        return self.history_length + len(self.request)


class Ranker:
    """One model version over one history store.

    Args:
        loaded: model, configuration and feature maps as one artifact holds them.
        store: who did what.
        version: the registry's number, part of every response.
        name: of the registered model.
        limits: of a request; the operator's, not the ones that the model was trained with.
    """

    def __init__(
        self, loaded: LoadedModel, store: HistoryStore, version: int, name: str, limits: ServeConfig
    ) -> None:
        self.model, self.cfg, self.maps = loaded.model, loaded.cfg, loaded.maps
        as_served(self.model, limits)
        self.store, self.version, self.name, self.limits = store, version, name, limits
        self.device = next(self.model.parameters()).device
        self.request_columns = tuple(
            column for column in self.cfg.features.request if column != "hour"
        )
        self.caches = HistoryCaches(limits.cache_mb)
        self.score_candidates = GraphedScorer() if limits.cuda_graphs else score_candidates
        self.earliest_ms = config.parse_time(
            "sequences.earliest_time", self.cfg.sequences.earliest_time
        )

    def info(self) -> ModelInfo:
        return ModelInfo(
            model_name=self.name,
            model_version=self.version,
            tasks=list(self.cfg.tasks),
            request_features=list(self.request_columns),
            actions=list(self.cfg.source.actions),
            sequences=self.store.digest,
        )

    def warm(self) -> None:
        """One request of every shape of work, so that the first real one finds everything allocated
        and compiled.

        On a GPU long histories take other kernels than short ones.
        """
        item = self.maps.popular_items(1).tolist() or [0]
        for length in (
            (1, min(LONG_HISTORY, self.limits.max_history)) if self.device.type == "cuda" else (1,)
        ):
            rows = [
                HistoryRow(item_id=item[0], event_time=self.earliest_ms + i) for i in range(length)
            ]
            for _ in ("encoded", "kept"):
                self.rank([RankColumns(RankHead(history=rows), np.array(item, np.int64), {})])

    def stats(self) -> dict[str, int]:
        """Counters and sizes by name, for /metrics."""
        return self.caches.stats()

    def refusal(self, request: RankColumns) -> Refusal | None:
        """What this model cannot answer in a request that the schema allows, if anything."""
        limits, head = self.limits, request.head
        if len(request) > limits.max_candidates:
            return _refuse(
                ["candidates"], f"at most {limits.max_candidates} candidates", len(request)
            )
        latest = int(time.time() * 1000) + DAY_MS
        if not self.earliest_ms <= head.request_time_ms <= latest:
            rule = (
                f"request_time_ms must be in ms since 1970, between {self.earliest_ms} and a "
                f"day from now ({latest})"
            )
            return _refuse(["request_time_ms"], rule, head.request_time_ms)
        if head.order_by is not None and head.order_by not in self.cfg.tasks:
            return _refuse(["order_by"], f"one of the tasks {list(self.cfg.tasks)}", head.order_by)
        if found := self._unknown_feature(["request_features"], head.request_features):
            return found
        if found := self._unknown_feature(["candidates", "request_features"], request.features):
            return found
        return self._history_refusal(head)

    def rank(self, requests: Sequence[RankColumns]) -> list[RankedColumns]:
        """Answers to requests that `refusal` let pass, scored together; none depends on its
        company.
        """
        return self.score([self.prepare(request) for request in requests])

    def prepare(self, request: RankColumns) -> "PreparedRequest":
        """What the request is about: the user's history as of its time, its candidates' features."""
        sequence = self._sequence(request.head)
        time_ms = np.array([request.head.request_time_ms], np.int64)
        past = histories(
            [self._empty() if sequence is None else sequence],
            time_ms,
            self.cfg,
            self.limits.max_history,
        )
        targets = candidates(
            past.events,
            past.first_position,
            request.item_id,
            np.array([0, len(request)]),
            time_ms,
            {name: request.feature(name) for name in self.request_columns},
            self.maps,
            self.cfg,
        )
        user_id = NO_USER if request.user_id is None else request.user_id
        codes = self.maps.user_codes[self.maps.user_rows(np.array([user_id]))]
        return PreparedRequest(
            request=request,
            user_id=user_id,
            unknown_user=sequence is None,
            past=past.events,
            targets=targets,
            key=history_key(past.events, codes) if self.cfg.model.cacheable else b"",
        )

    def likeness(self, prepared: "PreparedRequest") -> int:
        """0 with an encoded history, else by its length."""
        return 0 if prepared.key in self.caches else 1 + prepared.history_length.bit_length()

    def score(self, prepared: Sequence["PreparedRequest"]) -> list[RankedColumns]:
        past = concatenate([one.past for one in prepared])
        targets = concatenate([one.targets for one in prepared])
        users = np.array([one.user_id for one in prepared], np.int64)
        if self.cfg.model.cacheable:
            scores = self._score_cached(past, targets, users, [one.key for one in prepared])
        else:
            scores = self._score_whole(past, targets, users)
        parts = np.split(scores, targets.offsets[1:-1])
        return [self._answer(one, part) for one, part in zip(prepared, parts, strict=True)]

    def _score_cached(
        self, past: Events, targets: Events, users: np.ndarray, keys: Sequence[bytes]
    ) -> np.ndarray:
        """Probabilities, float32 [C, tasks]: histories that are not in the cache first, then all
        candidates.
        """
        kept = {key: self.caches.get(key) for key in keys}
        encoded = {key: cache for key, cache in kept.items() if cache is not None}
        cold = {key: i for i, key in enumerate(keys) if key not in encoded}  # each history once
        for key, cache in self._encode(past, users, cold):
            encoded[key] = cache
            self.caches.put(key, cache)
        scores = []
        for chosen in passes(past.lengths + targets.lengths, self.limits.batch_tokens):
            asked = _take(targets, chosen)
            batch = collate(_no_rows(past, len(chosen)), asked, users[chosen], self.maps, self.cfg)
            caches = HistoryCache.join([encoded[keys[i]] for i in chosen])
            with self._precision():
                logits = self.score_candidates(
                    self.model, caches, batch.to(self.device), self.limits.micro_batch
                )
            scores.append(logits.sigmoid().cpu().numpy())
        return np.concatenate(scores)

    def _score_whole(self, past: Events, targets: Events, users: np.ndarray) -> np.ndarray:
        """The same for a model whose encoded history depends on the request: nothing to keep."""
        scores = []
        for chosen in passes(past.lengths + targets.lengths, self.limits.batch_tokens):
            batch = collate(
                _take(past, chosen), _take(targets, chosen), users[chosen], self.maps, self.cfg
            )
            with self._precision():
                logits = self.model(batch.to(self.device))
            scores.append(logits.sigmoid().cpu().numpy())
        return np.concatenate(scores)

    def _encode(
        self, past: Events, users: np.ndarray, cold: dict[bytes, int]
    ) -> Iterator[tuple[bytes, HistoryCache]]:
        """The histories `cold` (key -> which of `past`), those of like length in one pass."""
        lengths = past.lengths
        shortest_first = sorted(cold, key=lambda key: lengths[cold[key]])
        rows = np.array([cold[key] for key in shortest_first], np.int64)
        for chosen in passes(lengths[rows], self.limits.batch_tokens):
            history = _take(past, rows[chosen])
            batch = collate(
                history, _no_rows(past, len(chosen)), users[rows[chosen]], self.maps, self.cfg
            )
            with self._precision():
                caches = encode_history(self.model, batch.to(self.device)).split()
            yield from zip([shortest_first[i] for i in chosen], caches, strict=True)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, torch.bfloat16, self.limits.precision == "bf16"),
        ):
            yield

    def _answer(self, prepared: "PreparedRequest", scores: np.ndarray) -> RankedColumns:
        request = prepared.request
        codes = self.maps.item_codes[self.maps.item_rows(request.item_id), 0]
        ordered_by = request.head.order_by or self.cfg.tasks[0]
        head = {
            "model_version": self.version,
            "request_time_ms": request.head.request_time_ms,
            "ordered_by": ordered_by,
            "unknown_items": int(np.count_nonzero(codes == 0)),
            "unknown_user": prepared.unknown_user,
            "history_length": prepared.history_length,
        }
        by_task = {task: scores[:, i] for i, task in enumerate(self.cfg.tasks)}
        return RankedColumns(
            head, request.item_id, by_task, np.argsort(-by_task[ordered_by], kind="stable")
        )

    def _sequence(self, head: RankHead) -> pa.RecordBatch | None:
        if head.history is None:
            assert head.user_id is not None, "the schema asks for user_id or history"
            return self.store.sequence(head.user_id)
        # stable: equal times keep their order
        rows = sorted(head.history, key=lambda row: row.event_time)
        bits = {action: 1 << i for i, action in enumerate(self.cfg.source.actions)}
        columns = {
            "item_id": [row.item_id for row in rows],
            "event_time": [row.event_time for row in rows],
            "order_only": [row.order_only for row in rows],
            "action_mask": [
                sum(bits[name] for name, did in row.actions.items() if did) for row in rows
            ],
            "known_mask": [sum(bits[name] for name in row.actions) for row in rows],
            "watch_ms": [-1 if row.watch_ms is None else row.watch_ms for row in rows],
        }
        columns |= {
            name: [row.request_features.get(name, -1) for row in rows]
            for name in self.request_columns
        }
        arrays = {
            name: np.array(values, bool if name == "order_only" else np.int64)
            for name, values in columns.items()
        }
        return sequence_row(arrays, self.store.request_columns, head.first_position)

    def _empty(self) -> pa.RecordBatch:
        return sequence_row({}, self.store.request_columns)

    def _history_refusal(self, head: RankHead) -> Refusal | None:
        rows = head.history or []
        if len(rows) > self.limits.max_history:
            return _refuse(["history"], f"at most {self.limits.max_history} rows", len(rows))
        for i, row in enumerate(rows):
            if row.event_time >= head.request_time_ms:
                rule = f"must be before request_time_ms {head.request_time_ms}"
                return _refuse(["history", i, "event_time"], rule, row.event_time)
            for name in row.actions:
                if name not in self.cfg.source.actions:
                    return _refuse(
                        ["history", i, "actions"], f"one of {list(self.cfg.source.actions)}", name
                    )
            if found := self._unknown_feature(
                ["history", i, "request_features"], row.request_features
            ):
                return found
        return None

    def _unknown_feature(self, loc: list[str | int], features: Iterable[str]) -> Refusal | None:
        for name in features:
            if name not in self.request_columns:
                return _refuse(loc, f"one of {list(self.request_columns)}", name)
        return None


def passes(num_tokens: np.ndarray, most: int) -> list[np.ndarray]:
    """0..n-1 in order, cut where the tokens of a pass would exceed `most`; one with more is a pass
    of its own.
    """
    cuts, total = [0], 0
    for i, tokens in enumerate(num_tokens.tolist()):
        if total and total + tokens > most:
            cuts.append(i)
            total = 0
        total += tokens
    return [
        np.arange(begin, end)
        for begin, end in itertools.pairwise([*cuts, len(num_tokens)])
        if end > begin
    ]


def _take(events: Events, sequences: np.ndarray) -> Events:
    # all of them: as a rule a request comes alone
    if np.array_equal(sequences, np.arange(len(events.offsets) - 1)):
        return events
    return events.take(events.offsets[sequences], events.offsets[sequences + 1])


def _no_rows(like: Events, num_sequences: int) -> Events:
    """`num_sequences` sequences without a row."""
    nothing = np.zeros(num_sequences, np.int64)
    return like.take(nothing, nothing)


def probabilities(model: torch.nn.Module, batch: SequenceBatch) -> np.ndarray:
    """What the model says of a batch's candidates, float32 [C, tasks]."""
    with torch.no_grad():
        return model(batch.to(next(model.parameters()).device)).sigmoid().cpu().numpy()


def _refuse(loc: list[str | int], rule: str, value: object) -> Refusal:
    return Refusal.of(["body", *loc], rule, value)
