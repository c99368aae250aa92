"""The Ray cluster that jobs join or start."""

from dataclasses import dataclass

from pipeline.config.setting import setting


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
        doc="Logical CPUs of a local cluster. Two training workers and Ray Data need more than 2.",
    )
    object_store_mb: int = setting(512, doc="Object store of a local cluster, in MiB.")
