"""deploy/kuberay: every field is one that KubeRay or Kubernetes knows, and the files agree with
each other and us.

No API server stands behind these tests. The fields below are written down from KubeRay's CRDs
(ray.io/v1; which ones: docs/operate/kubernetes.md) and Kubernetes' core/v1, as far as our files use
them, with what the operator and Kubernetes refuse beyond types; anything else in a file is refused,
so a slip of the pen is found. `kubectl apply --dry-run=server` on a cluster with KubeRay asks the
real ones.
"""

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner
from ray.serve.schema import ServeDeploySchema

from pipeline import config
from pipeline.config import UserError
from pipeline.tracking import PinnedModel
from serve_app import deployment
from tests.support.kubernetes import (
    BOOL,
    COUNT,
    LABEL,
    PORT,
    QUANTITIES,
    SECRET_KEY,
    STRING,
    STRINGS,
    each,
    fields,
    one_of,
)
from tests.worlds.tiny import publish_sequences, save_tiny_model, tiny_config

ROOT = Path(__file__).parents[1]
KUBERAY = ROOT / "deploy" / "kuberay"
# A RayJob's or RayService's cluster is named after it, with a suffix, and that one's services with
# another.
METADATA = fields("name", name=LABEL | {"maxLength": 47}, annotations=STRINGS, labels=STRINGS)
# a name, one value
ENV = fields("name", name=STRING, value=STRING, valueFrom=SECRET_KEY) | {"maxProperties": 2}
CONTAINER = fields(
    "name image resources",
    name=LABEL,
    image=STRING,
    workingDir=STRING,
    env=each(ENV),
    ports=each(fields("containerPort", containerPort=PORT, name=LABEL | {"maxLength": 15})),
    resources=fields("limits requests", limits=QUANTITIES, requests=QUANTITIES),
    volumeMounts=each(
        fields("name mountPath", name=LABEL, mountPath={"type": "string", "pattern": "^/[^:]*$"})
    ),
)
VOLUME = fields(
    "name",
    name=LABEL,
    persistentVolumeClaim=fields("claimName", claimName=STRING),
    emptyDir=fields(sizeLimit=QUANTITIES["additionalProperties"]),
    secret=fields("secretName", secretName=STRING),
) | {"minProperties": 2, "maxProperties": 2}  # a name, one source
POD = fields(
    "spec",
    spec=fields(
        "containers",
        containers=each(CONTAINER),
        volumes=each(VOLUME),
        serviceAccountName=STRING,
        securityContext=fields(
            fsGroup=COUNT, fsGroupChangePolicy=one_of("OnRootMismatch", "Always")
        ),
        terminationGracePeriodSeconds=COUNT,
        tolerations=each(
            fields(
                "key operator effect",
                key=STRING,
                operator=one_of("Exists", "Equal"),
                effect=one_of("NoSchedule", "NoExecute", "PreferNoSchedule"),
            )
        ),
    ),
)
CLUSTER = fields(
    "rayVersion headGroupSpec workerGroupSpecs",
    rayVersion=STRING,
    authOptions=fields("mode", mode=one_of("token", "disabled")),
    enableInTreeAutoscaling=BOOL,
    autoscalerOptions=fields(
        upscalingMode=one_of("Default", "Aggressive", "Conservative"), idleTimeoutSeconds=COUNT
    ),
    gcsFaultToleranceOptions=fields(
        "redisAddress", redisAddress=STRING, redisPassword=fields("valueFrom", valueFrom=SECRET_KEY)
    ),
    headGroupSpec=fields("rayStartParams template", rayStartParams=STRINGS, template=POD),
    workerGroupSpecs=each(
        fields(
            # KubeRay asks for both bounds
            "groupName minReplicas maxReplicas rayStartParams template",
            groupName=LABEL,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=STRINGS,
            template=POD,
        )
    ),
)
JOB = fields(
    "entrypoint rayClusterSpec",
    entrypoint=STRING,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode"),
    backoffLimit=COUNT,
    shutdownAfterJobFinishes=BOOL,
    ttlSecondsAfterFinished=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    rayClusterSpec=CLUSTER,
) | {
    "if": {"required": ["ttlSecondsAfterFinished"]},
    "then": {"properties": {"shutdownAfterJobFinishes": {"const": True}}},
}
SERVICE = fields("serveConfigV2 rayClusterConfig", serveConfigV2=STRING, rayClusterConfig=CLUSTER)


def kind(name: str, spec: dict) -> dict:
    version = {"const": "ray.io/v1"}
    return fields(
        "apiVersion kind metadata spec",
        apiVersion=version,
        kind={"const": name},
        metadata=METADATA,
        spec=spec,
    )


