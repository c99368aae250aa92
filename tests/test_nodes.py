"""A machine is lost in the middle of a build, and in the middle of training: the jobs finish, with
the same result.

A cluster of a head and two workers on this machine (tests/support/node_keeper.py), jobs joined to
it as submitted ones are."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from pipeline import config
from pipeline.config import RunConfig
from pipeline.logs import import_logs
from pipeline.schema import LOG_OPTIONAL, ROW_DIGEST
from pipeline.sequences import store
from tests.support.patience import PATIENCE_S
from tests.support.s3_server import Bucket, s3_bucket
from tests.worlds.tiny import publish_sequences, tiny_config

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.nodes, pytest.mark.timeout(600)]


@dataclass
class JobProcess:
    process: subprocess.Popen
    log: Path

    def wait_for(self, what: str, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            code = self.process.poll()
            assert code is None, f"the job ended with {code} before {what}:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, (
                f"waited {PATIENCE_S} s for {what}:\n{self.log.read_text()}"
            )
            time.sleep(0.02)


class Nodes:
    """The cluster: `add` and `kill` its workers, run jobs on it."""

    def __init__(self, folder: Path) -> None:
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "AWS_ACCESS_KEY_ID": "driver",
        }
        self.keeper = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "support" / "node_keeper.py", folder],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = self._answer()

    def _answer(self) -> str:
        assert self.keeper.stdout is not None
        answer = self.keeper.stdout.readline().strip()
        assert answer, f"the cluster ended with {self.keeper.wait(PATIENCE_S)}"
        return answer

    def _ask(self, line: str) -> None:
        assert self.keeper.stdin is not None
        self.keeper.stdin.write(f"{line}\n")
        self.keeper.stdin.flush()
        assert self._answer() == "done"

    def add(self, name: str) -> None:
        self._ask(f"add {name}")

    def kill(self, name: str) -> None:
        self._ask(f"kill {name}")

    @contextmanager
    def job(self, cfg: RunConfig, module: str, *options: str) -> Iterator["JobProcess"]:
        """`python -m module` on this cluster; at the end of the block it has ended well, or its
        output is the error.
        """
        cfg = replace(cfg, ray=replace(cfg.ray, address=self.address))
        cfg.run_dir.mkdir(parents=True, exist_ok=True)
        preset, log = cfg.run_dir / "preset.yaml", cfg.run_dir / "job.log"
        # the order of features counts
        preset.write_text(yaml.safe_dump(config.to_dict(cfg), sort_keys=False))
        command = [sys.executable, "-m", module, "--config", str(preset), *options]
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=output, stderr=output
            )
        job = JobProcess(process, log)
        try:
            yield job
            job.wait_for("the end", lambda: process.poll() is not None)
            assert process.returncode == 0, log.read_text()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def close(self) -> None:
        assert self.keeper.stdin is not None
        self.keeper.stdin.close()
        assert self.keeper.wait(PATIENCE_S) == 0


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    # short: socket paths end at 107 characters
    folder = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))
    nodes = Nodes(folder)
    try:
        yield nodes
    finally:
        nodes.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_build_loses_a_node_that_was_reading(local_ray: None, nodes: Nodes, tmp_path: Path):
    """Logs in S3; the store keeps a task's request waiting, and while it waits the machine is gone;
    another comes.
    """
    from pipeline.sequences.build import build_sequences

    few = ["source.synthetic.num_users=60", "source.synthetic.rows_per_file=500"]
    logs = config.load(ROOT / "configs" / "smoke.yaml", [f"runs_dir={tmp_path}", "name=logs", *few])
    import_logs(logs)
    with s3_bucket() as bucket:
        bucket.upload(logs.log_dir, "smoke")
        lost = from_parquet(logs, "lost", "s3://logs/smoke", bucket)
        nodes.add("dies")
        bucket.hold = "dies"
        with nodes.job(lost, "jobs.build_sequences") as job:
            job.wait_for("a task on the node asks for logs", bucket.held.is_set)
            nodes.kill("dies")
            bucket.release.set()
            nodes.add("stays")
    unbroken = build_sequences(from_parquet(logs, "unbroken", str(logs.log_dir)))
    assert store.read_manifest(lost.sequence_dir) == unbroken


def from_parquet(logs: RunConfig, name: str, root: str, bucket: Bucket | None = None) -> RunConfig:
    """The configuration that reads what the generator wrote, as a user's own Parquet."""
    options = bucket.options if bucket else ""
    sides = {"users": "user_id", "items": "item_id"}
    tables = {
        key: {"path": f"{root}/{key}.parquet{options}", "id_column": sides[key]} for key in sides
    }
    raw = config.to_dict(logs) | {"name": name}
    raw["source"] |= {"kind": "parquet", "path": f"{root}/log{options}", **tables}
    raw["source"]["columns"] = {name: name for name in (*LOG_OPTIONAL, ROW_DIGEST)}
    return config.from_dict(raw)


def test_training_loses_the_node_of_one_of_its_workers(
    local_ray: None, nodes: Nodes, tmp_path: Path
):
    """Two workers on two nodes; one node goes and another comes, and no loss and no weight is
    different for it.
    """
    from pipeline.train import trainer

    train = {
        "epochs": 12,
        "batch_users": 2,
        "num_workers": 2,
        "log_every": 7,
        "checkpoint_every": 30,
    }
    unbroken = replace(tiny_config(tmp_path, train=train), name="unbroken")
    publish_sequences(unbroken)
    lost = replace(unbroken, name="lost")
    shutil.copytree(unbroken.sequence_dir, lost.sequence_dir)
    trainer.fit_model(unbroken)

    nodes.add("leaves")  # beside the one that the build left
    metrics = lost.run_dir / "train" / "metrics.jsonl"
    with nodes.job(lost, "jobs.train", "--no-tracking") as job:
        job.wait_for("step 31", lambda: metrics.exists() and last_step(metrics) > 30)
        nodes.kill("leaves")
        nodes.add("comes")
    assert job.log.read_text().count("Started training worker group") >= 2, (
        "training ended before its node was lost"
    )
    assert losses(lost) == losses(unbroken)
    expected, found = (load_file(cfg.model_dir / "model.safetensors") for cfg in (unbroken, lost))
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)


def last_step(metrics: Path) -> int:
    return max(
        (
            json.loads(line)["step"]
            for line in metrics.read_text().splitlines()
            if line.endswith("}")
        ),
        default=0,
    )


def losses(cfg: RunConfig) -> dict[int, dict[str, float]]:
    lines = [
        json.loads(line)
        for line in (cfg.run_dir / "train" / "metrics.jsonl").read_text().splitlines()
    ]
    return {
        line["step"]: {k: v for k, v in line.items() if k.startswith("train/loss")}
        for line in lines
    }
