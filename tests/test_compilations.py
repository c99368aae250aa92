"""No later batch waits for the compiler: after a warm-up every kernel has all its forms."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from kernels import compilations

WARM_UP, BATCHES = 20, 800


def test_random_batches_need_no_form_of_a_kernel_that_a_warm_up_has_not() -> None:
    """The keys under which Triton looks for compiled code, as its own binder makes them."""
    script = Path(__file__).parent / "support" / "launch_keys.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script, str(WARM_UP), str(BATCHES)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    after_warm_up, after_all = json.loads(done.stdout)
    assert after_all == after_warm_up

    # masks, bias or none, and without a window the two classes of lengths of the tile table; two of
    # the sampled softmax
    assert after_all["forward"] == 6
    assert after_all["backward_keys"] == 3
    assert after_all["forward_cached"] == 2
    assert len(after_all) >= 20


def test_what_is_compiled_is_counted_beside_another_hook() -> None:
    told = []
    runtime = SimpleNamespace(jit_post_compile_hook=lambda **more: told.append(more["fn"].name))
    compilations.count_in(runtime)
    before = compilations.count_compilations()

    for name in ("kernels.linear.linear", "forward", "forward"):
        runtime.jit_post_compile_hook(fn=SimpleNamespace(name=name))
    assert compilations.count_compilations() == before + 3
    assert compilations.compilations_by_kernel()["forward"] >= 2
    assert told == ["kernels.linear.linear", "forward", "forward"]
