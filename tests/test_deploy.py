"""The deployment's configuration, and what its jobs say where something that they need is not
there.
"""

import argparse
import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import jobs.deploy
import jobs.promote
import jobs.serve
from jobs import cli
from pipeline import config
from pipeline.cluster import free_port
from pipeline.config import Outage, UserError
from pipeline.tracking import PinnedModel
from serve_app import deployment
from tests.worlds.tiny import publish_sequences, tiny_config

ROOT = Path(__file__).parent.parent


def test_the_configuration_passes_rays_checks_and_has_no_unknown_keys(tmp_path: Path) -> None:
    from ray.serve.schema import (
        DeploymentSchema,
        HTTPOptionsSchema,
        ServeApplicationSchema,
        ServeDeploySchema,
    )

    cfg = tiny_config(tmp_path)
    publish_sequences(cfg)
    model = PinnedModel("http://127.0.0.1:1", "tiny", 3, {"config.json": "0" * 64})
    wanted = deployment.user_config(cfg.folders, cfg.serve, model)
    together = replace(cfg, serve=replace(cfg.serve, one_process=True))
    merged, filled = (
        deployment.serve_config(c.serve, wanted, 8123, {"working_dir": f"local://{ROOT}"})
        for c in (together, cfg)
    )
    for settings in (deployment.read_template(), merged, filled):
        ServeDeploySchema.model_validate(settings)
        assert settings.keys() <= ServeDeploySchema.model_fields.keys()
        assert settings["http_options"].keys() <= HTTPOptionsSchema.model_fields.keys()
        for application in settings["applications"]:
            assert application.keys() <= ServeApplicationSchema.model_fields.keys()
            for entry in application["deployments"]:
                assert entry.keys() <= DeploymentSchema.model_fields.keys()
    assert filled["http_options"]["port"] == 8123
    ingress, ranker = filled["applications"][0]["deployments"]
    (both,) = merged["applications"][0]["deployments"]
    assert [entry["name"] for entry in (ingress, ranker, both)] == [
        "Api",
        "RankerReplica",
        "RankerReplica",
    ]
    assert ranker["user_config"]["model"]["version"] == both["user_config"]["model"]["version"] == 3
    assert both["max_ongoing_requests"] == ingress["max_ongoing_requests"]
    json.dumps(filled)


def as_asked(preset: Path, **options: object) -> cli.Job:
    """What `--config preset` and options make of a command line."""
    return cli.Job(config.load(preset, []), argparse.Namespace(**options))


@pytest.mark.cluster
def test_no_champion(mlflow_runs: Path, tmp_path: Path) -> None:
    cfg = tiny_config(mlflow_runs, name="championless")
    publish_sequences(cfg)
    preset = tmp_path / "preset.yaml"
    preset.write_text(
        f"name: {cfg.name}\nruns_dir: {mlflow_runs}\ntracking: {{model_name: nobody}}\n"
    )
    with pytest.raises(
        UserError, match="no champion: no version of nobody has the alias 'champion'"
    ):
        jobs.serve.run_job(as_asked(preset))


def test_mlflow_down(tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    uri = f"http://127.0.0.1:{free_port()}"
    preset.write_text(f"runs_dir: {tmp_path}/runs\ntracking: {{uri: '{uri}'}}\n")
    # a version needs no run of this folder
    with pytest.raises(Outage, match=f"no MLflow server answers at '{uri}'"):
        jobs.promote.run_job(as_asked(preset, version=1))
    assert not (tmp_path / "runs").exists()


def test_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    preset = tmp_path / "preset.yaml"
    preset.write_text(f"runs_dir: {tmp_path}/runs\n")
    with pytest.raises(UserError, match=r"ray\.address: no cluster to deploy to"):
        jobs.deploy.run_job(as_asked(preset, rayservice=None))


def test_a_port_that_somebody_listens_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "PORT_WAIT_S", 0.05)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as another server's ingress
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"serve.port: something else listens on .*:{port}"):
            deployment.require_free_port("127.0.0.1", port)
    deployment.require_free_port("127.0.0.1", port)


