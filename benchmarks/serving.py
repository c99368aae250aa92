"""The server under load: latency, overhead of HTTP, overload, and changes while requests come in.

    python -m benchmarks.serving                  # every part, some ten minutes on two cores
    python -m benchmarks.serving --parts reference --seconds 600
    python -m benchmarks.serving --report         # benchmarks/runs/serving.json into RESULTS.md

Serves configs/serve_reference.yaml (generated users, untrained models) on a Ray cluster of its own. The load comes
from a second process on the same cores (`python -m serve_app.load_test`).
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline import config
from pipeline.cluster import ray_cluster
from pipeline.config import RunConfig
from pipeline.data import sequences, sources
from pipeline.data.features import fit_features
from pipeline.model.artifact import save_model
from pipeline.model.ultra_hstu import UltraHSTU
from pipeline.tracking import PinnedModel
from serve_app import deployment

ROOT = Path(__file__).parent.parent
PRESET = ROOT / "configs" / "serve_reference.yaml"
RUN_FILE = ROOT / "benchmarks" / "runs" / "serving.json"
TRIVIAL = {"d_model": 16, "num_layers": 1, "num_heads": 1, "d_qk": 16, "d_v": 16, "head_hidden": 16}


def untrained(cfg: RunConfig, version: int) -> PinnedModel:
    """A model of random weights in the place where the server keeps the versions that it has fetched and checked."""
    folder = deployment.cache(cfg) / f"{cfg.tracking.model_name}-{version}"
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(version)
    maps = fit_features(cfg)
    save_model(folder, UltraHSTU(cfg, maps.vocab_sizes, maps.base_rates), cfg, maps, {})
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    return PinnedModel("", cfg.tracking.model_name, version, digests)


def load(cfg: RunConfig, url: str, rate: float, seconds: float, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "serve_app.load_test", "--config", str(PRESET), "--url", url]
    command += ["--set", f"runs_dir={cfg.runs_dir}", "--rate", str(rate), "--seconds", str(seconds), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(done.stdout)
    print(json.dumps({key: figures[key] for key in ("statuses", "latency_ms", "ranker_ms", "overhead_ms")}), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["overhead", "reference"])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--runs-dir", default=str(ROOT / "runs"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    cfg = config.load(PRESET, [f"runs_dir={options.runs_dir}"])
    with ray_cluster(cfg.ray, runs_dir=cfg.runs_dir, include_dashboard=True) as cluster:
        sources.import_logs(cfg)
        sequences.build_sequences(cfg)
        if "overhead" in options.parts:
            small = replace(cfg, model=replace(cfg.model, **TRIVIAL))
            url = deployment.deploy(cfg, cluster.dashboard_url, untrained(small, 1))
            load(cfg, url, 50, 5, "--candidates", "20")
            load(cfg, url, 50, options.seconds, "--candidates", "20")
        if "reference" in options.parts:
            url = deployment.deploy(cfg, cluster.dashboard_url, untrained(cfg, 2))
            load(cfg, url, 20, 5)
            load(cfg, url, 20, options.seconds)


if __name__ == "__main__":
    main()
