"""A served version of a few users that can recommend: the tiny world with an index over it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.config import IndexConfig, ServeConfig
from pipeline.index.catalogue import Catalogue, make_table
from pipeline.index.folder import load_index
from pipeline.model.artifact import load_model
from serve_app.columns import RankColumns, RankedColumns
from serve_app.history.live import LiveHistory
from serve_app.history.published import PublishedSequences
from serve_app.history.sqlite_events import SqliteEvents
from serve_app.metrics import ReplicaMetrics, exposition_text
from serve_app.page.schemas import Question, Shown
from serve_app.page.showcase import Showcase
from serve_app.ranking.explain import Explanations
from serve_app.ranking.ranker import Ranker
from serve_app.ranking.rollout import CHAMPION, Rollout
from serve_app.recommend.jobs import receive_list
from serve_app.recommend.lists import RecommendedList
from serve_app.recommend.schemas import RecommendRequest
from serve_app.schemas import EventsRequest, EventsResponse, ModelInfo, Refusal
from tests.worlds.tiny import (
    NUM_ITEMS,
    index_model,
    publish_sequences,
    save_tiny_model,
    tiny_config,
)
from tests.worlds.web import between_processes

LIMITS = ServeConfig(
    max_candidates=50,
    max_history=50,
    max_recommended=20,
    max_recommend_users=6,
    retrieved_candidates=30,
    popular_candidates=5,
    followed_candidates=5,
)


class Served:
    """Everything of a replica but Ray; `with_index` False: a version registered without one."""

    def __init__(self, folder: Path, *, with_index: bool = True) -> None:
        self.cfg = tiny_config(
            folder / "runs",
            retrieval={"enabled": True, "dim": 4},
            train={"max_targets_per_sequence": 6},
        )
        self.table = publish_sequences(self.cfg)
        save_tiny_model(self.cfg, self.cfg.model_dir)
        self.counts = ReplicaMetrics()
        self.ranker = self._load_ranker(folder, with_index=with_index)
        self.rollout = Rollout({CHAMPION: self.ranker}, {CHAMPION: ""}, 0.0, self.counts)
        self.counts.loaded.roles = self.rollout.rankers

    def _load_ranker(self, folder: Path, *, with_index: bool) -> Ranker:
        cfg = self.cfg
        loaded = load_model(cfg.model_dir)
        published = PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, folder / "cache")
        history = LiveHistory(
            published, SqliteEvents(folder / "events.sqlite"), cfg.sequences, max_events=100
        )
        if not with_index:
            return Ranker(loaded, history, 1, "tiny", LIMITS)

        # with columns that the tiny logs do not have
        index_model(cfg, cfg.model_dir)
        index = load_index(loaded, cfg.model_dir)
        assert index is not None
        ids, settings = index.catalogue.item_ids, IndexConfig(title_column="name")
        items = pa.table(
            {
                "item_id": np.arange(NUM_ITEMS),
                "author": np.arange(NUM_ITEMS) % 5,
                "name": [f"item {i}" for i in range(NUM_ITEMS)],
            }
        )
        table = make_table(
            ids, index.catalogue.popularity, index.catalogue.recency, items, settings
        )
        index = replace(index, catalogue=Catalogue(table), settings=settings)
        return Ranker(loaded, history, 1, "tiny", LIMITS, index)

    async def rank(self, request: RankColumns) -> RankedColumns | Refusal:
        received = self.rollout.receive(between_processes(request))
        answer = self.rollout.answer_jobs([received.prepare()])[0]
        if request.head.explain and isinstance(answer, RankedColumns):
            answer = await Explanations()(received, answer)
        return between_processes(answer)

    async def recommend(
        self, requests: Sequence[RecommendRequest]
    ) -> list[RecommendedList | Refusal]:
        sent = between_processes(list(requests))
        jobs = [receive_list(self.rollout, one).prepare() for one in sent]
        return between_processes(self.rollout.answer_jobs(jobs))

    async def append_events(self, request: EventsRequest) -> EventsResponse | Refusal:
        return self.rollout.append_events([between_processes(request)])[0]

    async def show(self, question: Question) -> Shown | Refusal:
        return between_processes(Showcase(self.rollout).answer(between_processes(question)))

    async def model_info(self) -> ModelInfo:
        return self.rollout.model_info()

    async def deployment_ids(self) -> list[str]:
        return [self.rollout.model_info().deployment]

    async def ingress_metrics(self, own: bytes) -> dict[str, bytes]:
        return {"own": own}

    async def replica_metrics(self) -> dict[str, bytes]:
        return {"one": exposition_text(self.counts.registry)}
