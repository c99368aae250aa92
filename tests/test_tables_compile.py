"""The kernels of tables and jagged rows build for Hopper: no spills, no atomics, 16 bytes a thread
and access.
"""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_hopper_builds():
    script = Path(__file__).parent / "support" / "compile_tables.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    builds = json.loads(done.stdout)
    assert len(builds) >= 10
    for name, build in builds.items():
        assert build["stack"] == 0, f"{name}: spills"
        assert build["atomics"] == 0, f"{name}: sums would depend on timing"
        # of 65,536 on a multiprocessor; programs of large products are alone there
        threads, programs = 32 * build["warps"], 1 if name.startswith("product ") else 3
        assert build["registers"] * threads <= 65_536 // programs, (
            f"{name}: fewer than {programs} programs would fit on a multiprocessor"
        )
        if name.startswith(("update_rows", "finish_rows")):
            assert build["written_after_all_read"], (
                f"{name}: threads that share a number race for it"
            )
        if name.startswith(("half ", "product ")):
            # rows are on their way while others are multiplied
            assert build["copies_ahead"] > 0 and build["tensor_cores"] > 0, name
        elif not name.startswith("pair_keys"):  # it puts each key in a place of its own
            assert build["wide_loads"] + build["wide_stores"] > 0, name
