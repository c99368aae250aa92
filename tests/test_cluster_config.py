"""ray_cluster.yaml passes the checker that `ray up` runs, and holds what the runbook promises."""

import copy
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config  # private; Ray is pinned

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cluster() -> dict:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def check(cluster: dict) -> dict:
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


def test_ray_accepts_the_file(cluster):
    assert check(cluster)["head_node_type"] == "head"


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("idle_timeout",), 5, "'idle_timeout' was unexpected"),
        (("idle_timeout_minutes",), "ten", "'ten' is not of type 'number'"),
        (("head_node_type",), "heads", "must be one of `available_node_types`"),
        (
            ("available_node_types", "gpu_train", "resources"),
            {"GPU": 0.5},
            "0.5 is not of type 'integer'",
        ),
        (
            ("available_node_types", "cpu_data", "min_workers"),
            30,
            "`max_workers` is smaller than the sum",
        ),
    ],
)
def test_the_checker_refuses_mistakes(cluster, path, value, complaint):
    section = cluster
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, ValueError), match=complaint):
        check(cluster)


def test_nodes_do_what_they_are_for(cluster):
    pools = cluster["available_node_types"]
    assert pools["head"]["resources"] == {"CPU": 0}
    assert "GPU" not in pools["cpu_data"]["resources"]
    assert pools["gpu_train"]["resources"]["GPU"] > 0
    assert all(pools[name]["labels"] == {"pool": name} for name in pools)
    assert all(pools[name]["min_workers"] == 0 for name in ("cpu_data", "gpu_train"))


def test_every_ray_start_names_its_memory_spill_folder_and_metrics_port(cluster):
    starts = [
        c
        for key in ("head", "worker")
        for c in cluster[f"{key}_start_ray_commands"]
        if "ray start" in c
    ]
    assert len(starts) == 2
    for start in starts:
        for option in (
            "--object-store-memory=",
            "--object-spilling-directory=",
            "--metrics-export-port=",
        ):
            assert option in start


def test_every_node_has_the_shared_folder_before_its_container_starts(cluster):
    """Checkpoints and sequences are read on other nodes than they were written on."""
    mounts = [c for c in cluster["initialization_commands"] if "mount -t nfs4" in c]
    assert len(mounts) == 1, "of all nodes: no node type has commands of its own"
    assert mounts[0].rstrip(")").endswith(":/ /shared")
    assert "--volume=/shared:/shared" in cluster["docker"]["run_options"]
    for node_type in cluster["available_node_types"].values():
        assert "initialization_commands" not in node_type
        assert "docker" not in node_type


def test_token_auth_and_ingress_variables_reach_every_node(cluster):
    options = " ".join(cluster["docker"]["run_options"])
    for variable in (
        "RAY_AUTH_MODE=token",
        "RAY_SERVE_ENABLE_HA_PROXY=1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED=1",
    ):
        assert f"--env {variable}" in options
    assert "head_run_options" not in cluster["docker"]
    assert "worker_run_options" not in cluster["docker"]


def test_the_image_has_the_pinned_ray(cluster):
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert cluster["docker"]["image"].startswith(f"rayproject/ray:{pinned[1]}-py311")


def test_no_secret_stands_in_the_file():
    text = (ROOT / "ray_cluster.yaml").read_text()
    assert not re.search(r"[0-9a-fA-F]{32,}|AKIA[0-9A-Z]{16}|PRIVATE KEY|password", text)
    assert ".ray-token" in (ROOT / ".gitignore").read_text().split()
