"""One training step of the whole model as a profiler sees it: its kernels by kind.

A section of `benchmarks.kernels.layer`.
"""

import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import DEVICE
from benchmarks.training.model import model_config, random_batch, vocabulary
from kernels.stu.recompute import RECOMPUTABLE
from pipeline.train.trainee import Trainee

STEPS = 3
OURS = {
    "attention": (
        "forward",
        "backward_queries",
        "backward_keys",
        "count_tiles",
        "write_row_tiles",
        "write_key_tiles",
    ),
    "the layer's products": ("linear",),
    "the layer's row kernels": (
        "norm_forward",
        "norm_backward",
        "gate_forward",
        "gate_backward",
        "quantize",
    ),
    "the token encoder": (
        "swish_forward",
        "swish_backward",
        "add_forward",
        "name_rows",
        "sum_runs",
        "finish_runs",
    ),
    "table optimizer": ("update_rows", "finish_rows"),
}


def training_step(
    users: int = 16, length: int = 4096, layers: int = 6, heads: int = 4, width: int = 128
) -> dict[str, Any]:
    """The kernels of one step, by name."""
    settings = {
        "attention": {"window": 256, "full_rows": 256, "scaling_seq_len": 4096},
        "recompute": list(RECOMPUTABLE),
        "dropout": 0.1,
    }
    cfg = model_config(settings, layers, heads, width)
    trainee = Trainee(cfg, vocabulary(cfg), DEVICE, rank=0, world_size=1)
    targets = length // 16
    batch = random_batch(cfg, users * (length - targets), length - targets, targets, seed=0).to(
        DEVICE
    )

    def run(steps: int) -> None:
        for step in range(steps):
            trainee.step(batch, step, 100)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    run(STEPS)
    begin = time.perf_counter()
    run(STEPS)
    wall_ms = (time.perf_counter() - begin) / STEPS * 1e3
    with profile(
        activities=[ProfilerActivity.CUDA if DEVICE == "cuda" else ProfilerActivity.CPU]
    ) as seen:
        run(STEPS)
    kernels = {
        event.key: (event.self_device_time_total / 1e3 / STEPS, event.count / STEPS)
        for event in seen.key_averages()
        if event.self_device_time_total > 0
    }
    total = sum(ms for ms, _ in kernels.values())
    groups: dict[str, float] = {}
    for name, (ms, _) in kernels.items():
        groups[kernel_group(name)] = groups.get(kernel_group(name), 0.0) + ms
    largest = sorted(kernels.items(), key=lambda item: -item[1][0])[:30]
    return {
        "tokens": users * length,
        "layers": layers,
        "device_ms": total,
        "wall_ms": wall_ms,
        "launches": sum(count for _, count in kernels.values()),
        "groups": {
            name: ms / total for name, ms in sorted(groups.items(), key=lambda item: -item[1])
        },
        "kernels": [
            {"name": name[:100], "ms": ms, "calls": calls} for name, (ms, calls) in largest
        ],
    }


def kernel_group(name: str) -> str:
    """What a kernel of the listing is, by its name."""
    for group, names in OURS.items():
        if name in names:
            return f"ours: {group}"
    lower = name.lower()
    if any(word in lower for word in ("gemm", "cutlass", "nvjet", "xmma", "splitk", "gemv")):
        return "library products"
    if "elementwise" in lower or "foreach" in lower or "multi_tensor" in lower:
        return "elementwise"
    if "memcpy" in lower or "memset" in lower:
        return "copies"
    return "other of PyTorch: norms, sums, sorts, gathers"
