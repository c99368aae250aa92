"""The Ray cluster that jobs join or start."""

from dataclasses import dataclass

from pipeline.config.setting import check_ranges, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    """The cluster to join, or the size of the local one that a job starts."""

    address: str | None = setting(
        None,
        doc="Address of a Ray cluster. Null: join RAY_ADDRESS where a job was submitted to a "
        "cluster, else start a local one.",
    )
    num_cpus: int = setting(
        4,
        at_least=1,
        doc="Logical CPUs of a local cluster. Two training workers and Ray Data need more than 2.",
    )
    object_store_mb: int = setting(
        512, at_least=75, doc="Object store of a local cluster, in MiB; Ray takes no less than 75."
    )
    data_labels: dict[str, str] = setting(
        {},
        doc="Label of a cluster's nodes: its value where tasks of a build run, such as pool: "
        "cpu_data. Empty: they run anywhere, on GPU nodes too.",
    )
    start_timeout_s: float = setting(
        300.0,
        above=0,
        doc="Longest wait for a local cluster to start, in seconds. A start that Ray gives up on a "
        "busy machine is tried again within it.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, "ray")
