"""From a recommend request to a list, without Ray and HTTP.

request → history → user's vector → candidates → ranking pass (with other requests) → list
"""

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.index.folder import LoadedIndex
from pipeline.index.towers import history_batch, user_vectors
from pipeline.model.inference.cached_scoring import encode_history_rows
from pipeline.recommend.filters import FilterError
from pipeline.recommend.retriever import SOURCES, NoVectors, Retrieved, Retriever, Wish
from serve_app.columns import RankColumns, RankedColumns
from serve_app.history.rows import refuse_other_kind
from serve_app.ranking.ranker import CutHistory, FoundHistory, PreparedRequest, Ranker
from serve_app.recommend.lists import RecommendedList
from serve_app.recommend.schemas import Explanation, LikeItem, RecommendRequest
from serve_app.schemas import RankHead, Refusal, UserHead

VECTORS_KEPT = 16_384  # users' vectors: 4 MB at 64 dimensions
MOST_LIKE = 3  # items of the history that an explanation names
BY_POPULARITY = "popularity"
NO_ITEMS = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class PreparedList:
    """A request with its candidates: what is left is to rank them and to choose."""

    request: RecommendRequest
    wish: Wish
    history: CutHistory
    retrieved: Retrieved
    ranking: PreparedRequest | None  # None: there is no candidate
    stage_s: dict[str, float]  # seconds by stage so far


