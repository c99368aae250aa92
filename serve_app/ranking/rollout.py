"""The model versions of one replica and which of them answers whom, without Ray.

    the champion answers everybody but the canary's users
    a canary     answers a share of the users, the same ones each time
    a shadow     answers nobody: it ranks copies afterwards, and its scores are compared with those
    that were sent

All of them lie in one process, so a change of roles is one assignment and needs no other replicas;
what it costs is the memory of each version, and the shadow's share of the processor.
"""

import hashlib
import json
import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernels.backend import choose
from pipeline import config
from pipeline.config import ServeConfig, UserError
from pipeline.model.artifact import load_model
from pipeline.tracking import registry
from serve_app.columns import RankColumns, RankedColumns
from serve_app.history.live import EventLog, LiveHistory, SqliteEvents
from serve_app.history.published import PublishedSequences
from serve_app.metrics import ReplicaMetrics
from serve_app.ranking.ranker import PreparedRequest, Ranker
from serve_app.schemas import EventsRequest, EventsResponse, ModelInfo, Refusal

logger = logging.getLogger("ray.serve")

CHAMPION, CANARY, SHADOW = "champion", "canary", "shadow"
# batches that may wait for the shadow; beyond them copies are dropped and counted
SHADOW_QUEUE = 64


def in_share(user_id: int, version: int, share: float) -> bool:
    """Whether a canary of this version answers this user.

    A larger share keeps the users of a smaller one.
    """
    digest = hashlib.blake2b(f"{version}/{user_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


class Rollout:
    """Versions by role, and what they answer. The champion's history is where posted events go."""

    def __init__(
        self,
        rankers: dict[str, Ranker],
        identities: dict[str, str],
        share: float,
        metrics: ReplicaMetrics,
    ) -> None:
        self.rankers = rankers
        self.identities = identities
        self.share = share
        self.metrics = metrics
        self.champion = rankers[CHAMPION]
        self._copies: queue.Queue[list[tuple[RankColumns, RankedColumns]] | None] = queue.Queue(
            SHADOW_QUEUE
        )
        if SHADOW in rankers:
            threading.Thread(target=self._follow, name="shadow", daemon=True).start()

    def info(self) -> ModelInfo:
        canary, shadow = self.rankers.get(CANARY), self.rankers.get(SHADOW)
        roles = {
            "canary_version": canary and canary.version,
            "canary_share": self.share if canary else None,
            "shadow_version": shadow and shadow.version,
        }
        return self.champion.info().model_copy(update=roles)

    def role(self, request: RankColumns) -> str:
        """Who answers. A request that names no user, but brings a history, is the champion's."""
        canary = self.rankers.get(CANARY)
        if canary is None or request.user_id is None:
            return CHAMPION
        return CANARY if in_share(request.user_id, canary.version, self.share) else CHAMPION

    def rank(self, requests: Sequence[RankColumns]) -> list[RankedColumns | Refusal]:
        """An answer or a refusal for each."""
        return self.answer([self.prepare(request) for request in requests])

    def prepare(self, request: RankColumns) -> "RankJob":
        """Who answers the request, and with what before them."""
        started = time.perf_counter()
        role = self.role(request)
        ranker = self.rankers[role]
        refusal = ranker.refusal(request)
        if refusal is not None:
            return RankJob(self, role, request, refusal, 0.0)
        prepared = ranker.prepare(request)
        return RankJob(self, role, request, prepared, time.perf_counter() - started)

    def answer(self, jobs: Sequence["RankJob"]) -> list[RankedColumns | Refusal]:
        """The answers to jobs of this rollout; those of one version are scored together."""
        answers: list[RankedColumns | Refusal | None] = [job.refusal for job in jobs]
        for role in (CHAMPION, CANARY):
            mine = [
                (i, job)
                for i, job in enumerate(jobs)
                if job.role == role and isinstance(job.work, PreparedRequest)
            ]
            if mine:
                scored = self._timed(role, [job for _, job in mine])
                for (i, _), response in zip(mine, scored, strict=True):
                    answers[i] = response
        given = [answer for answer in answers if answer is not None]
        if SHADOW in self.rankers:
            pairs = zip(jobs, given, strict=True)
            self._copy(
                [
                    (job.request, answer)
                    for job, answer in pairs
                    if isinstance(answer, RankedColumns)
                ]
            )
        return given

    def append(self, requests: Sequence[EventsRequest]) -> list[EventsResponse | Refusal]:
        """Keep what users did; what may be said of it is the champion's to know."""
        history = self.champion.store
        assert isinstance(history, LiveHistory), "a server's history takes events"
        return history.append_all(requests)

    def close(self) -> None:
        """Let the shadow's thread end: another rollout has taken over."""
        if SHADOW in self.rankers:
            try:
                self._copies.put_nowait(None)
            except queue.Full:  # it sees the end after what waits
                self._copies.get_nowait()
                self._copies.put_nowait(None)

    def _timed(self, role: str, jobs: list["RankJob"]) -> list[RankedColumns]:
        ranker, metrics = self.rankers[role], self.metrics
        started = time.perf_counter()
        responses = ranker.score(
            [job.work for job in jobs if isinstance(job.work, PreparedRequest)]
        )
        took_s = time.perf_counter() - started + sum(job.prepared_s for job in jobs)
        labels = (str(ranker.version), role)
        metrics.seconds.labels(*labels).observe(took_s)
        metrics.requests.labels(*labels).inc(len(responses))
        metrics.candidates.labels(*labels).inc(sum(len(response.item_id) for response in responses))
        metrics.unknown_items.labels(*labels).inc(
            sum(response.unknown_items for response in responses)
        )
        return [replace(response, ranker_ms=took_s * 1000) for response in responses]

    # The shadow --------------------------------------------------------------

    def _copy(self, answered: list[tuple[RankColumns, RankedColumns]]) -> None:
        try:
            self._copies.put_nowait(answered)
        except queue.Full:  # an answer never waits for the shadow
            self.metrics.shadow_dropped.inc(len(answered))

    def _follow(self) -> None:
        while (answered := self._copies.get()) is not None:
            try:
                self._compare(answered)
            except Exception:  # whatever a version on trial does, users do not see it
                logger.exception("shadow version %s failed", self.rankers[SHADOW].version)
                self.metrics.shadow_failed.inc(len(answered))

    def _compare(self, answered: list[tuple[RankColumns, RankedColumns]]) -> None:
        shadow = self.rankers[SHADOW]
        ranked = [
            (request, given) for request, given in answered if shadow.refusal(request) is None
        ]
        self.metrics.shadow_failed.inc(len(answered) - len(ranked))
        if not ranked:
            return
        version = str(shadow.version)
        jobs = [
            RankJob(self, SHADOW, request, shadow.prepare(request), 0.0) for request, _ in ranked
        ]
        responses = self._timed(SHADOW, jobs)
        for (_, given), other in zip(ranked, responses, strict=True):
            shared = [task for task in given.scores if task in other.scores]
            changes = [
                np.abs(np.subtract(given.scores[task], other.scores[task])).max() for task in shared
            ]
            self.metrics.shadow_change.labels(version).observe(max(changes, default=0.0))
            self.metrics.shadow_same_best.labels(version).inc(given.order[0] == other.order[0])


@dataclass(frozen=True, slots=True)
class RankJob:
    """A request of a rollout, ready to be scored or refused already.

    A job stays with the versions that it came to.
    """

    rollout: Rollout
    role: str
    request: RankColumns
    work: PreparedRequest | Refusal
    prepared_s: float

    @property
    def refusal(self) -> Refusal | None:
        return self.work if isinstance(self.work, Refusal) else None

    @property
    def likeness(self) -> int:
        return (
            self.rollout.rankers[self.role].likeness(self.work)
            if isinstance(self.work, PreparedRequest)
            else 0
        )

    def joins(self, oldest: "RankJob") -> bool:
        """Of one version, and a history of like length, or one that is encoded already: it has
        waited for this pass
        and would wait longer for the next, while the pass takes little longer for it."""
        if self.rollout is not oldest.rollout or self.role != oldest.role:
            return False
        likeness = self.likeness
        return likeness == 0 or likeness == oldest.likeness

    @property
    def num_tokens(self) -> int:
        return self.work.num_tokens if isinstance(self.work, PreparedRequest) else 0


# Loading ---------------------------------------------------------------------


def load(
    user_config: dict[str, Any], metrics: ReplicaMetrics, earlier: Rollout | None = None
) -> Rollout:
    """The rollout that `deployment.user_config` describes, each version after its first forward
    pass.

    A version that `earlier` holds already, over the same sequences and limits, is kept with what it
    has cached: a new share for a canary, or a canary that becomes champion, loads nothing.
    """
    limits = config.from_dict({"serve": user_config["limits"]}).serve
    models = {
        CHAMPION: user_config["model"],
        CANARY: user_config["canary"],
        SHADOW: user_config["shadow"],
    }
    known = (
        {}
        if earlier is None
        else {earlier.identities[role]: earlier.rankers[role] for role in earlier.rankers}
    )
    rankers, identities = {}, {}
    log: EventLog | None = None
    for role, raw in models.items():
        if raw is None:
            continue
        identity = identities[role] = _identity(raw, user_config)
        if identity not in known:
            log = log or open_events(limits, Path(user_config["serving"]))
            known[identity] = _load(registry.PinnedModel(**raw), user_config, limits, log)
        rankers[role] = known[identity]
    return Rollout(
        rankers, identities, 0.0 if limits.canary is None else limits.canary.share, metrics
    )


def _identity(model: dict[str, Any], user_config: dict[str, Any]) -> str:
    """All that a loaded version depends on: its files, the sequences, the limits; not who answers
    whom.
    """
    limits = user_config["limits"] | {"canary": None, "shadow": None}
    return json.dumps([model | {"uri": None}, user_config["digest"], limits], sort_keys=True)


def _load(
    model: registry.PinnedModel, user_config: dict[str, Any], limits: ServeConfig, log: EventLog
) -> Ranker:
    folder = registry.fetch(model, Path(user_config["cache"]))
    loaded = load_model(folder, "cuda" if limits.use_gpu else "cpu")
    published = PublishedSequences(
        Path(user_config["sequences"]), loaded.cfg, Path(user_config["serving"])
    )
    history = LiveHistory(published, log, loaded.cfg, limits.max_events)
    ranker = Ranker(loaded, history, model.version, model.name, limits)
    ranker.warm()
    logger.info("%s version %d ready: %s", model.name, model.version, _what_runs(ranker))
    return ranker


def _what_runs(ranker: Ranker) -> str:
    """Where the ranker's passes run, by which kernels and in which number formats."""
    model, limits, device = ranker.cfg.model, ranker.limits, ranker.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    kernels = choose(model.attention_backend, next(ranker.model.parameters()))
    fp8 = model.fp8 if limits.fp8 is None else limits.fp8
    return (
        f"{where}, {kernels} kernels, "
        f"{limits.precision}{' with FP8' * fp8}{', INT4 tables' * limits.int4_tables}"
    )


def open_events(limits: ServeConfig, folder: Path) -> EventLog:
    """The event log that the configuration names: Redis, or one file in `folder`."""
    if limits.redis_url is None:
        return SqliteEvents(folder / "events.sqlite")
    try:
        from serve_app.history.redis_events import RedisEvents
    except ModuleNotFoundError:
        raise UserError(
            "serve.redis_url: the package redis is not installed: pip install '.[redis]'"
        ) from None
    password = limits.redis_password_file
    return RedisEvents(
        limits.redis_url, limits.redis_prefix, None if password is None else Path(password)
    )