def test_other_applications_of_the_cluster_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = tiny_config(tmp_path)
    publish_sequences(cfg)
    model = PinnedModel("http://127.0.0.1:1", "tiny", 3, {"config.json": "0" * 64})
    filled = deployment.serve_config(
        cfg.serve, deployment.user_config(cfg.folders, cfg.serve, model), 8123, {}
    )
    other = {"name": "shop", "route_prefix": "/shop", "import_path": "shop:app"}
    theirs = {"route_prefix": "/shop", "deployed_app_config": other}
    by_hand = {"route_prefix": "/hand", "deployed_app_config": None}
    (before,) = filled["applications"]
    ours = {"route_prefix": "/", "deployed_app_config": before}

    running = {"applications": {"shop": theirs, "by hand": by_hand, "ranking": ours}}
    assert deployment.beside_others(filled, running)["applications"] == [before, other]
    assert not caplog.messages

    with pytest.raises(UserError, match="'shop' of this cluster answers at /"):
        deployment.beside_others(filled, {"applications": {"shop": theirs | {"route_prefix": "/"}}})

    # an update of this server has its name, another server has another
    update = deployment.serve_config(
        cfg.serve, deployment.user_config(cfg.folders, cfg.serve, model), 8123, {}
    )
    another = replace(cfg, name="another")
    publish_sequences(another)
    wanted = deployment.user_config(another.folders, another.serve, model)
    replacing = deployment.serve_config(another.serve, wanted, 8123, {})
    ids = [one["applications"][0]["args"]["server_id"] for one in (filled, update, replacing)]
    assert ids[0] == ids[1] != ids[2]
    deployment.beside_others(replacing, running)
    assert "is replaced by that of" in caplog.text
    assert "another/serving" in caplog.text


def test_an_update_knows_that_another_job_has_sent_a_later_one(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path)
    publish_sequences(cfg)
    model = PinnedModel("http://127.0.0.1:1", "tiny", 3, {"config.json": "0" * 64})

    def details_of(wanted: dict[str, Any]) -> dict[str, Any]:
        (application,) = deployment.serve_config(cfg.serve, wanted, 8123, {})["applications"]
        return {"applications": {"ranking": {"deployed_app_config": application}}}

    mine, later = [deployment.user_config(cfg.folders, cfg.serve, model) for _ in range(2)]
    ids = [deployment.find_wanted(details_of(wanted)) for wanted in (mine, later)]
    assert ids == [mine["deployment"], later["deployment"]]
    assert ids[0] != ids[1]
    assert deployment.find_wanted({"applications": {}}) is None

    for there in (details_of(mine), {"applications": {}}):
        deployment.refuse_overtaken(there, mine["deployment"], "http://127.0.0.1:8123")
    with pytest.raises(Outage, match=f"another job .* {later['deployment']}"):
        deployment.refuse_overtaken(details_of(later), mine["deployment"], "http://127.0.0.1:8123")


def test_a_replica_finds_the_keys_whatever_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = tiny_config(tmp_path, serve={"api_keys_file": "keys.txt"})
    filled = deployment.serve_config(cfg.serve, {}, 8123, {})
    assert filled["applications"][0]["args"]["api_keys_file"] == str(tmp_path / "keys.txt")


def test_processes_are_fixed_or_follow_the_load(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, serve={"num_ingress": 2, "max_ingress": 6, "rate_limit_per_s": 10})
    filled = deployment.serve_config(cfg.serve, {}, 8123, {})
    ingress, ranker = filled["applications"][0]["deployments"]
    assert ingress["num_replicas"] is None
    assert ingress["autoscaling_config"]["min_replicas"] == 2
    assert ingress["autoscaling_config"]["max_replicas"] == 6
    assert (ranker["num_replicas"], "autoscaling_config" in ranker) == (1, False)
    assert filled["applications"][0]["args"]["rate_limit_per_s"] == 5, "each of two takes half"

    for section, key in (
        ({"num_replicas": 3, "max_replicas": 2}, "serve.max_replicas"),
        ({"num_ingress": 3, "max_ingress": 2}, "serve.max_ingress"),
        ({"lookup_timeout_s": 20}, "serve.lookup_timeout_s"),
        ({"body_timeout_s": 10}, "serve.body_timeout_s"),
    ):
        with pytest.raises(UserError, match=key):
            tiny_config(tmp_path, serve=section)
