"""One training in several ways that must agree bit for bit: plainly, in a process group, resumed,
and on Ray.

    python -m benchmarks.training.agreement [--device cuda] [--steps 50] [--ray]     →
    runs/train_ways_<device>.json

Meant for a GPU: the log names the device and the kernels' backend. Random batches, so no store is
read. `--ray` adds `TorchTrainer` with one worker (`ScalingConfig(use_gpu=True)` on cuda), where Ray
is installed.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.machine import environment
from benchmarks.report import write_run
from benchmarks.training.model import ULTRA, model_config, random_batch, vocabulary
from pipeline import config
from pipeline.batches.collate import SequenceBatch
from pipeline.config import RunConfig
from pipeline.train import loop
from pipeline.train.checkpoint import CheckpointFolder

ROOT = Path(__file__).parents[1]


class RandomBatches:
    """Another batch each step, the same ones in each run; of several ranks every one takes the
    whole step.
    """

    def __init__(self, cfg: RunConfig, steps: int, events: int, length: int) -> None:
        self.cfg, self.steps_per_epoch, self.events, self.length = cfg, steps, events, length

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[SequenceBatch]:
        for step in range(first_step, self.steps_per_epoch):
            yield random_batch(self.cfg, self.events, self.length, 16, seed=step)


def settings(options: argparse.Namespace) -> RunConfig:
    cfg = model_config(
        ULTRA | {"dropout": 0.1, "truncate_to": options.length // 4},
        layers=6,
        heads=4,
        width=options.width,
    )
    train = {
        "epochs": 1,
        "log_every": 1,
        "checkpoint_every": options.steps // 2,
        "keep_checkpoints": 2,
    }
    precision = "bf16" if options.device == "cuda" else "fp32"
    return replace(cfg, train=replace(cfg.train, precision=precision, warmup_steps=5, **train))


def losses(
    cfg: RunConfig, steps: int, events: int, length: int, device: str, folder: Path
) -> dict[int, float]:
    """By step, from the newest checkpoint in `folder` on."""
    checkpoints = CheckpointFolder(folder, 2)
    found: dict[int, float] = {}
    loop.train(
        cfg,
        vocabulary(cfg),
        RandomBatches(cfg, steps, events, length),
        "random",
        device=device,
        resume=checkpoints.newest(),
        checkpoints=checkpoints,
        log=lambda step, values: found.update({step: values["train/loss"]}),
    )
    return found


@contextmanager
def process_group(device: str) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def on_ray(cfg: RunConfig, device: str, sizes: dict[str, int], folder: Path) -> dict[int, float]:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipeline.cluster import ray_cluster

    use_gpu = device == "cuda"

    def worker(told: dict[str, Any]) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        found = losses(
            config.from_dict(told["cfg"]),
            **told["sizes"],
            device=device,
            folder=Path(told["folder"]),
        )
        Path(told["folder"], "losses.json").write_text(json.dumps(found))

    told = {"cfg": config.to_dict(cfg), "sizes": sizes, "folder": str(folder)}
    with ray_cluster(cfg.ray, runs_dir=folder / "ray"):
        scaling = ScalingConfig(num_workers=1, use_gpu=use_gpu)
        backend = TorchConfig(backend="nccl" if use_gpu else "gloo")
        TorchTrainer(
            worker, train_loop_config=told, scaling_config=scaling, torch_config=backend
        ).fit()
    return {
        int(step): loss for step, loss in json.loads((folder / "losses.json").read_text()).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--events", type=int, default=16_384, help="of a step")
    parser.add_argument("--length", type=int, default=4096, help="of a user's history")
    parser.add_argument("--width", type=int, default=128, help="of a head, of which there are four")
    parser.add_argument("--ray", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    cfg = settings(options)
    sizes = {"steps": options.steps, "events": options.events, "length": options.length}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = losses(cfg, **sizes, device=options.device, folder=folder / "plain")
        ways = {}
        with process_group(options.device):
            ways["in a process group"] = losses(
                cfg, **sizes, device=options.device, folder=folder / "group"
            )
        middle = CheckpointFolder(folder / "plain", 2).folders()[0]
        (folder / "resumed").mkdir()
        middle.rename(folder / "resumed" / middle.name)
        ways["resumed"] = losses(cfg, **sizes, device=options.device, folder=folder / "resumed")
        if options.ray:
            (folder / "on_ray").mkdir()
            ways["TorchTrainer"] = on_ray(cfg, options.device, sizes, folder / "on_ray")
    apart = {
        way: max(abs(plain[step] - loss) for step, loss in found.items())
        for way, found in ways.items()
    }
    result = {
        "environment": environment(options.device),
        **sizes,
        "losses": plain,
        "largest_difference": apart,
    }
    path = ROOT / "runs" / f"train_ways_{options.device}.json"
    write_run(path, result)
    for way, found in ways.items():
        print(
            f"{way}: {len(found)} steps, largest difference of a loss from the plain loop "
            f"{apart[way]:.1e}"
        )
    print(f"loss {plain[1]:.4f} to {plain[options.steps]:.4f}; {path}")


if __name__ == "__main__":
    main()
