"""A recommend request among the jobs of a replica: its candidates share passes with others'."""

from dataclasses import dataclass, replace

from serve_app.columns import RankColumns, RankedColumns
from serve_app.ranking.rollout import RankJob, ReceivedRequest, Rollout
from serve_app.recommend.lists import RecommendedList
from serve_app.recommend.recommender import NO_ITEMS, PreparedList, Recommender, head_of
from serve_app.recommend.schemas import RecommendRequest
from serve_app.schemas import NoIndex


def receive_list(rollout: Rollout, wanted: RecommendRequest) -> "ReceivedList":
    """Choose the version that answers; nothing is looked up yet.

    Raises:
        NoIndex: that version has none.
    """
    request = RankColumns(head_of(wanted), NO_ITEMS, {})
    role = rollout.choose_role(request)
    recommender = rollout.recommenders.get(role)
    if recommender is None:
        raise NoIndex

    refusal = recommender.find_refusal(wanted)
    return ReceivedList(rollout, role, request, refusal, wanted=wanted, recommender=recommender)


@dataclass(slots=True, kw_only=True)
class ReceivedList(ReceivedRequest):
    """A recommend request on its way to a `RankJob` of the candidates that are retrieved for it."""

    wanted: RecommendRequest
    recommender: Recommender

    def prepare(self) -> RankJob:
        """The job that ranks the candidates, or the answer where there is none."""
        rollout, role = self.rollout, self.role
        if self.refusal is not None:
            return RankJob(rollout, role, self.request, self.refusal, 0.0)

        prepared = self.recommender.prepare_list(self.wanted, self.found, ask_store=self.asks_store)
        if prepared.ranking is None:
            return RankJob(rollout, role, self.request, self._finish(prepared, None), 0.0)

        def finish(ranked: RankedColumns) -> RecommendedList:
            return self._finish(prepared, ranked)

        ranking = prepared.ranking
        return RankJob(rollout, role, ranking.request, ranking, 0.0, finish)

    def _finish(self, prepared: PreparedList, ranked: RankedColumns | None) -> RecommendedList:
        """The list, counted."""
        rank_ms = 0.0 if ranked is None else ranked.ranker_ms or 0.0
        finished = self.recommender.finish_list(prepared, ranked, rank_ms / 1000)
        finished = replace(finished, role=self.role)

        metrics = self.rollout.metrics
        labels = (str(finished.model_version), self.role)
        for stage, seconds in prepared.stage_s.items():
            metrics.lists.seconds.labels(*labels, stage).observe(seconds)
        for source in finished.source:
            metrics.lists.items.labels(*labels, source).inc()

        if len(finished.item_id) == 0:
            metrics.lists.empty.labels(*labels).inc()
        elif prepared.retrieved.by_popularity:
            metrics.lists.by_popularity.labels(*labels).inc()
        return finished
