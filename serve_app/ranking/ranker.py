"""From requests to scores, without Ray and HTTP.

histories → keys → encoded histories, kept from earlier requests or new ─┐
candidates ──────────────────────────────────────────────────────────────┴→ scores
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from pipeline import config
from pipeline.batches.collate import SequenceBatch, candidates, collate
from pipeline.batches.events import Events, concatenate
from pipeline.config import ServeConfig, UserError
from pipeline.index.folder import LoadedIndex
from pipeline.model.artifact import LoadedModel
from pipeline.model.inference.appending import ChangedRows, append_history, changed_rows
from pipeline.model.inference.cached_scoring import HistoryCache, encode_history
from pipeline.model.inference.cuda_graph import (
    Encoded,
    GraphedScorer,
    bucket_sizes,
    replays_pay,
    score_together,
)
from pipeline.model.inference.graphed_model import GraphedModel
from pipeline.model.inference.quantize import as_served
from pipeline.model.inference.rooms import FilledHistory
from pipeline.version import package_version
from serve_app.columns import RankColumns, RankedColumns
from serve_app.history.live import LiveHistory
from serve_app.history.published import Histories, HistoryStore, histories, sequence_row
from serve_app.history.rows import posted_columns
from serve_app.ranking.describe import describe_features
from serve_app.ranking.history_cache import (
    CacheBudget,
    HeldHistory,
    HistoryCaches,
    beginning_key,
    history_key,
    shares_rows,
)
from serve_app.ranking.outage import StoreOutage
from serve_app.ranking.refusals import RequestRules
from serve_app.schemas import HistoryRow, IndexInfo, ModelInfo, RankHead, Refusal, StoreDown

logger = logging.getLogger("ray.serve")

NO_USER = -1  # in no vocabulary: the codes of an unknown user
LONG_HISTORY = 2048  # rows: beyond where kernels choose other tiles


@dataclass(frozen=True, slots=True)
class FoundHistory:
    """The SEQUENCE row behind a request."""

    sequence: pa.RecordBatch | None  # None: nobody knows the user
    live_events: bool  # False: the user's posted events should be in it and are not


@dataclass(frozen=True, slots=True)
class CutHistory:
    """What a user did before a request: `past` is one sequence."""

    user_id: int
    unknown_user: bool
    live_events: bool  # False: the event store did not answer
    past: Histories
    key: bytes  # of the encoded history; empty for a model that keeps none


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request with all that its scores depend on, `past` and `targets` of one sequence each."""

    request: RankColumns
    user_id: int
    unknown_user: bool
    live_events: bool  # False: the event store did not answer
    past: Events
    targets: Events
    key: bytes  # of the encoded history; empty for a model that keeps none

    @property
    def history_length(self) -> int:
        return len(self.past.item_id)

    @property
    def num_tokens(self) -> int:
        return self.history_length + len(self.request)


@dataclass(frozen=True, slots=True)
class FormerHistory:
    """An entry of the cache that a history goes on from."""

    key: bytes
    num_rows: int  # of the entry
    num_dropped: int  # of these, that have left
    changed: ChangedRows


