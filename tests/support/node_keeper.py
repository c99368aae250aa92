"""A Ray cluster of several nodes on this machine, in a process of its own: `python
tests/support/node_keeper.py FOLDER`.

A head without CPUs and workers of one CPU each. It prints the head's address, then does what it
reads, a line each,
and answers "done": `add NAME` starts a worker, `kill NAME` ends all its processes at once, as when
a machine is lost. At the end of its input it stops the rest. A worker's tasks see its name as their
AWS access key.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path

MB = 2**20


def main(folder: str) -> None:
    # Ray notes there what "the" cluster is, and not for the whole machine
    os.environ["RAY_TMPDIR"] = folder
    from ray.cluster_utils import Cluster

    common = {"object_store_memory": 120 * MB, "include_dashboard": False}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "gcs_server_port": 0, **common}
    )
    nodes = {}
    print(cluster.address, flush=True)
    try:
        for line in sys.stdin:
            what, name = line.split()
            mark = f"{folder}/{name}"
            if what == "add":
                env = {"AWS_ACCESS_KEY_ID": name, "NODE": mark}
                nodes[name] = cluster.add_node(num_cpus=1, env_vars=env, **common)
            else:
                kill_all(mark)
                cluster.remove_node(nodes.pop(name), allow_graceful=False)
            print("done", flush=True)
    finally:
        cluster.shutdown()


def kill_all(mark: str) -> None:
    """Every process with this mark in its environment: the raylet, its agents and its workers."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # no process, somebody else's, or ended meanwhile
            if f"NODE={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
