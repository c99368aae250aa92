"""What tests share. One Ray start for the whole session: it costs seconds."""

import json
import os
import signal
import subprocess
import sys
import time

# Triton reads this when `@triton.jit` runs, so before any test imports a kernel.
os.environ.setdefault("TRITON_INTERPRET", "1")
# For the S3 server of tests/test_s3.py; here, because workers have the environment in which their
# cluster was started.
os.environ |= {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
}

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import config
from pipeline.cluster import free_port
from pipeline.config import RayConfig, RunConfig
from tests.support.patience import PATIENCE_S

ROOT = Path(__file__).parents[1]

# A file's tests run in one process (xdist's loadfile): the longest begin first, so that no process
# is left alone with one of them at the end.
LONGEST_FILES = (
    "test_kernels_gpu",
    "test_layer",
    "test_attention_triton",
    "test_study",
    "test_page",
    "test_sharding",
    "test_last_layer",
    "test_loader_process",
    "test_token_kernels",
    "test_config",
    "test_encoder_recipe",
    "test_sampled_softmax",
    # with a cluster
    "test_job_submit",
    "test_trainer",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST_FILES)


@pytest.fixture(scope="session")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A private Ray cluster of 4 logical CPUs with its dashboard; `ray_cluster` inside a test joins
    it.
    """
    from pipeline.cluster import ray_cluster

    # an ingress would wait 30 s before it ends
    os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "1"
    with ray_cluster(
        RayConfig(num_cpus=4), runs_dir=tmp_path_factory.mktemp("ray"), include_dashboard=True
    ):
        yield


@pytest.fixture(scope="session")
def kuairand(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The demo's configuration with its sequences published: all of the KuaiRand subset."""
    from pipeline.logs import import_logs
    from pipeline.sequences.build import build_sequences

    runs_dir = tmp_path_factory.mktemp("kuairand")
    data = ROOT / "data" / "kuairand_pure_subset"
    cfg = config.load(
        ROOT / "configs" / "demo.yaml", [f"runs_dir={runs_dir}", f"source.path={data}"]
    )
    import_logs(cfg)
    build_sequences(cfg)
    return cfg


@pytest.fixture(scope="session")
def mlflow_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A runs_dir over which `jobs.mlflow_ui` has its server running: a `session` of a test
    joins it.

    TERM to the job ends the server and its workers.
    """
    folder = tmp_path_factory.mktemp("mlflow")
    preset = folder / "preset.yaml"
    preset.write_text(f"runs_dir: {folder}/runs\n")
    command = [
        sys.executable,
        "-m",
        "jobs.mlflow_ui",
        "--config",
        preset,
        "--port",
        str(free_port()),
    ]
    job = subprocess.Popen(command, cwd=ROOT)
    note = folder / "runs" / "mlflow" / "server.json"
    try:
        while not note.exists():
            assert job.poll() is None, "the MLflow server did not start"
            time.sleep(0.1)
        yield folder / "runs"
    finally:
        job.send_signal(signal.SIGTERM)
        assert job.wait(PATIENCE_S) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.killpg(json.loads(note.read_text())["pid"], 0)


@pytest.fixture(scope="session")
def tracked(mlflow_runs: Path) -> Iterator[RunConfig]:
    """A tiny configuration with published sequences, whose MLflow server runs."""
    from pipeline.tracking import session
    from tests.worlds.tiny import publish_sequences, tiny_config

    cfg = tiny_config(mlflow_runs, name="tracked")
    publish_sequences(cfg)
    with session(cfg):
        yield cfg
