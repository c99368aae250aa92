"""What Prometheus reads at `/metrics`: the ingress counts requests, each replica what its models
do.

A replica hands its numbers over as exposition text; `page` puts the replicas' texts under the
ingress' own, with a label that says whose they are. Ray's own metrics of queues and processes are
on Ray's port, see docs/runbook.md.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from serve_app.schemas import EventsResponse

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SCORE_CHANGES = (1e-6, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0)


class IngressMetrics:
    """Requests as clients see them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ranking_requests",
            "Answers by route, HTTP status (0: the client went away) and the model version that "
            "they name",
            ("path", "status", "version"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "ranking_request_seconds",
            "From the first byte of a request to the last of its answer",
            ("path",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "ranking_requests_in_flight", "Requests being answered", registry=self.registry
        )
        self.refused = Counter(
            "ranking_refused",
            "Answers 401 and 429 by their reason",
            ("reason",),
            registry=self.registry,
        )
        self.events = Counter(
            "ranking_events",
            "Events posted, by what became of them",
            ("status",),
            registry=self.registry,
        )
        for reason in ("key", "rate_limit", "overload"):
            # a series exists from the start, so that its first increase is seen
            self.refused.labels(reason)

    def count_events(self, answer: EventsResponse) -> None:
        for status in ("accepted", "already_there", "conflict"):
            self.events.labels(status).inc(getattr(answer, status))


class ReplicaMetrics:
    """What the models of one replica do, by version and by role: champion, canary, shadow."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        names = ("version", "role")
        self.requests = Counter(
            "ranking_ranker_requests", "Requests ranked", names, registry=self.registry
        )
        self.candidates = Counter(
            "ranking_ranker_candidates", "Candidates scored", names, registry=self.registry
        )
        self.unknown_items = Counter(
            "ranking_ranker_unknown_items",
            "Candidates never seen in training",
            names,
            registry=self.registry,
        )
        self.seconds = Histogram(
            "ranking_ranker_seconds",
            "One pass over requests together",
            names,
            buckets=SECONDS,
            registry=self.registry,
        )
        self.shadow_change = Histogram(
            "ranking_shadow_score_change",
            "By request, the largest difference of a score between the shadow version and the one "
            "that answered",
            ("version",),
            buckets=SCORE_CHANGES,
            registry=self.registry,
        )
        self.shadow_same_best = Counter(
            "ranking_shadow_same_best",
            "Requests of which both versions put the same candidate first",
            ("version",),
            registry=self.registry,
        )
        self.shadow_dropped = Counter(
            "ranking_shadow_dropped",
            "Copies not ranked: the shadow version was behind",
            registry=self.registry,
        )
        self.shadow_failed = Counter(
            "ranking_shadow_failed",
            "Copies that the shadow version refused or failed on",
            registry=self.registry,
        )
        self.loaded = Versions()
        self.registry.register(self.loaded)


class Versions:
    """A collector of what is loaded now: versions by role, and each one's cache of encoded
    histories.
    """

    # counters; the rest are gauges
    CACHE = ("history_cache_hits", "history_cache_misses", "history_cache_evictions")

    def __init__(self) -> None:
        self.roles: dict[str, Any] = {}  # role -> Ranker

    def collect(self) -> Iterator[Metric]:
        loaded = GaugeMetricFamily(
            "ranking_model", "1 for each version that is loaded", labels=("version", "role")
        )
        families: dict[str, Metric] = {}
        for role, ranker in list(self.roles.items()):
            labels = (str(ranker.version), role)
            loaded.add_metric(labels, 1)
            for name, value in ranker.stats().items():
                family = CounterMetricFamily if name in self.CACHE else GaugeMetricFamily
                text = name.replace("_", " ").capitalize()
                found = families.setdefault(
                    name, family(f"ranking_{name}", text, labels=("version", "role"))
                )
                found.add_metric(labels, value)  # pyright: ignore[reportAttributeAccessIssue]
        yield loaded
        yield from families.values()


def exposition(registry: CollectorRegistry) -> bytes:
    return generate_latest(registry)


def page(own: CollectorRegistry, replicas: Mapping[str, bytes]) -> bytes:
    """The text that Prometheus reads: `own`, and what the `replicas` sent, each sample labelled
    with its replica.
    """
    families: dict[str, Metric] = {}
    for replica, text in sorted(replicas.items()):
        for family in text_string_to_metric_families(text.decode()):
            merged = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                merged.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
    merged_registry = CollectorRegistry()
    merged_registry.register(_Collected(list(families.values())))
    return generate_latest(own) + generate_latest(merged_registry)


class _Collected:
    def __init__(self, families: list[Metric]) -> None:
        self.families = families

    def collect(self) -> list[Metric]:
        return self.families
