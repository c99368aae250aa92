"""Metrics at `/metrics` for Prometheus: requests from the ingress, models' work from each replica.

Each process hands its numbers over as exposition text. `metrics_page` puts the texts together, each
sample labelled with its process. Ray's own metrics of queues and processes
are on Ray's port, see docs/operate/monitoring.md.
"""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from kernels.compilations import count_compilations
from serve_app.schemas import EventsResponse, EventStatus

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
            "Requests refused before any work, by reason: 401, 403, 421, 429 and 503",
            ("reason",),
            registry=self.registry,
        )

        self.events = Counter(
            "ranking_events",
            "Events posted, by what became of them",
            ("status",),
            registry=self.registry,
        )

        self.served = Counter(
            "ranking_served",
            "Answers for the log of what was served: written, or dropped since it was behind",
            ("status",),
            registry=self.registry,
        )

        # a series exists from the start, so that its first increase is seen
        for reason in ("key", "host", "server", "rate_limit", "overload", "unavailable"):
            self.refused.labels(reason)
        for status in ("written", "dropped"):
            self.served.labels(status)

    def count_events(self, answer: EventsResponse) -> None:
        """Add the events of one request by their status."""
        for status in get_args(EventStatus):
            self.events.labels(status).inc(getattr(answer, status))


class ListMetrics:
    """Recommended lists of one replica's models, by version and role."""

    def __init__(self, registry: CollectorRegistry) -> None:
        names = ("version", "role")

        self.seconds = Histogram(
            "ranking_recommend_seconds",
            "Work for a recommended list by its stage: history, encode, retrieve, features, rank, "
            "choose",
            (*names, "stage"),
            buckets=SECONDS,
            registry=registry,
        )

        self.items = Counter(
            "ranking_recommend_items",
            "Items of recommended lists, by the source that found them",
            (*names, "source"),
            registry=registry,
        )

        self.by_popularity = Counter(
            "ranking_recommend_popular_lists",
            "Recommended lists of users without history: what is popular",
            names,
            registry=registry,
        )

        self.empty = Counter(
            "ranking_recommend_empty_lists",
            "Recommended lists for which exclusions and filters left no item",
            names,
            registry=registry,
        )


class ShadowMetrics:
    """One replica's shadow beside the version that answered."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.change = Histogram(
            "ranking_shadow_score_change",
            "By request, the largest difference of a score between the shadow version and the one "
            "that answered",
            ("version",),
            buckets=SCORE_CHANGES,
            registry=registry,
        )

        self.same_best = Counter(
            "ranking_shadow_same_best",
            "Requests of which both versions put the same candidate first",
            ("version",),
            registry=registry,
        )

        self.dropped = Counter(
            "ranking_shadow_dropped",
            "Copies not ranked: the shadow version was behind",
            registry=registry,
        )

        self.failed = Counter(
            "ranking_shadow_failed",
            "Copies that the shadow version refused or failed on",
            registry=registry,
        )


class ReplicaMetrics:
    """Work of one replica's models, by version and by role: champion, canary, shadow."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        names = ("version", "role")

        # work done
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

        self.without_live_events = Counter(
            "ranking_ranker_without_live_events",
            "Requests ranked from published rows alone: the event store did not answer",
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

        self.lists = ListMetrics(self.registry)
        self.shadow = ShadowMetrics(self.registry)

        self.kernels_compiled = Gauge(
            "ranking_kernels_compiled",
            "Triton kernels compiled so far, on a GPU: stands still after the warm-up",
            registry=self.registry,
        )
        self.kernels_compiled.set_function(count_compilations)

        # what is loaded now
        self.loaded = LoadedVersions()
        self.registry.register(self.loaded)


class LoadedVersions:
    """A collector of what is loaded now: versions by role, each one's cache of encoded histories,
    and its index.
    """

    # counters; the rest are gauges
    COUNTERS = (
        "history_cache_hits",
        "history_cache_misses",
        "history_cache_appends",
        "history_cache_evictions",
    )
    LABELS = ("version", "role")

    def __init__(self) -> None:
        self.roles: dict[str, Any] = {}  # role -> Ranker

    def collect(self) -> Iterator[Metric]:
        """Prometheus' protocol: a family per figure, a sample per loaded version."""
        help_text = "1 for each version that is loaded"
        loaded = GaugeMetricFamily("ranking_model", help_text, labels=self.LABELS)
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}

        # a copy: a thread may swap the rollout meanwhile
        for role, ranker in list(self.roles.items()):
            labels = (str(ranker.version), role)
            loaded.add_metric(labels, 1)

            for name, value in {**ranker.cache_stats(), **ranker.index_stats()}.items():
                if name not in families:
                    families[name] = self._new_family(name)
                families[name].add_metric(labels, value)

        yield loaded
        yield from families.values()

    def _new_family(self, name: str) -> CounterMetricFamily | GaugeMetricFamily:
        kind = CounterMetricFamily if name in self.COUNTERS else GaugeMetricFamily
        help_text = name.replace("_", " ").capitalize()
        return kind(f"ranking_{name}", help_text, labels=self.LABELS)


def exposition_text(registry: CollectorRegistry) -> bytes:
    """All metrics of the registry, as Prometheus reads them."""
    return generate_latest(registry)


def metrics_page(ingresses: Mapping[str, bytes], replicas: Mapping[str, bytes]) -> bytes:
    """The page at `/metrics` from the texts of all processes: each sample has the label `ingress`
    or `replica` with the id of its process.
    """
    merged = [*_merge_texts(ingresses, "ingress"), *_merge_texts(replicas, "replica")]
    registry = CollectorRegistry()
    registry.register(_MergedFamilies(merged))
    return generate_latest(registry)


def _merge_texts(texts: Mapping[str, bytes], label: str) -> list[Metric]:
    """The families of all texts. Each comes once, as the format demands: its samples lie
    together.
    """
    families: dict[str, Metric] = {}

    for process, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text.decode()):
            if family.name not in families:
                families[family.name] = Metric(family.name, family.documentation, family.type)

            merged = families[family.name]
            for sample in family.samples:
                merged.add_sample(sample.name, {**sample.labels, label: process}, sample.value)
    return list(families.values())


class _MergedFamilies:
    """A collector of families that are there already."""

    def __init__(self, families: list[Metric]) -> None:
        self.families = families

    def collect(self) -> list[Metric]:
        return self.families