class Ranker:
    """One model version over one history store.

    Args:
        loaded: model, configuration and feature maps as one artifact holds them.
        store: who did what.
        version: the registry's number, part of every response.
        name: of the registered model.
        limits: of a request; the operator's, not the ones that the model was trained with.
        index: the items that the version can recommend, None where it has no index.
        budget: for encoded histories, shared with other rankers; None: one of its own.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        store: HistoryStore,
        version: int,
        name: str,
        limits: ServeConfig,
        index: LoadedIndex | None = None,
        budget: CacheBudget | None = None,
    ) -> None:
        self.model = loaded.model
        self.cfg, self.inputs = loaded.cfg, loaded.cfg.inputs
        self.maps = loaded.maps
        as_served(self.model, limits)
        self.features = describe_features(self.cfg.features, self.maps)

        self.store = store
        self.outage = StoreOutage()
        self.version = version
        self.name = name
        self.limits = limits
        self.max_history = loaded.cfg.examples.read_rows(limits.max_history)
        self.index = index

        self.device = next(self.model.parameters()).device
        if budget is None:
            budget = CacheBudget.of_mb(limits.cache_mb, for_rooms=limits.cuda_graphs)
        self.caches = HistoryCaches(budget)
        self.score_candidates = GraphedScorer() if limits.cuda_graphs else score_together
        self.graphed: GraphedModel | None = None  # passes over one user's whole history
        if limits.cuda_graphs and GraphedModel.fits(self.cfg.model):
            self.graphed = GraphedModel(self.model, self.cfg)

        # the hour is computed from the request's time
        asked = [column for column in self.cfg.features.request if column != "hour"]
        self.request_columns = tuple(asked)
        self.rules = RequestRules(
            limits=limits,
            tasks=self.cfg.tasks,
            request_columns=self.request_columns,
            trained=self.cfg.source.events,
            published=store.columns,
            earliest_ms=config.parse_time(
                "sequences.earliest_time", self.cfg.sequences.earliest_time
            ),
        )

    def model_info(self) -> ModelInfo:
        """The version and the names that its requests may use."""
        texts = self.cfg.source.events.text_request
        return ModelInfo(
            model_name=self.name,
            model_version=self.version,
            tasks=list(self.cfg.tasks),
            request_features=list(self.request_columns),
            text_features=[name for name in self.request_columns if name in texts],
            actions=list(self.cfg.source.actions),
            features=self.features,
            text_ids=list(self.store.columns.text_ids),
            sequences=self.store.digest,
            server_version=package_version(),
            live_events=not self.outage.is_on,
            index=None if self.index is None else IndexInfo(**self.index.describe()),
        )

    def warm_up(self) -> None:
        """Rank one request of every shape of work, so that the first real one finds everything
        allocated and compiled.

        On a GPU long histories take other kernels than short ones.

        Raises:
            UserError: the model gives scores that are not finite.
        """
        lengths = [1]
        if self.device.type == "cuda":
            lengths.append(min(LONG_HISTORY, self.max_history))

        for length in lengths:
            request = self._made_request(length)
            self._refuse_broken_scores(self.rank([request]))  # the history is encoded
            self._refuse_broken_scores(self.rank([request]))  # and found in the cache
            if self.device.type == "cuda":
                # users together, whose keys are as many as those of a long history
                self.rank([request] * (2 + LONG_HISTORY // length))

        if self.graphed is not None and self.cfg.model.cacheable:
            self._record_graphs(self.graphed.lengths_of_sizes(self.max_history))

    def _record_graphs(self, lengths: Sequence[int]) -> None:
        """Have the graphs of requests that come alone recorded, for histories of these lengths and
        all numbers of candidates.
        """
        most = min(self.limits.max_candidates, self.limits.micro_batch)
        for length in lengths:
            # a graph is recorded of the second history of its size; none begins as another does
            begin_ms = 2 * length
            self.rank([self._made_request(length, begin_ms)])
            for num_candidates in bucket_sizes(most):
                self.rank([self._made_request(length, begin_ms + 1, num_candidates)])

    def _made_request(self, length: int, begin_ms: int = 0, num_candidates: int = 1) -> RankColumns:
        """Candidates, and so many events a millisecond apart, from `begin_ms` after the earliest
        time on.
        """
        popular = self.maps.popular_items(1).tolist() or [0]
        begin = self.rules.earliest_ms + begin_ms
        rows = []
        for i in range(length):
            rows.append(HistoryRow(item_id=popular[0], event_time=begin + i))
        item_id = np.full(num_candidates, popular[0], np.int64)
        return RankColumns(RankHead(history=rows), item_id, {})

    def _refuse_broken_scores(self, ranked: Sequence[RankedColumns]) -> None:
        """An answer of NaN would be nulls in an order of chance."""
        for answer in ranked:
            for task, scores in answer.scores.items():
                if not np.isfinite(scores).all():
                    raise UserError(
                        f"{self.name} version {self.version} is not served: its scores of {task} "
                        f"are not finite ({scores[0]}) for a request to begin with"
                    )

    def cache_stats(self) -> dict[str, int]:
        """Counters and sizes by name, for /metrics."""
        return self.caches.cache_stats()

    def index_stats(self) -> dict[str, float]:
        """Sizes by name, for /metrics; empty for a version without an index."""
        if self.index is None:
            return {}
        return {"index_items": len(self.index.catalogue), "index_recall": self.index.recall}

    def rank(self, requests: Sequence[RankColumns]) -> list[RankedColumns]:
        """Answers to requests that `find_refusal` let pass, scored together.

        Scores do not depend on what else is in the batch.
        """
        return self.score_requests([self.prepare_request(request) for request in requests])

    # Preparing a request -----------------------------------------------------

    def find_refusal(self, request: RankColumns) -> Refusal | None:
        """The first thing that this model cannot answer in a request that the schema allows."""
        return self.rules.find_refusal(request)

    def must_look_up(self, head: RankHead) -> bool:
        """Tell whether `find_history` will ask the event store, which may take its time."""
        return head.history is None and isinstance(self.store, LiveHistory) and self.outage.may_ask

    def find_history(self, head: RankHead, *, ask_store: bool = True) -> FoundHistory:
        """The rows that a request brings, else those of its user as of the request's time.

        Without an event store that answers, or that is asked, it is what is published of the user.
        """
        if head.history is not None:
            # equal times keep their order
            rows = sorted(head.history, key=lambda row: row.event_time)
            flat = posted_columns(rows, self.store.columns)
            flat["order_only"] = np.array([row.order_only for row in rows], bool)
            return FoundHistory(sequence_row(flat, self.store.columns, head.first_position), True)

        assert head.user_id is not None, "the schema asks for user_id or history"
        if not isinstance(self.store, LiveHistory):
            return FoundHistory(self.store.sequence(head.user_id), True)

        if ask_store and self.outage.begin_asking():
            started = time.monotonic()
            try:
                row = self.store.sequence(head.user_id, head.request_time_ms)
            except StoreDown as error:
                if self._is_in_time(started):
                    self.outage.begin(started, error)
            else:
                if self._is_in_time(started):
                    self.outage.end()
                return FoundHistory(row, True)

        return self.find_published(head.user_id)

    def _is_in_time(self, started: float) -> bool:
        """False for a look-up that nobody waits for any more: the outage is noted already."""
        return time.monotonic() - started <= self.limits.lookup_timeout_s

    def find_published(self, user_id: int) -> FoundHistory:
        """What is published of a user, in the place of a look-up that failed or takes too long."""
        return FoundHistory(self.published_row(user_id), False)

    def published_row(self, user_id: int) -> pa.RecordBatch | None:
        """The published SEQUENCE row of a user; no event store is asked."""
        store = self.store.published if isinstance(self.store, LiveHistory) else self.store
        return store.sequence(user_id)

    def prepare_request(
        self, request: RankColumns, found: FoundHistory | None = None
    ) -> PreparedRequest:
        """Cut the history at the request's time, and look up the candidates' features.

        `found` is what `find_history` says of the request; it is asked here where it was not
        before.
        """
        if found is None:
            found = self.find_history(request.head)
        return self.add_candidates(self.cut_history(request.head, found), request)

    def cut_history(self, head: RankHead, found: FoundHistory) -> CutHistory:
        """The part of `found` that lies before the request's time."""
        sequence = found.sequence
        if sequence is None:
            sequence = sequence_row({}, self.store.columns)

        time_ms = np.array([head.request_time_ms], np.int64)
        past = histories([sequence], time_ms, self.cfg.source, self.cfg.features, self.max_history)
        user_id = NO_USER if head.user_id is None else head.user_id
        key = b""
        if self.cfg.model.cacheable:
            codes = self.maps.user_codes[self.maps.user_rows(np.array([user_id]))]
            key = history_key(past.events, codes)
        return CutHistory(user_id, found.sequence is None, found.live_events, past, key)

    def add_candidates(self, history: CutHistory, request: RankColumns) -> PreparedRequest:
        """The request's candidates with their features, behind its history."""
        past = history.past
        features = {name: request.feature(name) for name in self.request_columns}
        targets = candidates(
            past.events,
            past.first_position,
            request.item_id,
            np.array([0, len(request)]),
            np.array([request.head.request_time_ms], np.int64),
            features,
            self.maps,
            self.inputs,
        )
        return PreparedRequest(
            request,
            history.user_id,
            history.unknown_user,
            history.live_events,
            past.events,
            targets,
            history.key,
        )

    def history_length_class(self, prepared: PreparedRequest) -> int:
        """0 for a history that is encoded already, else 1 + the number of bits of its length.

        Requests of one class take about as long, so they share a pass.

            history      cached   0 rows   1 row   2..3   4..7   128..255
            class             0        1       2      3      4          9
        """
        if prepared.key in self.caches:
            return 0
        return 1 + prepared.history_length.bit_length()

    # Scoring -----------------------------------------------------------------

    def score_requests(self, prepared: Sequence[PreparedRequest]) -> list[RankedColumns]:
        """Answers to prepared requests, in passes of at most `limits.batch_tokens` tokens."""
        targets = concatenate([one.targets for one in prepared])
        users = np.array([one.user_id for one in prepared], np.int64)

        if self.cfg.model.cacheable:
            scores = self._score_cached(prepared, targets, users)
        else:
            past = concatenate([one.past for one in prepared])
            scores = self._score_whole(past, targets, users)

        answers = []
        scores_of_each = np.split(scores, targets.offsets[1:-1])
        for one, mine in zip(prepared, scores_of_each, strict=True):
            answers.append(self._answer(one, mine))
        return answers

    def _score_cached(
        self, prepared: Sequence[PreparedRequest], targets: Events, users: np.ndarray
    ) -> np.ndarray:
        """Probabilities, float32 [C, tasks].

        Histories that are not in the cache are encoded first, each once, then all candidates are
        scored.
        """
        encoded: dict[bytes, Encoded] = {}
        held: list[HeldHistory] = []
        missing: dict[bytes, int] = {}  # key -> which of `prepared`
        try:
            for i, one in enumerate(prepared):  # of every request, so that each is counted
                kept = self._find_kept(one.key, held)
                if kept is None:
                    missing[one.key] = i
                else:
                    encoded[one.key] = kept

            if missing:
                some = list(missing.values())
                past = concatenate([prepared[i].past for i in some])
                keys = {key: place for place, key in enumerate(missing)}
                encoded.update(self._encode_missing(past, users[some], keys, held))

            kept_of_each = [encoded[one.key] for one in prepared]
            lengths = np.array([one.history_length for one in prepared], np.int64)
            like = prepared[0].past
            return self._score_encoded(
                like, lengths, targets, users, kept_of_each, self.score_candidates
            )
        finally:
            self.caches.release_entries(held)

    def _find_kept(self, key: bytes, held: list[HeldHistory]) -> Encoded | None:
        """The cache's entry: where graphs read it in its pages, noted in `held`, else a copy."""
        if not self.limits.cuda_graphs:
            return self.caches.find_entry(key)
        found = self.caches.hold_entry(key)
        if found is not None:
            held.append(found)
        return found

    def _encode_missing(
        self,
        past: Events,
        users: np.ndarray,
        missing: dict[bytes, int],
        held: list[HeldHistory],
    ) -> dict[bytes, Encoded]:
        """Encoded histories of `missing` (key -> which of `past`), which are kept from now on.
        Those that graphs encode are read in their pages, noted in `held`.
        """
        beginnings: dict[bytes, bytes] = {}
        if self.can_append:
            for key, i in missing.items():
                beginnings[key] = beginning_key(*self._one_history(past, users, i))

        def keep(key: bytes, entry: HistoryCache | FilledHistory) -> HeldHistory | None:
            kept = self._keep(key, entry, past, users, missing[key], beginnings)
            if kept is not None:
                held.append(kept)
            return kept

        appended = self._append(past, users, missing, beginnings)
        rest = {key: i for key, i in missing.items() if key not in appended}
        encoded: dict[bytes, Encoded] = dict(appended)
        encoded.update(self._encode(past, users, rest, keep))
        for key, cache in encoded.items():
            if isinstance(cache, HistoryCache):
                keep(key, cache)
        return encoded

    def _keep(
        self,
        key: bytes,
        entry: HistoryCache | FilledHistory,
        past: Events,
        users: np.ndarray,
        i: int,
        beginnings: Mapping[bytes, bytes],
    ) -> HeldHistory | None:
        """`keep_entry` of the encoded history of one of `past`."""
        if not self.can_append:
            return self.caches.keep_entry(key, entry)
        num_rows = int(past.lengths[i])
        only_of = self.only_entry_of(int(users[i]), num_rows)
        rows = None
        if only_of is not None:
            rows, _ = self._one_history(past, users, i)
        return self.caches.keep_entry(key, entry, beginnings[key], num_rows, only_of, rows)

    @property
    def can_append(self) -> bool:
        """True where new rows may be added to an encoded history; a GPU's kernels make all rows."""
        return self.device.type == "cpu" and self.cfg.model.attention_backend in ("auto", "torch")

    def only_entry_of(self, user_id: int, num_rows: int) -> int | None:
        """The user, where of a history of so many rows the newest entry alone is kept."""
        is_long = num_rows > self.limits.long_history
        return user_id if is_long and user_id != NO_USER else None

    def _score_encoded(
        self,
        like: Events,
        lengths: np.ndarray,
        targets: Events,
        users: np.ndarray,
        encoded: Sequence[Encoded],
        score: Callable[..., torch.Tensor],
    ) -> np.ndarray:
        """Probabilities from the encoded history of each sequence, float32 [C, tasks]. `lengths`
        are those of the histories, whose columns are those of `like`.
        """
        scores = []
        for chosen in split_passes(lengths + targets.lengths, self.limits.batch_tokens):
            nothing = _without_rows(like, len(chosen))
            asked = _take_sequences(targets, chosen)
            batch = collate(nothing, asked, users[chosen], self.maps, self.inputs)
            caches = [encoded[i] for i in chosen]

            with self.precision():
                logits = score(self.model, caches, batch, self.limits.micro_batch)
            scores.append(logits.sigmoid().cpu().numpy())
        return np.concatenate(scores)

    def score_apart(self, past: Events, targets: Events, users: np.ndarray) -> np.ndarray:
        """The scores of `score_requests` for sequences that nobody will ask for again, float32
        [C, tasks]: nothing is kept or counted, so it may run beside other passes.
        """
        if not self.cfg.model.cacheable:
            return self._score_whole(past, targets, users)

        scores = []
        for chosen in split_passes(past.lengths + targets.lengths, self.limits.batch_tokens):
            history, asked = _take_sequences(past, chosen), _take_sequences(targets, chosen)
            every = {str(i).encode(): i for i in range(len(chosen))}
            encoded = dict(self._encode(history, users[chosen], every, _keep_none))
            in_order = [encoded[key] for key in every]
            scores.append(
                self._score_encoded(
                    *(history, history.lengths, asked, users[chosen]), in_order, score_together
                )
            )
        return np.concatenate(scores)

    def _score_whole(self, past: Events, targets: Events, users: np.ndarray) -> np.ndarray:
        """The same for a model whose encoded history depends on the request: nothing to keep."""
        scores = []
        for chosen in split_passes(past.lengths + targets.lengths, self.limits.batch_tokens):
            history = _take_sequences(past, chosen)
            asked = _take_sequences(targets, chosen)
            batch = collate(history, asked, users[chosen], self.maps, self.inputs)

            with self.precision():
                if self.graphed is not None and len(chosen) == 1:
                    logits = self.graphed.score(batch)
                else:
                    logits = self.model(batch.to(self.device))
            scores.append(logits.sigmoid().cpu().numpy())
        return np.concatenate(scores)

    def _one_history(self, past: Events, users: np.ndarray, i: int) -> tuple[Events, np.ndarray]:
        """One of the sequences, and its user's codes, [1, user columns]."""
        codes = self.maps.user_codes[self.maps.user_rows(users[i : i + 1])]
        return past.take(past.offsets[i : i + 1], past.offsets[i + 1 : i + 2]), codes

    def _append(
        self,
        past: Events,
        users: np.ndarray,
        missing: dict[bytes, int],
        beginnings: dict[bytes, bytes],
    ) -> dict[bytes, HistoryCache]:
        """Encoded histories of those of `missing` that are an entry's rows and new ones, without
        its oldest perhaps: only what that changes is encoded. On a CPU.
        """
        appended: dict[bytes, HistoryCache] = {}
        if not self.can_append:
            return appended

        for key, i in missing.items():
            history, codes = self._one_history(past, users, i)
            former = self._find_grown(history, codes, beginnings[key])
            if former is None:
                former = self._find_moved(history, int(users[i]))
            kept = None if former is None else self.caches.read_entry(former.key)
            if former is None or kept is None:
                continue

            # the rows to encode, as one sequence
            front, first = former.changed.front, former.changed.first
            num_rows = len(history.item_id)
            rows = history.take(np.array([0, first]), np.array([front, num_rows]))
            rows = replace(rows, offsets=rows.offsets[[0, 2]])
            batch = collate(rows, _without_rows(rows, 1), users[i : i + 1], self.maps, self.inputs)
            with self.precision():
                appended[key] = append_history(
                    *(self.model, kept, batch, former.num_rows, num_rows),
                    front=front,
                    num_dropped=former.num_dropped,
                )
            self.caches.appends += 1
        return appended

    def _find_grown(
        self, history: Events, codes: np.ndarray, beginning: bytes
    ) -> FormerHistory | None:
        """The entry of the history as it was before its newest rows."""
        found = self.caches.find_beginning(beginning)
        num_rows = len(history.item_id)
        if found is None or found[1] >= num_rows:
            return None

        # the entry is of these very rows
        key, num_cached = found
        if history_key(history.take(np.array([0]), np.array([num_cached])), codes) != key:
            return None
        changed = self._changed_rows(num_cached, num_rows)
        return None if changed is None else FormerHistory(key, num_cached, 0, changed)

    def _find_moved(self, history: Events, user_id: int) -> FormerHistory | None:
        """The entry of a long history that has lost its oldest rows since."""
        num_rows = len(history.item_id)
        only_of = self.only_entry_of(user_id, num_rows)
        found = None if only_of is None else self.caches.find_former(only_of)
        if found is None:
            return None

        key, before = found
        num_cached = len(before.position)
        num_dropped = int(history.position[0] - before.position[0])
        if not 0 < num_dropped < num_cached:
            return None
        changed = self._changed_rows(num_cached, num_rows, num_dropped)
        if changed is None or not shares_rows(before, history, num_dropped, changed.front):
            return None
        return FormerHistory(key, num_cached, num_dropped, changed)

    def _changed_rows(
        self, num_cached: int, num_rows: int, num_dropped: int = 0
    ) -> ChangedRows | None:
        num_context = self.model.encoder.num_context
        return changed_rows(self.cfg.model, num_context, num_cached, num_rows, num_dropped)

    def _encode(
        self,
        past: Events,
        users: np.ndarray,
        missing: dict[bytes, int],
        keep: Callable[[bytes, FilledHistory], HeldHistory | None],
    ) -> Iterator[tuple[bytes, Encoded]]:
        """Encoded histories of `missing` (key -> which of `past`), those of like length in one
        pass. Where there are graphs, they are replayed one after another if that takes less than
        launching a pass over all of them; each of these is as `keep` keeps it, if it does.
        """
        lengths = past.lengths
        shortest_first = sorted(missing, key=lambda key: lengths[missing[key]])
        rows = np.array([missing[key] for key in shortest_first], np.int64)

        for chosen in split_passes(lengths[rows], self.limits.batch_tokens):
            keys = [shortest_first[i] for i in chosen]
            together = rows[chosen]
            num_rows = int(lengths[together].sum())
            if self.graphed is not None and replays_pay(len(together), num_rows):
                for key, row in zip(keys, together, strict=True):
                    batch = self._history_batch(past, users, np.array([row]))
                    with self.precision():
                        found = self.graphed.encode_kept(batch, partial(keep, key))
                    yield key, found
                continue

            batch = self._history_batch(past, users, together)
            with self.precision():
                caches = encode_history(self.model, batch.to(self.device)).split_histories()
            yield from zip(keys, caches, strict=True)

    def _history_batch(self, past: Events, users: np.ndarray, rows: np.ndarray) -> SequenceBatch:
        """Some of the histories `past` without candidates."""
        history = _take_sequences(past, rows)
        nothing = _without_rows(past, len(rows))
        return collate(history, nothing, users[rows], self.maps, self.inputs)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """In this block passes run in the number format that the operator wants."""
        in_bf16 = self.limits.precision == "bf16"
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, in_bf16):
            yield

    def _answer(self, prepared: PreparedRequest, scores: np.ndarray) -> RankedColumns:
        """The answer to one request from its candidates' scores, [C, tasks]."""
        request = prepared.request
        item_codes = self.maps.item_codes[self.maps.item_rows(request.item_id), 0]
        ordered_by = request.head.order_by or self.cfg.tasks[0]
        by_task = {task: scores[:, i] for i, task in enumerate(self.cfg.tasks)}

        head = {
            "model_version": self.version,
            "request_time_ms": request.head.request_time_ms,
            "ordered_by": ordered_by,
            "unknown_items": int(np.count_nonzero(item_codes == 0)),
            "unknown_user": prepared.unknown_user,
            "history_length": prepared.history_length,
        }
        if not prepared.live_events:
            head["live_events"] = False
        best_first = np.argsort(-by_task[ordered_by], kind="stable")
        return RankedColumns(
            head, request.item_id, by_task, best_first, item_text=request.item_text
        )


