"""Tracking, serving and the Ray cluster: what a run needs around the model."""

import math
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from pipeline.config.values import require


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    # None: start an MLflow server over runs_dir/mlflow on a free port for the job's time
    uri: str | None = None
    experiment: str = "ultra-hstu"
    model_name: str = "ultra_hstu"
    gate_max_ne: dict[str, float] = field(
        default_factory=dict
    )  # task -> the highest validation NE that may be promoted
    # by how much the mean validation NE may exceed the champion's
    gate_max_regression: float = 0.002


@dataclass(frozen=True, kw_only=True, slots=True)
class CanaryConfig:
    """A registered version that answers some of the users in the champion's place."""

    version: int
    share: float = 0.05  # of the users, the same ones each time

    def __post_init__(self) -> None:
        require(
            self.version >= 1,
            "serve.canary.version",
            self.version,
            "a registered version, 1 or more",
        )
        require(0 < self.share < 1, "serve.canary.share", self.share, "between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    num_replicas: int = 1
    # the ingress ranks itself: a call between processes fewer, for one replica without a GPU
    one_process: bool = False
    use_gpu: bool = False  # every replica takes one GPU
    # for requests that come alone; memory for up to twice the longest history
    cuda_graphs: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"  # of the layers, and of the histories that are kept
    fp8: bool | None = None  # as model.fp8, for serving alone; null: as the model was trained
    # embedding tables of four bits a number; evaluate.int4_tables says what that costs
    int4_tables: bool = False
    max_candidates: int = 10_000
    max_body_bytes: int = 2_000_000
    max_history: int = 16_384
    max_events: int = 1_000  # of one POST /v1/events
    cache_mb: int = 1024  # MiB of encoded histories that a replica keeps; 0: none
    micro_batch: int = 1024  # candidates that go through the layers together
    batch_tokens: int = 16_384  # history rows and candidates of one pass over several requests
    # lines of sha256 and name; None: whoever reaches the port may ask
    api_keys_file: str | None = None
    # one of those keys in the clear, for the requests that jobs.pipeline sends
    client_key_file: str | None = None
    # requests of one API key, or of all together without keys; None: no limit
    rate_limit_per_s: float | None = None
    max_wait_ms: float = 500.0  # of work that may lie before a request; beyond it 429
    request_timeout_s: float = 10.0  # from the first byte of a request to its answer; beyond it 504
    canary: CanaryConfig | None = None
    # a registered version that ranks copies of the requests and answers none
    shadow: int | None = None
    # where posted events are kept: redis://host:6379/0; None: a SQLite file of the run
    redis_url: str | None = None
    redis_prefix: str = "ranking"  # of its keys: servers of one prefix share their events
    redis_password_file: str | None = None
    demo_candidates: int = 50
    parity_requests: int = 200
    parity_candidates: int = 20  # a request's own rows filled up with popular items

    def __post_init__(self) -> None:
        require(
            0 <= self.port < 65536, "serve.port", self.port, "a port number, or 0 for any free one"
        )
        counts = (
            "num_replicas",
            "max_candidates",
            "max_body_bytes",
            "max_history",
            "max_events",
            "demo_candidates",
        )
        counts += ("micro_batch", "batch_tokens")
        for name in counts:
            require(getattr(self, name) >= 1, f"serve.{name}", getattr(self, name), "1 or more")
        require(
            self.use_gpu or not self.cuda_graphs,
            "serve.cuda_graphs",
            self.cuda_graphs,
            "false without use_gpu",
        )
        alone = self.num_replicas == 1 and not self.use_gpu
        require(
            alone or not self.one_process,
            "serve.one_process",
            self.one_process,
            "false with replicas or a GPU",
        )
        require(self.cache_mb >= 0, "serve.cache_mb", self.cache_mb, "0 or more")
        rate = self.rate_limit_per_s
        require(
            rate is None or 0 < rate < math.inf,
            "serve.rate_limit_per_s",
            rate,
            "greater than 0, or null",
        )
        for name in ("max_wait_ms", "request_timeout_s"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"serve.{name}", value, "greater than 0")
        require(
            self.shadow is None or self.shadow >= 1,
            "serve.shadow",
            self.shadow,
            "a registered version, or null",
        )
        for name in ("api_keys_file", "client_key_file", "redis_password_file"):
            require(
                getattr(self, name) != "", f"serve.{name}", getattr(self, name), "a path, or null"
            )
        if self.redis_url is not None:
            url = urlsplit(self.redis_url)
            known = url.scheme in ("redis", "rediss", "unix")
            require(
                known,
                "serve.redis_url",
                self.redis_url,
                "a URL such as redis://host:6379/0, or null",
            )
            # the configuration is logged with every run
            require(
                url.password is None,
                "serve.redis_url",
                "...",
                "without a password: serve.redis_password_file",
            )
        require(
            ":" not in self.redis_prefix,
            "serve.redis_prefix",
            self.redis_prefix,
            "a word without colons",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    # None: join RAY_ADDRESS where a job was submitted to a cluster, else start a local one
    address: str | None = None
    # logical CPUs of a local cluster; two workers and Ray Data need more than two
    num_cpus: int = 4
    object_store_mb: int = 512
