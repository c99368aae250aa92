"""Another server of the same user: `python -m tests.support.neighbour RUNS_DIR PORT`.

A private cluster that serves an untrained model of the tiny world. It prints the deployment's
identity once it answers, and goes on until it is killed.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

from pipeline.cluster import ray_cluster
from pipeline.files import folder_digests
from pipeline.tracking import PinnedModel
from serve_app import deployment
from tests.worlds.tiny import publish_sequences, save_tiny_model, tiny_config


def main(runs_dir: Path, port: int) -> None:
    cfg = tiny_config(runs_dir, serve={"port": port, "one_process": True})
    cfg = replace(cfg, ray=replace(cfg.ray, num_cpus=1, object_store_mb=100))
    publish_sequences(cfg)
    # where the server keeps the versions that it has fetched
    cache = deployment.cache_folder(cfg.runs_dir)
    folder = save_tiny_model(cfg, cache / "new")
    model = PinnedModel("", cfg.model_name, 7, folder_digests(folder))
    folder.rename(cache / model.folder_name)

    with ray_cluster(cfg.ray, runs_dir=cfg.runs_dir, include_dashboard=True) as cluster:
        wanted = deployment.user_config(cfg.folders, cfg.serve, model)
        deployment.send_update(cfg.serve, cluster.dashboard_url, wanted)
        print(wanted["deployment"], flush=True)
        time.sleep(3600)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
