"""deploy/stores and deploy/kuberay/protection.yaml: known fields, and the promises of
docs/operate/kubernetes.md: probes, budgets, who may reach what, no secret in a file.
"""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipeline import config
from pipeline.cluster import free_port
from tests.support.kubernetes import schema_of

ROOT = Path(__file__).parents[1]
STORES = ROOT / "deploy" / "stores"
PROTECTION = ROOT / "deploy" / "kuberay" / "protection.yaml"
NAMES = ("mlflow", "postgres", "redis")
RAY_POD = {"ray.io/is-ray-node": "yes"}


def read(path: Path) -> dict[str, dict]:
    """The documents of a file by kind."""
    found = {}
    for document in yaml.safe_load_all(path.read_text()):
        found[document["kind"]] = document
    return found


def workload(name: str) -> dict:
    """The Deployment or StatefulSet of a store."""
    found = read(STORES / f"{name}.yaml")
    return found["Deployment" if name == "mlflow" else "StatefulSet"]


def container(name: str) -> dict:
    (only,) = workload(name)["spec"]["template"]["spec"]["containers"]
    return only


@pytest.mark.parametrize("path", [*sorted(STORES.glob("*.yaml")), PROTECTION], ids=lambda p: p.stem)
def test_every_field_is_known(path: Path) -> None:
    for document in read(path).values():
        jsonschema.validate(document, schema_of(document))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"startupprobe": {}}, "'startupprobe' was unexpected"),
        ({"image": "redis:latest"}, "does not match"),
        ({"securityContext": {}}, "is a required property"),
        ({"livenessProbe": {"periodSeconds": 5, "exec": "ping"}}, "is not of type 'object'"),
    ],
)
def test_mistakes_are_refused(change: dict, complaint: str) -> None:
    document = workload("redis")
    document["spec"]["template"]["spec"]["containers"][0] |= change
    with pytest.raises(jsonschema.ValidationError, match=re.escape(complaint)):
        jsonschema.validate(document, schema_of(document))


@pytest.mark.parametrize("name", NAMES)
def test_service_budget_and_policy_are_of_the_pods(name: str) -> None:
    found, work = read(STORES / f"{name}.yaml"), workload(name)
    labels = work["spec"]["template"]["metadata"]["labels"]
    port_names = [port["name"] for port in container(name)["ports"]]

    assert work["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["Service"]["metadata"]["name"] == name, "the name that the jobs are given"
    assert [port["targetPort"] for port in found["Service"]["spec"]["ports"]] == port_names
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_leaves_one_pod(name: str) -> None:
    """Several stateless pods: one stays. A single one on its disk: a drain waits for a person."""
    budget = read(STORES / f"{name}.yaml")["PodDisruptionBudget"]["spec"]
    replicas = workload(name)["spec"]["replicas"]
    if replicas > 1:
        assert 0 < budget["minAvailable"] < replicas
    else:
        assert budget["maxUnavailable"] == 0


@pytest.mark.parametrize(
    ("name", "clients"), [("postgres", {"app": "mlflow"}), ("mlflow", RAY_POD), ("redis", RAY_POD)]
)
def test_only_its_clients_reach_a_store(name: str, clients: dict) -> None:
    policy = read(STORES / f"{name}.yaml")["NetworkPolicy"]["spec"]
    assert "Ingress" in policy["policyTypes"]
    (rule,) = policy["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": clients}}]
    assert [port["port"] for port in rule["ports"]] == [container(name)["ports"][0]["name"]]


def test_rays_pods_are_open_to_each_other_and_else_by_port() -> None:
    policy = read(PROTECTION)["NetworkPolicy"]["spec"]
    among, *others = policy["ingress"]
    assert policy["podSelector"]["matchLabels"] == RAY_POD
    assert among["from"] == [{"podSelector": {"matchLabels": RAY_POD}}]
    assert "ports" not in among
    assert all(rule["ports"] for rule in others)


def test_the_budget_of_the_service_is_one_that_kubernetes_can_hold() -> None:
    """KubeRay's pods belong to a kind without a scale: maxUnavailable and percents do not work."""
    budget = read(PROTECTION)["PodDisruptionBudget"]["spec"]
    service = yaml.safe_load((ROOT / "deploy" / "kuberay" / "ray-service.yaml").read_text())
    assert budget["minAvailable"] == 1
    assert budget["selector"]["matchLabels"] == {
        "ray.io/originated-from-crd": service["kind"],
        "ray.io/originated-from-cr-name": service["metadata"]["name"],
        "ray.io/node-type": "worker",
    }


