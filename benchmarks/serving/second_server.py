"""A server beside the one that is measured: a process with a Ray cluster of its own.

    python -m benchmarks.serving.second_server --runs-dir DIR

Prints where it answers, as JSON. A line on its standard input is a kind of process to kill
(`stage.find_pids`), answered by a line of JSON; it ends with its input.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.serving.stage import PRESET, ROOT, TRIVIAL, Stage, kill_one
from pipeline import config, logs
from pipeline.cluster import ray_cluster
from pipeline.sequences import build

VERSION = 2  # of its model; that of the other one is another


@dataclass(frozen=True)
class SecondServer:
    """The other process, seen from this one."""

    url: str
    serving: Path  # its folder with the event store
    commands: IO[str]
    answers: IO[str]

    def kill_one(self, kind: str) -> bool:
        """As `stage.kill_one`, over there."""
        self.commands.write(f"{kind}\n")
        self.commands.flush()
        return json.loads(self.answers.readline())


@contextmanager
def second_server(runs_dir: Path) -> Iterator[SecondServer]:
    """A server in a process of its own, for the length of the block."""
    command = [sys.executable, "-m", "benchmarks.serving.second_server"]
    command += ["--runs-dir", str(runs_dir)]
    # what Ray knows of this process' cluster is not for that one
    environment = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        said = json.loads(process.stdout.readline())
        yield SecondServer(said["url"], Path(said["serving"]), process.stdin, process.stdout)
        process.stdin.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs-dir", required=True)
    options = parser.parse_args()

    own = [f"runs_dir={options.runs_dir}", "source.synthetic.num_users=50"]
    cfg = config.load(PRESET, own)
    # whatever libraries print, standard output has this module's lines alone
    out, sys.stdout = sys.stdout, sys.stderr
    with ray_cluster(cfg.ray, runs_dir=cfg.runs_dir, include_dashboard=True) as cluster:
        logs.import_logs(cfg)
        build.build_sequences(cfg)
        url = Stage(cfg, cluster.dashboard_url, 0.0).deploy(VERSION, apart=True, **TRIVIAL)
        print(json.dumps({"url": url, "serving": str(cfg.run_dir / "serving")}), file=out)
        out.flush()
        for line in sys.stdin:
            print(json.dumps(kill_one(line.strip())), file=out)
            out.flush()


if __name__ == "__main__":
    main()
