"""Model versions of one replica by role, and the version that answers a user, without Ray.

    champion   answers everybody but the canary's users
    canary     answers a share of the users, the same ones each time
    shadow     answers nobody: it ranks copies afterwards, and its scores are compared with those
               that were sent

All of them lie in one process, so a change of roles is one assignment and needs no other replicas.
It costs the memory of each version, and the shadow's share of the processor.
"""

import hashlib
import json
import logging
import math
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernels.backend import choose_backend
from pipeline.config import ServeConfig, UserError
from pipeline.config.reading import build_section
from pipeline.index.folder import load_indexed
from pipeline.tracking import PinnedModel, fetch_model
from serve_app.columns import RankColumns, RankedColumns
from serve_app.history.live import EventLog, LiveHistory
from serve_app.history.published import PublishedSequences
from serve_app.history.sqlite_events import SqliteEvents
from serve_app.metrics import ReplicaMetrics
from serve_app.ranking.history_cache import CacheBudget
from serve_app.ranking.ranker import FoundHistory, PreparedRequest, Ranker
from serve_app.recommend.lists import RecommendedList
from serve_app.recommend.recommender import Recommender
from serve_app.schemas import EventsRequest, EventsResponse, ModelInfo, Refusal, StoreDown

logger = logging.getLogger("ray.serve")

CHAMPION, CANARY, SHADOW = "champion", "canary", "shadow"
# batches that may wait for the shadow; beyond them copies are dropped and counted
SHADOW_QUEUE = 64

Copies = list[tuple[RankColumns, RankedColumns]]  # requests and the answers that were sent