@pytest.mark.parametrize("name", NAMES)
def test_what_a_pod_mounts_is_there_and_its_memory_is_its_own(name: str) -> None:
    pod = workload(name)["spec"]["template"]["spec"]
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    for claim in workload(name)["spec"].get("volumeClaimTemplates", []):
        volumes.add(claim["metadata"]["name"])
    assert {mount["name"] for mount in container(name)["volumeMounts"]} == volumes

    limits, requests = (container(name)["resources"][key] for key in ("limits", "requests"))
    assert limits["memory"] == requests["memory"], "nobody else's pressure ends it"


def test_secrets_are_named_and_never_written() -> None:
    """Passwords come from the Secrets `postgres` and `redis`, whose making the files' first lines
    show.
    """
    for name in NAMES:
        text = (STORES / f"{name}.yaml").read_text()
        assert not re.search(r"[0-9a-fA-F]{32,}|AKIA[0-9A-Z]{16}|PRIVATE KEY", text)
        for variable in container(name).get("env", []):
            if "PASSW" in variable["name"].upper() or "AUTH" in variable["name"].upper():
                assert variable.get("valueFrom") or variable["value"].startswith("/")


def test_mlflow_is_what_the_jobs_are_told() -> None:
    """Its address is `tracking.uri` of the job's file, and its server answers to that name."""
    job = yaml.safe_load((ROOT / "deploy" / "kuberay" / "ray-job.yaml").read_text())
    words = job["spec"]["entrypoint"].split()
    overrides = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    uri = config.load(ROOT / "configs" / "demo.yaml", overrides).tracking.uri
    assert uri == "http://mlflow:5000"

    (hosts,) = [word for word in container("mlflow")["command"] if "--allowed-hosts=" in word]
    assert uri.removeprefix("http://") in hosts.partition("=")[2].split(",")
    text = (STORES / "mlflow.Dockerfile").read_text()
    assert f"-t {container('mlflow')['image']} " in text
    settings = read(STORES / "mlflow.yaml")["ConfigMap"]["data"]
    assert settings["MLFLOW_BACKEND_STORE_URI"].startswith("postgresql+psycopg://mlflow@postgres:")
    assert "'psycopg[binary]'" in text, "the driver that the address names"


def test_redis_starts_by_its_file_and_keeps_what_it_acknowledged(tmp_path: Path) -> None:
    """The pod's own script, its folders moved: a server that `serve.redis_url` accepts."""
    pytest.importorskip("redis", reason="the extra [redis] is not installed")
    from serve_app.history.redis_events import RedisEvents

    if shutil.which("redis-server") is None and "CI" not in os.environ:
        pytest.skip("redis-server is not installed")
    port, password = free_port(), tmp_path / "redis-password" / "password"
    for folder in ("data", "run", "settings", "redis-password"):
        (tmp_path / folder).mkdir()
    password.write_text("of a secret")
    lines = read(STORES / "redis.yaml")["ConfigMap"]["data"]["redis.conf"]
    moved = lines.replace("dir /data", f"dir {tmp_path / 'data'}")
    (tmp_path / "settings" / "redis.conf").write_text(f"{moved}\nport {port}\nbind 127.0.0.1\n")

    shell, option, script = container("redis")["command"]
    for place, folder in (("/etc/redis-password", "redis-password"), ("/etc/redis", "settings")):
        script = script.replace(f"{place}/", f"{tmp_path / folder}/")
    script = script.replace("/run/redis/", f"{tmp_path / 'run'}/")
    process = subprocess.Popen([shell, option, script], stdout=subprocess.DEVNULL)
    try:
        wait_for(process, port)
        RedisEvents(f"redis://127.0.0.1:{port}/0", "ranking", password)  # it asks for the settings
        written = tmp_path / "run" / "redis.conf"
        assert written.stat().st_mode & 0o077 == 0, "its password is there"
    finally:
        process.terminate()  # as Kubernetes does: the server itself takes it, no shell before it
        assert process.wait(20) == 0


def wait_for(process: subprocess.Popen, port: int) -> None:
    import redis

    for _ in range(1000):
        try:
            redis.Redis(port=port).ping()
        except redis.AuthenticationError:
            return
        except redis.ConnectionError:
            assert process.poll() is None, "redis-server ended"
            time.sleep(0.02)
    raise AssertionError("redis-server does not answer")
