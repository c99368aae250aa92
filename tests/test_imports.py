"""What runs where Ray and MLflow are not installed: kernels, the model, its training loop and the
data it reads.

Each module is imported in a process in which `import ray` and `import mlflow` fail, direct or
through others.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.reference.jobs import EXAMPLES

ROOT = Path(__file__).parent.parent
WITHOUT_RAY = (
    "kernels/**/*.py",
    "pipeline/config/*.py",
    "pipeline/schema.py",
    "pipeline/model/**/*.py",
    *(
        f"pipeline/train/{name}.py"
        for name in (
            "average",
            "checkpoint",
            "guards",
            "interruption",
            "loop",
            "metrics",
            "optim",
            "publish",
            "profile",
            "validation",
        )
    ),
    "pipeline/evaluate/*.py",
    "pipeline/search/space.py",
    "benchmarks/quality/study_points.py",
    "benchmarks/quality/train_plan.py",
    "benchmarks/training/sharding.py",
    *(
        f"pipeline/batches/{name}.py"
        for name in ("collate", "examples", "features", "loader", "stochastic_length")
    ),
    "pipeline/sequences/store.py",
    "pipeline/index/*.py",
    *(
        f"pipeline/recommend/{name}.py"
        for name in ("diversify", "filters", "offline", "retriever", "tables")
    ),
    "serve_app/ranking/ranker.py",
    "serve_app/recommend/recommender.py",
)
IMPORT_ALL = """
import importlib, sys
sys.modules.update(ray=None, mlflow=None)  # importing either raises ModuleNotFoundError
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def modules(pattern: str) -> list[str]:
    paths = (path.relative_to(ROOT).with_suffix("") for path in sorted(ROOT.glob(pattern)))
    return [".".join(path.parts).removesuffix(".__init__") for path in paths]


def import_blocked(names: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", IMPORT_ALL, *names]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_no_import_of_ray_or_mlflow():
    found = {pattern: modules(pattern) for pattern in WITHOUT_RAY}
    assert [pattern for pattern, names in found.items() if not names] == []
    done = import_blocked([name for names in found.values() for name in names])
    assert done.returncode == 0, done.stderr


# each job in turn, as `python -m` runs it, with what takes seconds to import blocked
RUN_JOBS = """
import json, runpy, sys
heavy = ("ray", "mlflow", "torch", "pandas", "matplotlib", "fastapi")
sys.modules.update(dict.fromkeys(heavy))
codes = {}
for name, options in json.loads(sys.argv[1]).items():
    sys.argv = [f"jobs/{name}.py", "--config", *options, "--set", "train.epoch=1"]
    try:
        runpy.run_module(f"jobs.{name}", run_name="__main__")
    except SystemExit as ended:
        codes[name] = ended.code
    except ModuleNotFoundError as error:
        codes[name] = str(error)
print(json.dumps(codes))
"""


def test_a_mistake_is_told_before_the_seconds_that_imports_take():
    options = {name: example.split() for name, example in EXAMPLES.items()}
    command = [sys.executable, "-c", RUN_JOBS, json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict.fromkeys(EXAMPLES, 2)
    assert done.stderr.count("unknown configuration key 'train.epoch'") == len(EXAMPLES)


CTRL_C = """
import runpy, sys

_, job, module, *arguments = sys.argv

class Interrupting:
    def find_spec(self, name, *_):
        if name == module:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupting())
sys.argv = [job, *arguments]
runpy.run_module(job, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("job", "module", "code"),
    [
        # before a job's own words for it are there Python ends itself by the signal
        ("jobs.inspect", "pyarrow", -signal.SIGINT),
        ("jobs.train", "pyarrow", -signal.SIGINT),
        ("jobs.inspect", "pandas", 128 + signal.SIGINT),
    ],
)
def test_ctrl_c_while_a_job_imports_is_one_line(job: str, module: str, code: int) -> None:
    command = [sys.executable, "-c", CTRL_C, job, module, "configs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (code, "stopped by Ctrl-C\n")


def test_waiting_alone_imports_no_client_of_http():
    program = "import sys, pipeline.waiting; print('httpx' in sys.modules)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_the_block_blocks():
    for name in ("ray", "mlflow", "ray.data"):
        done = import_blocked([name])
        assert done.returncode == 1
        assert "ModuleNotFoundError" in done.stderr
