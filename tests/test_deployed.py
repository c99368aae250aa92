"""The benchmark of the chain on several GPUs: what it asks of the jobs, and how it tells it."""

import argparse
from pathlib import Path

import pytest

from benchmarks.serving.deployed import PRESET, run_job, section, settings_of
from pipeline import config


def test_each_gpu_has_a_worker_and_the_server_its_processes(tmp_path: Path) -> None:
    options = argparse.Namespace(device="cuda", replicas=2)
    cfg = config.load(PRESET, settings_of(options, tmp_path))
    assert (cfg.train.use_gpu, cfg.train.num_workers) == (True, 2)
    assert (cfg.serve.use_gpu, cfg.serve.one_process) == (True, False)

    options.device = "cpu"
    cfg = config.load(PRESET, settings_of(options, tmp_path))
    assert not cfg.train.use_gpu
    assert not cfg.serve.use_gpu


def test_a_job_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"jobs\.deploy: exit code 2(.|\n)*no cluster to deploy"):
        run_job("deploy", log=tmp_path / "log", settings=[f"runs_dir={tmp_path}"])


def test_the_section_has_a_row_for_each_job_that_ran() -> None:
    parity = {"requests": 200, "largest_difference": 1.5e-6, "p50_ms": 7.0, "p99_ms": 12.5}
    run = {
        "command": "it",
        "environment": {"device": "a GPU", "cores": 32, "torch": "2", "triton": "3"},
        "ray": "2.60",
        "replicas": 2,
        "pipeline": {"seconds": 61.2, **parity},
        "deploy": {"seconds": 20.0, **parity, "devices_in_use": 2},
    }
    text = section(run)
    assert "`it`: 2 × a GPU, 32 cores" in text
    assert "| pipeline | 61 | 200 | 1.5e-06 | 7.0 / 12.5 | – |" in text
    assert "| deploy | 20 | 200 | 1.5e-06 | 7.0 / 12.5 | 2 |" in text
    assert "deploy again" not in text