def in_share(user_id: int | str, version: int, share: float) -> bool:
    """Tell whether a canary of this version answers this user, or this key of a client.

    A larger share keeps the users of a smaller one; another version is tried on other users.
    """
    digest = hashlib.blake2b(f"{version}/{user_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


class Rollout:
    """Versions by role, and their answers. Posted events go to the champion's history.

    Args:
        rankers: by role; the champion is always there.
        identities: by role, everything that the loaded version depends on.
        share: of the users, for the canary.
        metrics: counters of this replica.
        shared: what the rollouts of a process hand on; None: nothing is.
    """

    def __init__(
        self,
        rankers: dict[str, Ranker],
        identities: dict[str, str],
        share: float,
        metrics: ReplicaMetrics,
        shared: "Shared | None" = None,
    ) -> None:
        self.shared = shared
        self.rankers = rankers
        self.identities = identities
        self.share = share
        self.metrics = metrics
        self.champion = rankers[CHAMPION]

        # the shadow answers nobody
        self.recommenders: dict[str, Recommender] = {}
        for role in (CHAMPION, CANARY):
            index = rankers[role].index if role in rankers else None
            if index is not None:
                self.recommenders[role] = Recommender(rankers[role], index)

        self._copies: queue.Queue[Copies | None] = queue.Queue(SHADOW_QUEUE)
        if SHADOW in rankers:
            threading.Thread(target=self._follow_champion, name="shadow", daemon=True).start()

    def model_info(self) -> ModelInfo:
        """The champion's, with the versions on trial."""
        canary, shadow = self.rankers.get(CANARY), self.rankers.get(SHADOW)
        roles = {
            "canary_version": canary and canary.version,
            "canary_share": self.share if canary else None,
            "shadow_version": shadow and shadow.version,
        }
        return self.champion.model_info().model_copy(update=roles)

    def choose_role(self, request: RankColumns) -> str:
        """The role that answers; the champion where a request names neither a user nor a key."""
        canary = self.rankers.get(CANARY)
        key = getattr(request, "trial_key", None)
        if key is None:
            key = request.user_id
        if canary is None or key is None:
            return CHAMPION

        return CANARY if in_share(key, canary.version, self.share) else CHAMPION

    def rank(self, requests: Sequence[RankColumns]) -> list[RankedColumns | Refusal]:
        """An answer or a refusal for each."""
        return self.answer_jobs([self.receive(request).prepare() for request in requests])

    def receive(self, request: RankColumns) -> "ReceivedRequest":
        """Choose the version that answers; nothing is looked up yet."""
        role = self.choose_role(request)
        return ReceivedRequest(self, role, request, self.rankers[role].find_refusal(request))

    def answer_jobs(self, jobs: Sequence["RankJob"]) -> list[RankedColumns | Refusal]:
        """Answers to jobs of this rollout; those of one version are scored together."""
        answers: dict[int, Any] = {}
        places: dict[str, list[int]] = {CHAMPION: [], CANARY: []}
        for i, job in enumerate(jobs):
            if isinstance(job.work, PreparedRequest):
                places[job.role].append(i)
            else:
                answers[i] = job.work

        for role, mine in places.items():
            if mine:
                scored = self._score_timed(role, [jobs[i] for i in mine])
                answers.update(zip(mine, scored, strict=True))

        in_order = [answers[i] for i in range(len(jobs))]
        if SHADOW in self.rankers:
            self._copy_to_shadow(jobs, in_order)
        return [_finished(job, answer) for job, answer in zip(jobs, in_order, strict=True)]

    def append_events(self, requests: Sequence[EventsRequest]) -> list[EventsResponse | Refusal]:
        """Keep events of users; the champion knows which actions and columns there are."""
        history = self.champion.store
        assert isinstance(history, LiveHistory), "a server's history takes events"
        return history.append_all(requests)

    def close(self, successor: "Rollout | None" = None) -> None:
        """Let the shadow's thread end, and give back the memory of versions that `successor` does
        not have.
        """
        kept = [] if successor is None else list(successor.rankers.values())
        for ranker in self.rankers.values():
            if ranker not in kept:
                ranker.caches.close()

        if SHADOW not in self.rankers:
            return

        # one copy makes room for the end, which comes after all that wait; passes of the old
        # versions may still add some
        while True:
            try:
                self._copies.put_nowait(None)
                return
            except queue.Full:
                with suppress(queue.Empty):
                    self._copies.get_nowait()

    def _score_timed(self, role: str, jobs: Sequence["RankJob"]) -> list[RankedColumns]:
        """Score jobs that were not refused, and count what it took."""
        ranker, metrics = self.rankers[role], self.metrics
        prepared: list[PreparedRequest] = []
        took_s = 0.0
        for job in jobs:
            assert isinstance(job.work, PreparedRequest), "refusals are answered already"
            prepared.append(job.work)
            took_s += job.prepared_s

        started = time.perf_counter()
        ranked = ranker.score_requests(prepared)
        ended = time.perf_counter()
        took_s += ended - started

        labels = (str(ranker.version), role)
        metrics.seconds.labels(*labels).observe(took_s)
        metrics.requests.labels(*labels).inc(len(ranked))
        candidates = metrics.candidates.labels(*labels)
        unknown_items = metrics.unknown_items.labels(*labels)
        for one in ranked:
            candidates.inc(len(one.item_id))
            unknown_items.inc(one.unknown_items)
            if not one.live_events:
                metrics.without_live_events.labels(*labels).inc()

        digest = ranker.store.digest
        return [
            replace(one, ranker_ms=took_s * 1000, scored_s=ended, role=role, sequences=digest)
            for one in ranked
        ]

    # The shadow --------------------------------------------------------------

    def _copy_to_shadow(
        self, jobs: Sequence["RankJob"], answers: Sequence[RankedColumns | Refusal]
    ) -> None:
        copies: Copies = []
        for job, answer in zip(jobs, answers, strict=True):
            if isinstance(answer, RankedColumns):
                copies.append((job.request, answer))

        try:
            self._copies.put_nowait(copies)
        except queue.Full:  # an answer never waits for the shadow
            self.metrics.shadow.dropped.inc(len(copies))

    def _follow_champion(self) -> None:
        while (copies := self._copies.get()) is not None:
            try:
                self._compare(copies)
            except Exception:  # whatever a version on trial does, users do not see it
                logger.exception("shadow version %s failed", self.rankers[SHADOW].version)
                self.metrics.shadow.failed.inc(len(copies))

    def _compare(self, copies: Copies) -> None:
        """Rank copies with the shadow, and count how far its scores are from those that were
        sent; those that are no numbers are failures.
        """
        shadow = self.rankers[SHADOW]
        jobs: list[RankJob] = []
        sent: list[RankedColumns] = []
        for request, answer in copies:
            if shadow.find_refusal(request) is None:
                prepared = shadow.prepare_request(request)
                jobs.append(RankJob(self, SHADOW, request, prepared, 0.0))
                sent.append(answer)

        self.metrics.shadow.failed.inc(len(copies) - len(jobs))
        if not jobs:
            return

        version = str(shadow.version)
        for ours, theirs in zip(sent, self._score_timed(SHADOW, jobs), strict=True):
            change = _largest_change(ours, theirs)
            if math.isnan(change):  # a histogram counts none, and its sum would be undefined
                self.metrics.shadow.failed.inc()
                continue
            same_best = ours.order[0] == theirs.order[0]
            self.metrics.shadow.change.labels(version).observe(change)
            self.metrics.shadow.same_best.labels(version).inc(same_best)


def _largest_change(one: RankedColumns, other: RankedColumns) -> float:
    """The largest difference of a score over all candidates and the tasks that both have; NaN where
    a score is.
    """
    changes = []
    for task, scores in one.scores.items():
        if task in other.scores:
            changes.append(np.abs(np.subtract(scores, other.scores[task])).max())
    return float(np.max(changes, initial=0.0))


@dataclass(slots=True)
class ReceivedRequest:
    """A request of a rollout on its way to a `RankJob`: its history is found, then prepared.

    It stays with the versions that it came to.
    """

    rollout: Rollout
    role: str
    request: RankColumns
    refusal: Refusal | None
    found: FoundHistory | None = None
    # False: the store was left alone when the request came. By the time that it is prepared the
    # store may be asked again, but not by the thread that ranks.
    asks_store: bool = True

    @property
    def ranker(self) -> Ranker:
        return self.rollout.rankers[self.role]

    @property
    def is_long(self) -> bool:
        """True where encoding the history may take longer than other requests should wait.

        A GPU does one pass at a time, and of long histories quickly.
        """
        if self.refusal is not None or self.ranker.device.type != "cpu":
            return False
        return self._num_rows() > self.ranker.limits.long_history

    def _num_rows(self) -> int:
        """Rows of the history, those that are later than the request included."""
        head = self.request.head
        if head.history is not None:
            return len(head.history)
        if self.found is not None:
            sequence = self.found.sequence
        else:  # the event store is not asked
            assert head.user_id is not None, "the schema asks for user_id or history"
            sequence = self.ranker.published_row(head.user_id)
        return 0 if sequence is None else sequence["item_id"].value_lengths()[0].as_py()

    def must_look_up(self) -> bool:
        """Tell whether `look_up` may have to wait for the event store."""
        return self.refusal is None and self.ranker.must_look_up(self.request.head)

    def look_up(self) -> FoundHistory:
        """The request's history, from the event store too; runs beside the ranking thread."""
        return self.ranker.find_history(self.request.head)

    def give_up(self, asked: float) -> FoundHistory:
        """The published history, since the store has not answered `look_up`, begun at `asked`."""
        limit = self.ranker.limits.lookup_timeout_s
        self.ranker.outage.begin(asked, StoreDown(f"no answer within {limit:g} s"))
        assert self.request.user_id is not None, "only a user's history is looked up"
        return self.ranker.find_published(self.request.user_id)

    def prepare(self) -> "RankJob":
        """The job, with everything that its scores depend on."""
        if self.refusal is not None:
            return RankJob(self.rollout, self.role, self.request, self.refusal, 0.0)

        started = time.perf_counter()
        if self.found is None:
            head = self.request.head
            self.found = self.ranker.find_history(head, ask_store=self.asks_store)
        prepared = self.ranker.prepare_request(self.request, self.found)
        took_s = time.perf_counter() - started
        return RankJob(self.rollout, self.role, self.request, prepared, took_s, self._choose_best())

    def _choose_best(self) -> Callable[[RankedColumns], RankedColumns] | None:
        """What `top_k` makes of an answer."""
        num = self.request.head.top_k
        if num is None:
            return None
        return lambda ranked: ranked.best(num)


@dataclass(frozen=True, slots=True)
class RankJob:
    """A request of a rollout, ready to be scored or refused already.

    A job stays with the versions that it came to. `work` that is not a `PreparedRequest` is the
    answer already; `finish` makes the answer of what was ranked, where that is not it.
    """

    rollout: Rollout
    role: str
    request: RankColumns
    work: PreparedRequest | Refusal | RecommendedList
    prepared_s: float
    finish: Callable[[RankedColumns], RecommendedList | RankedColumns] | None = None

    @property
    def history_length_class(self) -> int:
        """The ranker's class of the request; 0 for an answer that is there, which costs nothing."""
        if not isinstance(self.work, PreparedRequest):
            return 0
        return self.rollout.rankers[self.role].history_length_class(self.work)

    def may_join(self, oldest: "RankJob") -> bool:
        """Tell whether this job may share a forward pass with `oldest`.

        It may if both go to one version, and this job's history is encoded already or of like
        length. Such a job adds little to the pass, and would wait longer for the next one.
        """
        if self.rollout is not oldest.rollout or self.role != oldest.role:
            return False

        mine = self.history_length_class
        return mine == 0 or mine == oldest.history_length_class

    @property
    def num_tokens(self) -> int:
        return self.work.num_tokens if isinstance(self.work, PreparedRequest) else 0


def _finished(job: RankJob, answer: Any) -> Any:
    """The answer that is sent."""
    if job.finish is None or not isinstance(answer, RankedColumns):
        return answer
    return job.finish(answer)


# Loading ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shared:
    """What the versions of a process have in common, and an update hands on: the connections of one
    event log, and the memory for encoded histories.
    """

    settings: str  # that they were made with
    log: EventLog
    budget: CacheBudget


def read_limits(plain: dict[str, Any]) -> ServeConfig:
    """The section `serve` from plain values; what it says of the logs was checked before."""
    return build_section(ServeConfig, plain, "serve")


def load_rollout(
    user_config: dict[str, Any], metrics: ReplicaMetrics, earlier: Rollout | None = None
) -> Rollout:
    """The rollout that `deployment.user_config` describes, each version after its first forward
    pass.

    A version that `earlier` holds already, over the same sequences and limits, is kept with what it
    has cached: a new share for a canary, or a canary that becomes champion, loads nothing.
    """
    limits = read_limits(user_config["limits"])
    models = {
        CHAMPION: user_config["model"],
        CANARY: user_config["canary"],
        SHADOW: user_config["shadow"],
    }

    known: dict[str, Ranker] = {}
    if earlier is not None:
        for role, ranker in earlier.rankers.items():
            known[earlier.identities[role]] = ranker

    shared = _find_shared(limits, Path(user_config["serving"]), earlier)
    rankers: dict[str, Ranker] = {}
    identities: dict[str, str] = {}
    for role, raw in models.items():
        if raw is None:
            continue

        identity = _identity(raw, user_config)
        if identity not in known:
            known[identity] = _load_ranker(PinnedModel(**raw), user_config, limits, shared)
        rankers[role] = known[identity]
        identities[role] = identity

    share = 0.0 if limits.canary is None else limits.canary.share
    return Rollout(rankers, identities, share, metrics, shared)


def _find_shared(limits: ServeConfig, folder: Path, earlier: Rollout | None) -> Shared:
    """What `earlier` hands on, or new where the settings have changed."""
    names = (limits.redis_url, limits.redis_prefix, limits.redis_password_file, limits.cache_mb)
    passes = (limits.use_gpu, limits.cuda_graphs)  # where encoded histories lie, and how
    settings = json.dumps([*names, *passes, str(folder)])
    before = None if earlier is None else earlier.shared
    if before is not None and before.settings == settings:
        return before
    # a replica that starts anew in an outage of the store ranks like those that were there before;
    # new settings are an update, which is refused where they do not work
    log = open_events(limits, folder, may_be_down=earlier is None)
    budget = CacheBudget.of_mb(limits.cache_mb, for_rooms=limits.cuda_graphs)
    return Shared(settings, log, budget)


def _identity(model: dict[str, Any], user_config: dict[str, Any]) -> str:
    """Everything that a loaded version depends on: its files, the sequences, the limits.

    Roles are not part of it.
    """
    limits = user_config["limits"] | {"canary": None, "shadow": None}
    return json.dumps([model | {"uri": None}, user_config["digest"], limits], sort_keys=True)


def _load_ranker(
    model: PinnedModel, user_config: dict[str, Any], limits: ServeConfig, shared: Shared
) -> Ranker:
    folder = fetch_model(model, Path(user_config["cache"]))
    loaded, index = load_indexed(folder, "cuda" if limits.use_gpu else "cpu")

    published = PublishedSequences(
        Path(user_config["sequences"]),
        loaded.cfg.source,
        loaded.cfg.features,
        Path(user_config["serving"]),
    )
    if published.digest != user_config["digest"]:
        logger.warning(
            "the sequences at %s were published anew since the server was deployed, and its other "
            "replicas may still read those from before: jobs.deploy gives these to all",
            user_config["sequences"],
        )
    loaded.maps.refuse_other_ids(published.columns, user_config["sequences"])
    history = LiveHistory(
        published, shared.log, loaded.cfg.sequences, limits.max_events, limits.max_user_events
    )

    ranker = Ranker(loaded, history, model.version, model.name, limits, index, shared.budget)
    if not shared.log.is_checked:
        ranker.outage.begin(time.monotonic(), StoreDown("it did not at the start"))
    ranker.warm_up()
    logger.info("%s version %d ready: %s", model.name, model.version, _describe_passes(ranker))
    return ranker


def _describe_passes(ranker: Ranker) -> str:
    """Device, kernels and number formats of the ranker's passes, for the log."""
    model, limits, device = ranker.cfg.model, ranker.limits, ranker.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    kernels = choose_backend(model.attention_backend, next(ranker.model.parameters()))

    formats = limits.precision
    fp8 = model.fp8 if limits.fp8 is None else limits.fp8
    if fp8:
        formats += " with FP8"
    if limits.int4_tables:
        formats += ", INT4 tables"
    return f"{name}, {kernels} kernels, {formats}"


def open_events(limits: ServeConfig, folder: Path, *, may_be_down: bool = False) -> EventLog:
    """The event log that the configuration names: Redis, or one file in `folder`.

    With `may_be_down` a Redis that does not answer is no mistake: it is asked again later.

    Raises:
        UserError: Redis is named, but its package is not installed; or the file is no database.
    """
    if limits.redis_url is None:
        path = folder / "events.sqlite"
        try:
            return SqliteEvents(path)
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"the event store {path} cannot be read: {error}; restore it, or move it away to "
                "start an empty one"
            ) from None

    try:
        from serve_app.history.redis_events import RedisEvents
    except ModuleNotFoundError:
        raise UserError(
            "serve.redis_url: the package redis is not installed: pip install '.[redis]'"
        ) from None

    password_file = None
    if limits.redis_password_file is not None:
        password_file = Path(limits.redis_password_file)
    return RedisEvents(
        limits.redis_url, limits.redis_prefix, password_file, may_be_down=may_be_down
    )