FILES = {
    "ray-cluster.yaml": kind("RayCluster", CLUSTER),
    "ray-job.yaml": kind("RayJob", JOB),
    "ray-service.yaml": kind("RayService", SERVICE),
}


def read(name: str) -> dict:
    (document,) = yaml.safe_load_all((KUBERAY / name).read_text())
    return document


def cluster_of(document: dict) -> dict:
    spec = document["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods(document: dict) -> list[dict]:
    cluster = cluster_of(document)
    return [
        group["template"]["spec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]


HEAD = ("spec", "headGroupSpec", "template", "spec", "containers", 0)
VOLUMES = ("spec", "headGroupSpec", "template", "spec", "volumes")


@pytest.mark.parametrize("name", FILES)
def test_every_field_is_known(name: str):
    jsonschema.validate(read(name), FILES[name])


@pytest.mark.parametrize(
    ("name", "path", "value", "complaint"),
    [
        (
            "ray-cluster.yaml",
            ("spec", "enableAutoscaling"),
            True,
            "'enableAutoscaling' was unexpected",
        ),
        (
            "ray-cluster.yaml",
            ("spec", "headGroupSpec", "rayStartParams", "num-cpus"),
            0,
            "0 is not of type 'string'",
        ),
        (
            "ray-cluster.yaml",
            ("spec", "workerGroupSpecs", 0, "maxReplicas"),
            None,
            "None is not of type 'integer'",
        ),
        (
            "ray-cluster.yaml",
            ("spec", "workerGroupSpecs", 0, "maxReplicas"),
            2**31,
            "greater than the maximum",
        ),
        (
            "ray-cluster.yaml",
            (*HEAD, "resources", "requests", "memory"),
            "16GiB",
            "'16GiB' does not match",
        ),
        (
            "ray-cluster.yaml",
            (*HEAD, "ports", 0, "containerPort"),
            65536,
            "greater than the maximum",
        ),
        ("ray-cluster.yaml", (*HEAD, "ports", 0, "name"), "gcs-server-grpc-port", "is too long"),
        (
            "ray-cluster.yaml",
            (*HEAD, "env", 0, "valueFrom"),
            {"secretKeyRef": {"name": "a", "key": "b"}},
            "too many",
        ),
        ("ray-cluster.yaml", (*VOLUMES, 0, "emptyDir"), {}, "too many"),
        ("ray-job.yaml", ("metadata", "name"), "ultra-hstu-pipeline" * 3, "is too long"),
        ("ray-job.yaml", ("spec", "shutdownAfterJobFinishes"), False, "True was expected"),
        ("ray-job.yaml", ("spec", "backOffLimit"), 3, "'backOffLimit' was unexpected"),
        ("ray-job.yaml", ("spec", "submissionMode"), "HTTP", "'HTTP' is not one of"),
        ("ray-service.yaml", ("spec", "rayClusterSpec"), {}, "'rayClusterSpec' was unexpected"),
        (
            "ray-service.yaml",
            ("spec", "rayClusterConfig", "rayVersion"),
            2.6,
            "2.6 is not of type 'string'",
        ),
    ],
)
def test_mistakes_are_refused(name: str, path: tuple, value: object, complaint: str):
    document = copy.deepcopy(read(name))  # the file's anchors are one object in several places
    section: Any = document
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError, match=re.escape(complaint)):
        jsonschema.validate(document, FILES[name])


@pytest.mark.parametrize("name", FILES)
def test_pods_are_alike_where_they_must_be(name: str):
    document = read(name)
    claim, account = list(yaml.safe_load_all((KUBERAY / "shared.yaml").read_text()))
    images, environments = set(), set()
    for pod in pods(document):
        (container,) = pod["containers"]
        images.add(container["image"])
        environments.add(tuple((entry["name"], entry["value"]) for entry in container["env"]))
        folders = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        served = {"redis": "/etc/redis"} if name == "ray-service.yaml" else {}
        assert folders == {"runs": "/shared/runs", "spill": "/mnt/ray-spill"} | served
        assert folders.keys() == {volume["name"] for volume in pod["volumes"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
        assert pod["serviceAccountName"] == account["metadata"]["name"]
        # the user of Ray's images may write to a volume of the network only by its group
        assert pod["securityContext"]["fsGroup"] == 100
        # Ray counts the limits
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert "ephemeral-storage" in container["resources"]["limits"], "what spills is counted"
    assert len(images) == len(environments) == 1
    variables = dict(environments.pop())
    serve = (
        "RAY_SERVE_ENABLE_HA_PROXY",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE",
    )
    assert all(variables[variable] == "1" for variable in serve)


@pytest.mark.parametrize("name", FILES)
def test_groups_do_what_they_are_for(name: str):
    cluster = cluster_of(read(name))
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    gpus = {
        group["groupName"]: "nvidia.com/gpu"
        in group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for group in cluster["workerGroupSpecs"]
    }
    assert gpus == (
        {"gpu-train": True}
        if name == "ray-service.yaml"
        else {"cpu-data": False, "gpu-train": True}
    )
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", FILES)
def test_every_start_parameter_is_an_option_of_ray_start(name: str):
    from ray.scripts.scripts import start

    options = CliRunner().invoke(start, ["--help"]).output
    cluster = cluster_of(read(name))
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        for option in group["rayStartParams"]:
            assert f"--{option} " in options, option


def test_the_versions_are_the_pinned_ones():
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert {cluster_of(read(name))["rayVersion"] for name in FILES} == {pinned[1]}
    assert (
        f"\nFROM rayproject/ray:{pinned[1]}-py311-gpu\n"
        in (ROOT / "deploy" / "Dockerfile").read_text()
    )


def test_the_image_is_what_the_docker_file_makes():
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    (image,) = {pod["containers"][0]["image"] for name in FILES for pod in pods(read(name))}
    assert f"-t {image} " in text
    (folder,) = re.findall(r"^WORKDIR (\S+)$", text, re.MULTILINE)
    assert {pod["containers"][0]["workingDir"] for name in FILES for pod in pods(read(name))} == {
        folder
    }
    for copied in re.findall(r"^COPY --chown=\S+ (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / path).exists() for path in copied.split())


def test_the_job_runs_the_chain_again_after_a_failure():
    spec = read("ray-job.yaml")["spec"]
    assert spec["backoffLimit"] >= 1
    words = spec["entrypoint"].split()
    assert words[:3] == ["python", "-m", "jobs.pipeline"]
    preset = ROOT / Path(words[words.index("--config") + 1]).relative_to("/home/ray/project")
    overrides = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    cfg = config.load(preset, overrides)
    assert cfg.runs_dir == "/shared/runs"
    assert cfg.tracking.uri


def test_the_service_is_served_as_serve_config_says():
    ours = yaml.safe_load(read("ray-service.yaml")["spec"]["serveConfigV2"])
    assert ours == deployment.read_template() | {"http_options": deployment.POD_OPTIONS}


def test_the_service_is_filled_with_a_champion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    cfg = tiny_config(tmp_path, serve={"num_replicas": 2, "use_gpu": True})
    publish_sequences(cfg)
    folder = save_tiny_model(cfg, tmp_path / "model")
    monkeypatch.setattr(deployment, "fetch_model", lambda model, cache: folder)
    champion = PinnedModel("http://mlflow:5000", "tiny", 3, {})
    filled = yaml.safe_load(
        deployment.fill_rayservice(cfg.folders, cfg.serve, KUBERAY / "ray-service.yaml", champion)
    )
    jsonschema.validate(filled, FILES["ray-service.yaml"])
    served = yaml.safe_load(filled["spec"].pop("serveConfigV2"))
    unfilled = read("ray-service.yaml")
    del unfilled["spec"]["serveConfigV2"]
    assert filled == unfilled
    ServeDeploySchema.model_validate(served)
    assert served["http_options"] == deployment.POD_OPTIONS
    assert served["applications"][0]["args"]["hosts"] is None, "pods have names of their own"
    assert "whoever reaches 0.0.0.0 may rank" in caplog.text, "there are no keys"
    (ranker,) = (
        entry
        for entry in served["applications"][0]["deployments"]
        if entry["name"] == "RankerReplica"
    )
    assert ranker["num_replicas"] == 2
    assert ranker["ray_actor_options"]["num_gpus"] == 1
    assert ranker["user_config"]["model"]["version"] == 3
    assert ranker["user_config"]["sequences"] == str(cfg.sequence_dir)


def test_what_is_no_service_is_refused(tmp_path: Path):
    cfg, champion = tiny_config(tmp_path), PinnedModel("http://mlflow:5000", "tiny", 3, {})
    for path, message in (
        (KUBERAY / "ray-job.yaml", "holds no RayService"),
        (tmp_path / "none", "cannot be read"),
    ):
        with pytest.raises(UserError, match=rf"--rayservice .*{message}"):
            deployment.fill_rayservice(cfg.folders, cfg.serve, path, champion)


def test_no_secret_stands_in_a_file():
    for path in KUBERAY.glob("*.yaml"):
        assert not re.search(r"[0-9a-fA-F]{32,}|AKIA[0-9A-Z]{16}|PRIVATE KEY", path.read_text())
