"""The server: its replicas, limits, keys, trials of other versions, and where events are kept."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from pipeline.config.errors import refuse_secrets, require
from pipeline.config.setting import check_ranges, describe, setting

PICTURE_HOST = re.compile(r"https?://[a-z0-9.-]+(:\d+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class CanaryConfig:
    """A registered version that answers some of the users in the champion's place."""

    version: int = field(
        metadata=describe(
            "Number of the registered version.", at_least=1, rule="a registered version, 1 or more"
        )
    )
    share: float = setting(
        0.05, above=0, below=1, doc="Share of the users that it answers, the same ones each time."
    )

    def __post_init__(self) -> None:
        check_ranges(self, "serve.canary")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExposureConfig:
    """How `jobs.export_events` makes exposures of what was served."""

    places: int = field(
        metadata=describe(
            "Best places of an answer that its user was shown; more are no exposures.",
            at_least=1,
        )
    )
    wait_h: float = setting(
        24.0,
        at_least=0,
        below=math.inf,
        doc="Hours until an action that nobody posted did not happen; before, it is unknown.",
    )
    actions: tuple[str, ...] | None = setting(
        None, doc="Actions that clients post; others stay unknown. Null: all of source.actions."
    )
    max_age_s: float = setting(
        3600.0,
        above=0,
        doc="Longest time, in seconds, between the time that a request asks for and its answer. "
        "Beyond it somebody asked about another time, and nobody was shown anything.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, "serve.exposures")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """The ranking server."""

    host: str = setting("127.0.0.1", doc="Address that the server listens on.")
    port: int = setting(
        8000,
        at_least=0,
        below=65536,
        rule="a port number, or 0 for any free one",
        doc="Port that the server listens on; 0: any free one.",
    )
    num_replicas: int = setting(1, at_least=1, doc="Number of processes that rank.")
    max_replicas: int | None = setting(
        None,
        at_least=1,
        doc="Processes that rank under load; Serve starts and ends them between num_replicas and "
        "this. Null: num_replicas at all times.",
    )
    num_ingress: int = setting(
        2,
        at_least=1,
        doc="Number of processes that take requests over HTTP; with two, one may die and requests "
        "go on.",
    )
    max_ingress: int | None = setting(
        None,
        at_least=1,
        doc="Such processes under load, as max_replicas. Null: num_ingress at all times.",
    )
    one_process: bool = setting(
        False,
        doc="The ingress ranks itself, which saves a call between processes. For one replica "
        "without a GPU.",
    )
    use_gpu: bool = setting(False, doc="Each replica has one GPU.")
    cuda_graphs: bool = setting(
        False,
        doc="Replay passes of few users as CUDA graphs. It takes memory for up to seven times "
        "the longest history.",
    )
    precision: Literal["fp32", "bf16"] = setting(
        "fp32", doc="Number format of the layers and of the encoded histories that are kept."
    )
    fp8: bool | None = setting(
        None, doc="As model.fp8, for serving alone. Null: as the model was trained."
    )
    int4_tables: bool = setting(
        False,
        doc="Pack embedding tables to four bits a number; evaluate.int4_tables shows what that "
        "costs in quality.",
    )
    max_candidates: int = setting(10_000, at_least=1, doc="Most candidates of a request.")
    max_explain_tokens: int = setting(
        32_768,
        at_least=0,
        doc="History rows and candidates that explaining one answer may rank again; where all rows "
        "of a history would be more, the newest are tried.",
    )
    max_rank_users: int = setting(
        100, at_least=1, doc="Most users of one request that ranks for several."
    )
    max_recommended: int = setting(
        500, at_least=1, doc="Most items of a recommended list; the n of a request."
    )
    max_recommend_users: int = setting(
        100, at_least=1, doc="Most users of one request for recommended lists."
    )
    retrieved_candidates: int = setting(
        500,
        at_least=1,
        doc="Items that are retrieved for a recommended list and then ranked, of all sources.",
    )
    popular_candidates: int = setting(
        50, at_least=0, doc="Of these, what is popular; more where the model retrieves nothing."
    )
    followed_candidates: int = setting(
        50, at_least=0, doc="Of these, recent items of followed authors (index.followed)."
    )
    max_body_bytes: int = setting(2_000_000, at_least=1, doc="Longest body of a request, in bytes.")
    max_history: int = setting(
        16_384,
        at_least=1,
        doc="Most history rows that a request may bring; of a user_id the newest so many are read.",
    )
    long_history: int = setting(
        1024,
        at_least=0,
        doc="History rows beyond which a request is ranked in a second thread on a CPU, so that "
        "others do not wait for it.",
    )
    max_events: int = setting(1_000, at_least=1, doc="Most events of one POST /v1/events.")
    max_user_events: int = setting(
        10_000,
        at_least=1,
        doc="Most posted events of one user that are kept until jobs.export_events --prune; those "
        "beyond are answered over_quota.",
    )
    lookup_timeout_s: float = setting(
        2.0,
        above=0,
        below=math.inf,
        doc="Longest wait, in seconds, for a user's posted events; beyond it the request is ranked "
        "from the published rows.",
    )
    cache_mb: int = setting(
        1024,
        at_least=0,
        doc="Encoded histories that a replica keeps, of all its versions together, in MiB; 0: "
        "none. On a GPU all of it is taken with the first history.",
    )
    micro_batch: int = setting(
        1024, at_least=1, doc="Number of candidates that go through the layers together."
    )
    batch_tokens: int = setting(
        16_384,
        at_least=1,
        doc="History rows and candidates of one forward pass over several requests.",
    )
    api_keys_file: str | None = setting(
        None,
        doc="File with a line of sha256 and name for each API key. Null: whoever reaches the port "
        "may ask.",
    )
    allowed_hosts: tuple[str, ...] = setting(
        (),
        doc="Names beside localhost that requests may call a server on 127.0.0.1 without keys by; "
        "pages of other names are refused.",
    )
    client_key_file: str | None = setting(
        None,
        doc="File with one of those keys in the clear, for the requests that jobs.pipeline sends.",
    )
    rate_limit_per_s: float | None = setting(
        None,
        above=0,
        below=math.inf,
        doc="Most requests per second of one API key, or of all clients together without keys. "
        "Null: no limit.",
    )
    max_wait_ms: float = setting(
        500.0,
        above=0,
        below=math.inf,
        doc="Longest expected wait, in milliseconds, for the work that lies before a request; "
        "beyond it the answer is 429.",
    )
    request_timeout_s: float = setting(
        10.0,
        above=0,
        below=math.inf,
        doc="Longest time, in seconds, from the first byte of a request to its answer; beyond it "
        "the answer is 504.",
    )
    body_timeout_s: float = setting(
        2.0,
        above=0,
        below=math.inf,
        doc="Longest time, in seconds, until the body of a request is there; beyond it the answer "
        "is 408.",
    )
    start_timeout_s: float = setting(
        600.0,
        above=0,
        below=math.inf,
        doc="Longest wait, in seconds, until a started or updated server answers with its new "
        "version.",
    )
    trace_context: bool = setting(
        False,
        doc="Go on with the OpenTelemetry trace of a request's traceparent, or begin one: answers "
        "and log lines name it. Needs the extra otel.",
    )
    otlp_endpoint: str | None = setting(
        None,
        doc="Collector that a span for each request goes to, "
        "http://127.0.0.1:4318/v1/traces say. Null: spans are not kept.",
    )
    canary: CanaryConfig | None = setting(
        None, doc="Version that answers some of the users; null: none."
    )
    shadow: int | None = setting(
        None,
        at_least=1,
        rule="a registered version",
        doc="Registered version that ranks copies of the requests and answers none. Null: none.",
    )
    served_log: bool = setting(
        True, doc="Write what was served to rotating Parquet files, for export and verdict."
    )
    served_folder: str | None = setting(
        None, doc="Where those files lie: a folder or s3://…. Null: serving/served of the run."
    )
    served_share: float = setting(
        1.0, at_least=0, at_most=1, doc="Share of the answers that are written."
    )
    served_histories: bool = setting(
        False, doc="Write the answers to requests that bring a history of their own, too."
    )
    served_places: int = setting(
        100, at_least=1, doc="Best places of an answer that are written, a row each."
    )
    served_days: float = setting(
        30.0, above=0, doc="Days that a file is kept; of a bucket its own rules decide."
    )
    served_flush_s: float = setting(
        60.0, above=0, below=math.inf, doc="Longest time, in seconds, until an answer is in a file."
    )
    exposures: ExposureConfig | None = setting(
        None,
        doc="What jobs.export_events makes of the served log: rows of the logs. Null: nothing, it "
        "exports what was posted.",
    )
    redis_url: str | None = setting(
        None,
        doc="Redis that keeps the posted events, redis://host:6379/0. Null: a SQLite file of the "
        "run.",
    )
    redis_prefix: str = setting(
        "ranking", doc="Prefix of the keys in Redis; servers of one prefix share their events."
    )
    redis_password_file: str | None = setting(None, doc="File with the password of Redis.")
    page: Literal["auto", "on", "off"] = setting(
        "auto",
        doc="A page for people at /, which shows what users did. Auto: on a server without keys "
        "that listens on its own machine alone.",
    )
    page_users: int = setting(
        5,
        at_least=0,
        at_most=100,
        doc="Users of the published sequences that the page offers as examples; none where keys "
        "are required.",
    )
    page_title_column: str | None = setting(
        None,
        doc="Column of the item table with the titles that the page shows. Null: "
        "index.title_column of the version.",
    )
    page_picture_column: str | None = setting(
        None,
        doc="Column of the item table with the addresses of pictures that the page shows. Null: "
        "none.",
    )
    page_picture_hosts: tuple[str, ...] = setting(
        (), doc="Where the page may load these pictures from, https://img.example.com say."
    )
    demo_candidates: int = setting(
        50, at_least=1, doc="Number of candidates in the request that jobs.pipeline shows."
    )
    parity_requests: int = setting(
        200,
        at_least=1,
        doc="Number of test requests whose scores over HTTP jobs.pipeline compares with those of "
        "the model folder.",
    )
    parity_candidates: int = setting(
        20,
        at_least=1,
        doc="Candidates of such a request: its own rows, filled up with popular items.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, "serve")

        self._refuse_lists_beyond_candidates()
        self._refuse_graphs_without_gpu()
        self._refuse_one_process_of_many()
        self._refuse_spans_without_traces()
        self._refuse_empty_paths()
        self._refuse_unusable_redis()
        self._refuse_limits_that_disagree()
        self._refuse_pictures_from_anywhere()
        self._refuse_exposures_that_are_not_served()
        refuse_secrets("serve.served_folder", self.served_folder)

    def _refuse_lists_beyond_candidates(self) -> None:
        retrieved = self.retrieved_candidates
        limit = f"at most serve.retrieved_candidates ({retrieved})"
        possible = self.max_recommended <= retrieved
        require(possible, "serve.max_recommended", self.max_recommended, limit)

        parts = self.popular_candidates + self.followed_candidates
        name = "serve.popular_candidates + serve.followed_candidates"
        require(parts <= retrieved, name, parts, limit)

    def _refuse_graphs_without_gpu(self) -> None:
        possible = self.use_gpu or not self.cuda_graphs
        require(possible, "serve.cuda_graphs", self.cuda_graphs, "false without use_gpu")

    def _refuse_one_process_of_many(self) -> None:
        alone = self.num_replicas == 1 and self.max_replicas is None and not self.use_gpu
        rule = "false with replicas or a GPU"
        require(alone or not self.one_process, "serve.one_process", self.one_process, rule)

    def _refuse_spans_without_traces(self) -> None:
        if self.otlp_endpoint is None:
            return
        rule = "null without serve.trace_context"
        require(self.trace_context, "serve.otlp_endpoint", self.otlp_endpoint, rule)

        refuse_secrets("serve.otlp_endpoint", self.otlp_endpoint)
        url = urlsplit(self.otlp_endpoint)
        usable = url.scheme in ("http", "https") and url.hostname
        require(bool(usable), "serve.otlp_endpoint", self.otlp_endpoint, "an http or https URL")

    def _refuse_empty_paths(self) -> None:
        rule = "a name or an address"
        require(self.host != "" and " " not in self.host, "serve.host", self.host, rule)
        for name in ("api_keys_file", "client_key_file", "redis_password_file", "served_folder"):
            path = getattr(self, name)
            require(path != "", f"serve.{name}", path, "a path, or null")

    def _refuse_unusable_redis(self) -> None:
        if self.redis_url is not None:
            refuse_secrets("serve.redis_url", self.redis_url)
            url = urlsplit(self.redis_url)
            known = url.scheme in ("redis", "rediss", "unix")
            rule = "a URL such as redis://host:6379/0, or null"
            require(known, "serve.redis_url", self.redis_url, rule)

        rule = "a word without colons"
        require(":" not in self.redis_prefix, "serve.redis_prefix", self.redis_prefix, rule)

    def _refuse_limits_that_disagree(self) -> None:
        """What one limit allows, no other may make impossible."""
        for least, most in (("num_replicas", "max_replicas"), ("num_ingress", "max_ingress")):
            number, limit = getattr(self, least), getattr(self, most)
            enough = limit is None or limit >= number
            require(enough, f"serve.{most}", limit, f"serve.{least} {number} or more, or null")

        total = self.request_timeout_s
        rule = f"below serve.request_timeout_s {total:g}, which is for the whole request"
        for name in ("lookup_timeout_s", "body_timeout_s"):
            seconds = getattr(self, name)
            require(seconds < total, f"serve.{name}", seconds, rule)

    def _refuse_pictures_from_anywhere(self) -> None:
        # they become part of the page's Content-Security-Policy
        rule = "addresses such as https://img.example.com, without a path"
        for host in self.page_picture_hosts:
            is_host = PICTURE_HOST.fullmatch(host) is not None
            require(is_host, "serve.page_picture_hosts", host, rule)

        named = self.page_picture_column is None or len(self.page_picture_hosts) > 0
        rule = "the hosts of serve.page_picture_column"
        require(named, "serve.page_picture_hosts", list(self.page_picture_hosts), rule)

    def _refuse_exposures_that_are_not_served(self) -> None:
        """Exposures are read from the served log: all of them must be in it, for long enough."""
        if self.exposures is None:
            return
        why = "with serve.exposures, which reads the served log"
        require(self.served_log, "serve.served_log", self.served_log, f"true {why}")
        require(self.served_share == 1, "serve.served_share", self.served_share, f"1 {why}")

        places = self.exposures.places
        rule = f"serve.exposures.places ({places}) or more"
        require(self.served_places >= places, "serve.served_places", self.served_places, rule)

        days = self.exposures.wait_h / 24
        rule = f"above serve.exposures.wait_h ({days:g} days)"
        require(self.served_days > days, "serve.served_days", self.served_days, rule)