def split_passes(num_tokens: np.ndarray, most: int) -> list[np.ndarray]:
    """Indices 0..n-1 in order, cut where the tokens of a pass would exceed `most`.

    One sequence with more is a pass of its own.

        num_tokens   5 5 5 30 5        most = 12
        passes       [0 1] [2] [3] [4]
    """
    passes = []
    begin, total = 0, 0

    for i, tokens in enumerate(num_tokens.tolist()):
        if total and total + tokens > most:
            passes.append(np.arange(begin, i))
            begin, total = i, 0
        total += tokens

    if begin < len(num_tokens):
        passes.append(np.arange(begin, len(num_tokens)))
    return passes


def candidate_probabilities(model: torch.nn.Module, batch: SequenceBatch) -> np.ndarray:
    """The model's probabilities for a batch's candidates, float32 [C, tasks]."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return model(batch.to(device)).sigmoid().cpu().numpy()


def _keep_none(key: bytes, entry: FilledHistory) -> None:
    """In the place of a cache that keeps histories."""


def _take_sequences(events: Events, sequences: np.ndarray) -> Events:
    # all of them: as a rule a request comes alone
    if np.array_equal(sequences, np.arange(len(events.offsets) - 1)):
        return events
    return events.take(events.offsets[sequences], events.offsets[sequences + 1])


def _without_rows(like: Events, num_sequences: int) -> Events:
    """`num_sequences` sequences without a row."""
    nothing = np.zeros(num_sequences, np.int64)
    return like.take(nothing, nothing)