class Recommender:
    """Lists of one model version from its own index.

    Args:
        ranker: of the version; its history store, its precision and limits hold here too.
        index: of the same version.
    """

    def __init__(self, ranker: Ranker, index: LoadedIndex) -> None:
        self.ranker = ranker
        self.index = index
        self.head = ranker.model.retrieval
        self.retriever = Retriever(index, ranker.limits)
        self._vectors: OrderedDict[bytes, Tensor] = OrderedDict()
        self._vectors_lock = threading.Lock()  # long histories are encoded in another thread

    def find_refusal(self, request: RecommendRequest) -> Refusal | None:
        """The first thing that this version cannot answer in a request that the schema allows."""
        limit = self.ranker.limits.max_recommended
        if request.n > limit:
            return Refusal.of(["body", "n"], f"at most {limit} items", request.n)

        refusal = self.ranker.find_refusal(RankColumns(head_of(request), NO_ITEMS, {}))
        if refusal is not None:
            return refusal

        text_ids = self.ranker.store.columns.text_ids
        for place, item in enumerate(request.exclude.items):
            where = ["body", "exclude", "items", place]
            refusal = refuse_other_kind(where, item, "item_id", text_ids)
            if refusal is not None:
                return refusal

        try:
            self.retriever.check_wish(request.wish())
        except FilterError as error:
            return Refusal.of(["body", *error.field], error.rule, error.value)
        except NoVectors:
            rule = "null: the model has no retrieval head, so its index holds no vectors"
            assert request.diversify is not None
            return Refusal.of(["body", "diversify", "mmr"], rule, request.diversify.mmr)
        return None

    def prepare_list(
        self,
        request: RecommendRequest,
        known: FoundHistory | None = None,
        *,
        ask_store: bool = True,
    ) -> PreparedList:
        """Retrieve candidates by the history, and look up their features.

        `known` is what `Ranker.find_history` says of the request; it is asked here where it was not
        before.
        """
        ranker, stage_s = self.ranker, {}
        started = time.perf_counter()
        if known is None:
            known = ranker.find_history(head_of(request), ask_store=ask_store)
        found = ranker.cut_history(head_of(request), known)
        stage_s["history"] = _seconds_since(started)

        started = time.perf_counter()
        vector = self._user_vector(found)
        stage_s["encode"] = _seconds_since(started)

        started = time.perf_counter()
        wish = request.wish()
        actions = ranker.cfg.source.actions
        retrieved = self.retriever.retrieve(wish, found.past.events, actions, vector)
        stage_s["retrieve"] = _seconds_since(started)

        started = time.perf_counter()
        ranking = None
        if len(retrieved.rows):
            item_id = self.index.catalogue.item_ids[retrieved.rows]
            ranking = ranker.add_candidates(found, RankColumns(head_of(request), item_id, {}))
        stage_s["features"] = _seconds_since(started)
        return PreparedList(request, wish, found, retrieved, ranking, stage_s)

    def finish_list(
        self, prepared: PreparedList, ranked: RankedColumns | None, rank_s: float = 0.0
    ) -> RecommendedList:
        """The list of a prepared request.

        Args:
            ranked: its candidates' scores; None where it has no candidate.
            rank_s: what ranking them took.
        """
        started = time.perf_counter()
        request, retrieved = prepared.request, prepared.retrieved
        task = request.order_by or self.ranker.cfg.tasks[0]
        scores = np.zeros(0, np.float32) if ranked is None else ranked.scores[task]
        places = self.retriever.choose(prepared.wish, retrieved, scores)

        why = None
        if request.explain and ranked is not None:
            why = self._explain(prepared, ranked, places)

        rows = retrieved.rows[places]
        prepared.stage_s["rank"] = rank_s
        prepared.stage_s["choose"] = _seconds_since(started)
        return RecommendedList(
            head=self._head(prepared, BY_POPULARITY if retrieved.by_popularity else task),
            item_id=self.index.catalogue.own_ids(rows),
            score=scores[places],
            retrieval_score=retrieved.scores[places],
            source=[retrieved.first_source(place) for place in places.tolist()],
            title=self._titles(rows),
            why=why,
            sequences=self.ranker.store.digest,
            task=task,
        )

    def _head(self, prepared: PreparedList, ordered_by: str) -> dict[str, object]:
        history, retrieved = prepared.history, prepared.retrieved
        head = {
            "model_version": self.ranker.version,
            "index_version": self.index.version,
            "request_time_ms": prepared.request.request_time_ms,
            "ordered_by": ordered_by,
            "unknown_user": history.unknown_user,
            "history_length": len(history.past.events.item_id),
            "num_allowed": retrieved.num_allowed,
            "note": self._note(prepared),
            "took_ms": round(1000 * sum(prepared.stage_s.values()), 3),
        }
        if not history.live_events:
            head["live_events"] = False
        return head

    def _note(self, prepared: PreparedList) -> str | None:
        """What a client should know of a list that is not what it asked for."""
        retrieved, total = prepared.retrieved, len(self.index.catalogue)
        if len(retrieved.rows) == 0:
            return f"empty: exclusions and filters left none of {total} items"
        if retrieved.by_popularity:
            return "the popular list: nothing is known of what this user did before"
        return None

    def _titles(self, rows: np.ndarray) -> list[str | None] | None:
        name = self.index.settings.title_column
        if name is None:
            return None
        column = self.index.catalogue.columns[name]
        titles = []
        for row in rows.tolist():
            value = column.value(row)
            titles.append(None if value is None else str(value))
        return titles

    # The user's vector -------------------------------------------------------

    def _user_vector(self, found: CutHistory) -> Tensor | None:
        """float32 [d], kept by what was encoded; None without history or retrieval head."""
        if self.head is None or self.index.vectors is None or not len(found.past.events.item_id):
            return None

        with self._vectors_lock:
            kept = self._vectors.get(found.key)
            if kept is not None:
                self._vectors.move_to_end(found.key)
                return kept

        vector = self._encode_user(found)
        if found.key:  # empty: what was encoded depends on the request
            with self._vectors_lock:
                self._vectors[found.key] = vector
                if len(self._vectors) > VECTORS_KEPT:
                    self._vectors.popitem(last=False)
        return vector

    def _encode_user(self, found: CutHistory) -> Tensor:
        """The vector, from a pass that also gives what ranking keeps of the history."""
        ranker = self.ranker
        assert self.head is not None
        user = np.array([found.user_id])
        batch = history_batch(found.past.events, user, ranker.maps, ranker.inputs)
        batch = batch.to(ranker.device)

        with ranker.precision():
            if not found.key:
                return user_vectors(ranker.model, self.head, batch)[0]
            cache, rows = encode_history_rows(ranker.model, batch)
            vector = self.head.user_vectors(rows).float()[0]
        only_of = ranker.only_entry_of(found.user_id, len(found.past.events.item_id))
        rows = found.past.events if only_of is not None and ranker.can_append else None
        ranker.caches.keep_entry(found.key, cache, only_of=only_of, rows=rows)
        return vector

    # Explanations ------------------------------------------------------------

    def _explain(
        self, prepared: PreparedList, ranked: RankedColumns, places: np.ndarray
    ) -> list[Explanation]:
        retrieved, catalogue = prepared.retrieved, self.index.catalogue
        seen = catalogue.find_rows(prepared.history.past.events.item_id)
        known = self.ranker.maps.item_codes[self.ranker.maps.item_rows(ranked.item_id), 0] > 0

        reasons = []
        for place in places.tolist():
            row = int(retrieved.rows[place])
            found_by = zip(SOURCES, retrieved.sources[place], strict=True)
            reasons.append(
                Explanation.model_construct(
                    sources=[source for source, found in found_by if found],
                    scores={task: float(one[place]) for task, one in ranked.scores.items()},
                    popularity=int(catalogue.popularity[row]),
                    unknown_item=not bool(known[place]),
                    like=self._like_items(row, seen),
                )
            )
        return reasons

    def _like_items(self, row: int, seen: np.ndarray) -> list[LikeItem]:
        """The rows of `seen` nearest to `row` by cosine; none without vectors."""
        if self.index.vectors is None or len(seen) == 0:
            return []

        vectors = self.index.vectors.vectors
        others = vectors[torch.from_numpy(seen).to(vectors.device)]
        cosine = torch.nn.functional.cosine_similarity(others, vectors[row][None]).cpu().numpy()
        nearest = np.argsort(-cosine, kind="stable")[:MOST_LIKE]

        found = []
        own = self.index.catalogue.own_ids(seen[nearest]).tolist()
        for item_id, place in zip(own, nearest.tolist(), strict=True):
            found.append(LikeItem.model_construct(item_id=item_id, cosine=float(cosine[place])))
        return found


def head_of(request: RecommendRequest) -> RankHead:
    """The part of a request that ranking knows."""
    fields = {name: getattr(request, name) for name in UserHead.model_fields}
    return RankHead.model_construct(**fields)


def _seconds_since(started: float) -> float:
    return time.perf_counter() - started
