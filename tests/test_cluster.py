"""Clusters of our own, beside those of others."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import cluster
from pipeline.cluster import ray_cluster, serve_environment, use_token
from pipeline.config import Outage, RayConfig, UserError
from tests.support.patience import PATIENCE_S

ROOT = Path(__file__).parents[1]


def test_clusters_share_no_folder_and_no_port():
    one, other = serve_environment(Path("/tmp/one")), serve_environment(Path("/tmp/other"))
    ours = [name for name in one if name.endswith(("_LOC", "_PATH", "_BASE", "_FILE"))]
    assert len(ours) == 5
    assert all(one[name].startswith("/tmp/one/") for name in ours)
    ports = [name for name in one if name.endswith("_PORT")]
    assert len(ports) == 8
    assert [name for name in ports if one[name] == other[name]] == []


def test_serve_has_no_port_or_folder_that_is_not_set():
    """A new version of Ray may bring another fixed meeting point."""
    text = next(
        Path(sys.prefix).glob("lib/python*/site-packages/ray/serve/_private/constants.py")
    ).read_text()
    ports = set(re.findall(r'"(RAY_SERVE_\w+_PORT)"', text))
    folders = set(re.findall(r'"(RAY_SERVE_\w+)", "/tmp', text))
    # without a default, so that the configured port is taken
    ports -= {"RAY_SERVE_WORKER_PROXY_HTTP_PORT", "RAY_SERVE_WORKER_PROXY_GRPC_PORT"}
    assert len(folders) > 3
    assert (ports | folders) - serve_environment(Path("/tmp/x")).keys() == set()


def test_the_printed_environment_is_a_cluster_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(cluster, "private_folder", lambda: tmp_path)
    cluster.print_environment()
    command = ["bash", "-c", capsys.readouterr().out + "env"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert f"RAY_FOLDER={tmp_path}" in found
    names = {line.partition("=")[0] for line in found}
    assert serve_environment(tmp_path).keys() <= names


def test_a_start_that_ray_gives_up_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    folders = []

    def busy(**options: Any) -> None:
        folders.append(options["_temp_dir"])
        if len(folders) < 3:
            raise Exception("The current node timed out during startup.")  # as Ray does

    monkeypatch.setattr(cluster, "_init", busy)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    monkeypatch.setattr(os, "environ", dict(os.environ, RAY_ADDRESS="local"))
    with ray_cluster(RayConfig(), runs_dir=tmp_path):
        assert len(set(folders)) == 3
    assert "Ray did not start, once more: The current node timed out" in caplog.text


def test_a_start_that_fails_for_too_long_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(**_: Any) -> None:
        raise RuntimeError("no raylet")

    monkeypatch.setattr(cluster, "_init", broken)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    monkeypatch.setattr(os, "environ", dict(os.environ, RAY_ADDRESS="local"))
    cfg = RayConfig(start_timeout_s=0.01)
    with (
        pytest.raises(Outage, match=r"within 0 s \(ray.start_timeout_s\): no raylet"),
        ray_cluster(cfg, runs_dir=tmp_path),
    ):
        pass


def test_every_variable_is_one_that_ray_reads():
    files = ("ray/serve/_private/constants.py", "ray/_private/ray_constants.py")
    text = "".join(
        next(Path(sys.prefix).glob(f"lib/python*/site-packages/{file}")).read_text()
        for file in files
    )
    assert [name for name in serve_environment(Path("/tmp/x")) if f'"{name}"' not in text] == []


def test_the_user_may_switch_the_ingress_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    assert serve_environment(Path("/tmp/x"))["RAY_SERVE_ENABLE_HA_PROXY"] == "0"


def test_the_token_is_ours_private_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    use_token(tmp_path)
    path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    token = path.read_text()
    assert path.parent == tmp_path
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(token) == 64
    use_token(tmp_path)
    assert path.read_text() == token
    assert list(tmp_path.iterdir()) == [path]


def test_nobody_finds_half_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    path = tmp_path / ".ray-token"

    def look_meanwhile(_: int) -> str:
        assert not path.exists(), "another job would read an empty token"
        return "a" * 64

    monkeypatch.setattr(cluster.secrets, "token_hex", look_meanwhile)
    use_token(tmp_path)
    assert path.read_text() == "a" * 64


def test_the_first_of_two_tokens_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first job's cluster has read it."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    path = tmp_path / ".ray-token"

    def come_second(_: int) -> str:
        path.write_text("b" * 64)
        return "a" * 64

    monkeypatch.setattr(cluster.secrets, "token_hex", come_second)
    use_token(tmp_path)
    assert path.read_text() == "b" * 64
    assert list(tmp_path.iterdir()) == [path]


def test_authentication_chosen_by_the_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    use_token(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("address", "kind"), [("127.0.0.1:1", Outage), ("nonsense", UserError)])
def test_an_address_where_no_cluster_is(
    address: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
):
    """One that does not answer is worth another try, one of no form is not."""
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    with (
        pytest.raises(kind, match=f"ray.address: no Ray cluster to join at '{address}'"),
        ray_cluster(RayConfig(address=address)),
    ):
        pass


@pytest.mark.cluster
def test_a_connection_that_is_there_is_used_and_left_open(local_ray: None):
    import ray

    before = ray.get_runtime_context().gcs_address
    with ray_cluster(RayConfig(num_cpus=1)):
        assert ray.get_runtime_context().gcs_address == before
    assert ray.is_initialized()


@pytest.mark.cluster
def test_a_second_cluster_lives_and_ends_beside_the_first(local_ray: None, tmp_path: Path):
    """Another process starts its own, ends it, and leaves neither a folder nor a word in the home
    directory.
    """
    import ray

    program = (
        "import ray\n"
        "from pathlib import Path\n"
        "from pipeline.cluster import ray_cluster\n"
        "from pipeline.config import RayConfig\n"
        "with ray_cluster(RayConfig(num_cpus=1, object_store_mb=100), "
        f"runs_dir={str(tmp_path)!r}):\n"
        "    print('address', ray.get_runtime_context().gcs_address, "
        "ray.cluster_resources()['CPU'])\n"
        "    print('folder', ray._private.worker._global_node.get_temp_dir_path())\n"
        "print('open', ray.is_initialized())\n"
    )
    hidden = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    words = dict(
        line.split(" ", 1)
        for line in done.stdout.splitlines()
        if line.split(" ")[0] in ("address", "folder", "open")
    )
    assert words["address"] != f"{ray.get_runtime_context().gcs_address} 1.0"
    assert words["address"].endswith(" 1.0")
    assert words["open"] == "False"
    assert not Path(words["folder"]).exists()
    assert not (tmp_path / ".ray").exists()
    assert ray.cluster_resources()["CPU"] == 4


def test_sigterm_stops_what_was_started(tmp_path: Path):
    """A job that takes longer than Ray's 3 s to stop still stops everything, and exits with its own
    code.
    """
    program = (
        "import signal, sys, time\n"
        "import ray\n"
        "from pipeline.cluster import ray_cluster\n"
        "from pipeline.config import RayConfig\n"
        "signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))\n"
        "with ray_cluster(RayConfig(num_cpus=1, object_store_mb=100), "
        f"runs_dir={str(tmp_path)!r}):\n"
        "    print(ray._private.worker._global_node.get_temp_dir_path(), flush=True)\n"
        "    try:\n"
        "        time.sleep(300)\n"
        "    finally:\n"
        "        time.sleep(4)\n"
    )
    hidden = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_GCS_SERVER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    assert folder.exists()
    process.terminate()
    assert process.wait(PATIENCE_S) == 128 + 15
    assert not folder.exists()


def test_free_ports_are_free_and_no_outgoing_connection_gets_one():
    found = {cluster.free_port() for _ in range(5)}
    assert len(found) > 1
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(found) < lowest


def test_no_two_processes_take_the_same_block_of_ports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each cluster has its own block until there is none; one that ends gives its block back."""
    few = range(20_000, 20_000 + 6 * (2 * cluster.REPLICA_PORTS + 1))
    code = (
        "import sys; from pathlib import Path; from pipeline import cluster\n"
        f"cluster.BLOCKS_OF_PORTS = {few}\n"
        "for n in range(2):\n"
        "    print(cluster.reserve_replica_ports(Path(str(n))), flush=True)\n"
        "sys.stdin.read()"
    )
    monkeypatch.setattr(cluster, "BLOCKS_OF_PORTS", few)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=-1, stdout=-1, cwd=ROOT, text=True
    ) as other:
        assert other.stdin is not None and other.stdout is not None
        theirs = {int(other.stdout.readline()) for _ in range(2)}

        ours: list[int] = []

        def take_all() -> None:
            for _ in range(len(few)):
                ours.append(cluster.reserve_replica_ports(tmp_path / str(len(ours))))

        with pytest.raises(Outage, match="taken"):
            take_all()
        assert len(theirs) == 2
        assert theirs.isdisjoint(ours)
        assert len(set(ours)) == len(ours) > 0

        cluster.release_replica_ports(tmp_path / "0")
        assert cluster.reserve_replica_ports(tmp_path / "0") == ours[0]
        for number in range(len(ours)):
            cluster.release_replica_ports(tmp_path / str(number))
        other.stdin.close()


def test_a_shell_reads_the_printed_environment_as_it_is_meant(tmp_path: Path) -> None:
    """By the guide's own line; a value of two words lost the second."""
    command = f'eval "$({sys.executable} -m pipeline.cluster)" && env -0'
    environment = {**os.environ, "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stderr == ""

    found = dict(line.partition("=")[::2] for line in done.stdout.split("\0"))
    folder = Path(found["RAY_FOLDER"])
    folder.rmdir()
    assert found["RAY_SERVE_HAPROXY_RETRY_ON"] == "conn-failure empty-response"
    assert found["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"] == f"{folder}/haproxy/haproxy.cfg"
