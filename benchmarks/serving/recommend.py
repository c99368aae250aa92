"""Recommended lists under load: 100,000 items, exact search, 500 of them ranked.

    python -m benchmarks.serving.recommend                # about three minutes on two cores
    python -m benchmarks.serving.recommend --report       # what was measured last, into RESULTS.md

Serves the model of configs/serve_reference.yaml with a retrieval head, untrained, over a catalogue
of 100,000 generated items. The load comes from a second process on the same cores, half of it from
users who asked in the last minute. Figures go to benchmarks/runs/recommend.json.
"""

import argparse
import json
import logging
import os
import re
import shutil
from typing import Any

import httpx
import torch

from benchmarks.machine import environment
from benchmarks.report import RUNS, read_run, table, write_run, write_section
from benchmarks.serving.stage import PRESET, ROOT, Stage
from pipeline import config, logs
from pipeline.batches.features import fit_features
from pipeline.batches.stored import StoredUsers
from pipeline.cluster import ray_cluster
from pipeline.config import RunConfig
from pipeline.files import folder_digests
from pipeline.index.folder import build_index
from pipeline.model.artifact import save_model
from pipeline.model.ranker import RankingModel
from pipeline.sequences import build
from pipeline.tracking import PinnedModel
from serve_app import deployment

RUN = RUNS / "recommend.json"
NUM_ITEMS, SHOWN, RATE = 100_000, 20, 10
SETTINGS = (
    "name=serve_recommend",
    f"source.synthetic.num_items={NUM_ITEMS}",
    "retrieval.enabled=true",
    "tracking.model_name=serve_recommend",
)
ROWS = {
    "whole request": "latency_ms",
    "users of the last minute": "warm_latency_ms",
    "other users": "cold_latency_ms",
    "the list's own work": "ranker_ms",
}
STAGES = ("history", "encode", "retrieve", "features", "rank", "choose")


def indexed(cfg: RunConfig) -> PinnedModel:
    """A model of random weights and its index, where the server keeps what it has fetched."""
    cache = deployment.cache_folder(cfg.runs_dir)
    folder = cache / "new"
    torch.manual_seed(1)
    maps = fit_features(cfg)
    save_model(folder, RankingModel(cfg, maps.vocab_sizes, maps.base_rates), cfg, maps, {})
    stored = StoredUsers(cfg.sequence_dir, cfg.source, cfg.features)
    build_index(cfg.index, stored, cfg.split.train_end_ms, folder)

    model = PinnedModel("", cfg.model_name, 1, folder_digests(folder))
    shutil.rmtree(cache / model.folder_name, ignore_errors=True)
    folder.rename(cache / model.folder_name)
    return model


def measure(cfg: RunConfig, dashboard_url: str, rate: float, seconds: float) -> dict[str, Any]:
    """Figures of a load, the index that answered, and the mean time of each stage."""
    wanted = deployment.user_config(cfg.folders, cfg.serve, indexed(cfg))
    url = deployment.send_update(cfg.serve, dashboard_url, wanted)
    stage = Stage(cfg, dashboard_url, seconds)
    load = f"name={cfg.name}"  # whose users ask
    stage.load(url, rate, 5, "--recommend", str(SHOWN), "--set", load)

    before = stage_seconds(url)
    busy = os.getloadavg()[0]
    figures = stage.load(url, rate, seconds, "--recommend", str(SHOWN), "--set", load)
    after = stage_seconds(url)
    figures["stage_ms"] = {}
    for name in STAGES:
        took_s, lists = after[name][0] - before[name][0], after[name][1] - before[name][1]
        figures["stage_ms"][name] = round(1000 * took_s / lists, 2)
    figures["index"] = httpx.get(f"{url}/v1/model").json()["index"]
    figures["load_before"] = round(busy, 2)
    return figures


def stage_seconds(url: str) -> dict[str, tuple[float, float]]:
    """Seconds and lists by stage so far."""
    text = httpx.get(f"{url}/metrics").text
    found = {}
    for stage in STAGES:
        values = []
        for part in ("sum", "count"):
            pattern = rf'^ranking_recommend_seconds_{part}{{.*stage="{stage}".*}} (\S+)$'
            values.append(sum(map(float, re.findall(pattern, text, re.MULTILINE))))
        found[stage] = values[0], values[1]
    return found


def section(run: dict[str, Any]) -> str:
    """The section of RESULTS.md."""
    figures, machine = run["figures"], run["environment"]
    load, index, latency = figures["load"], figures["index"], figures["latency_ms"]
    where = "one process" if figures["one_process"] else "ingress apart"
    head = (
        f"`{run['command']}`: `/v1/recommend` for {load['recommend']} items at {load['rate']:g} "
        f"requests/s for {load['seconds']:g} s, {where}, on {machine['cores']} cores of "
        f"{machine['device']}; server, generator and Ray on the same cores. {index['items']:,} "
        f"items, {index['search']} search in {index['dimensions']} dimensions, "
        f"{run['retrieved']} retrieved and ranked by 4 layers of 128 over histories of 256 events. "
        f"Others used {figures['others_cores']:.2f} cores meanwhile. {run.get('note', '')}"
    )
    rows = []
    for name, key in ROWS.items():
        found = figures[key]
        rows.append([name, *(f"{found[p]:.1f}" for p in ("p50", "p95", "p99"))])
    stages = ", ".join(f"{name} {ms:.1f}" for name, ms in figures["stage_ms"].items())
    refused = figures["statuses"].get("429", 0)
    tail = (
        f"Mean time by stage, ms: {stages}. {figures['failures']} failures and {refused} times 429 "
        f"of {figures['requests']:,}. The goal was 40 and 100 ms at p50 and p99: "
        f"{latency['p50']:.1f} and {latency['p99']:.1f}."
    )
    return "\n\n".join(
        ["## Recommended lists", head.strip(), table(["ms", "p50", "p95", "p99"], rows), tail]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--runs-dir", default=str(ROOT / "runs"))
    parser.add_argument("--note", default="", help="a sentence for the report")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.report:
        logging.basicConfig(level=logging.WARNING)
        cfg = config.load(PRESET, [*SETTINGS, f"runs_dir={options.runs_dir}"])
        with ray_cluster(cfg.ray, runs_dir=cfg.runs_dir, include_dashboard=True) as cluster:
            logs.import_logs(cfg)
            build.build_sequences(cfg)
            figures = measure(cfg, cluster.dashboard_url, options.rate, options.seconds)
        run = {
            "command": "python -m benchmarks.serving.recommend",
            "environment": environment("cpu"),
            "retrieved": cfg.serve.retrieved_candidates,
            "note": options.note,
            "figures": figures | {"one_process": cfg.serve.one_process},
        }
        print(json.dumps(run), flush=True)
        write_run(RUN, run)
    write_section("recommend", section(read_run(RUN)))


if __name__ == "__main__":
    main()
