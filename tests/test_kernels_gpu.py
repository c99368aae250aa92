"""The kernels on a GPU: the benchmarks' parity suites, at real sizes and in all types.

Without one, that they run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def gpu_check(*options: str, **environment: str) -> None:
    """In its own process: this one interprets the kernels."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu_check", *options]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        command,
        env=inherited | environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_parity_on_the_device():
    gpu_check("--seconds", "500")


def test_the_gpu_benchmarks_run_in_the_interpreter():
    """At tiny sizes: a broken import or argument must not wait for a GPU to be found."""
    gpu_check("--smoke", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
