"""What tests share. One Ray start for the whole session: it costs seconds."""

import os

# Triton reads this when `@triton.jit` runs, so before any test imports a kernel.
os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Iterator

import pytest

from pipeline.config import RayConfig


@pytest.fixture(scope="session")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A private Ray cluster of 4 logical CPUs; `ray_cluster` inside a test joins it."""
    from pipeline.cluster import ray_cluster

    with ray_cluster(RayConfig(num_cpus=4), runs_dir=tmp_path_factory.mktemp("ray")):
        yield
