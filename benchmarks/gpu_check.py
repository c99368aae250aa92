"""Every kernel's parity on the GPU at hand, within a time: the first thing to run on a new machine.

    python -m benchmarks.gpu_check [--seconds 220] [--only tokens model layer tables attention]
    [--out FILE] TRITON_INTERPRET=1 python -m benchmarks.gpu_check --smoke     # without a GPU: that
    checks and benchmarks run at all

Prints a line for each check that fails and one for each that found no time; ends with 1 if there is
any. What has run least on GPUs goes first. Then, without paying for parity again: `python -m
benchmarks.kernels.layer --checked FILE`, and so `benchmarks.kernels.attention`; `--parity-only` of
a benchmark is for its own checks alone.
"""

import argparse
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import DEVICE, Check, name_of, no_waiting, parity, versions
from benchmarks.kernels import (
    attention,
    attention_parity,
    layer,
    layer_parity,
    tables,
    tables_parity,
)
from benchmarks.training.model import model_config, random_batch, vocabulary
from kernels.compilations import compilations_by_kernel
from pipeline.batches.collate import SequenceBatch
from pipeline.batches.filling import BatchFiller
from pipeline.config import RunConfig
from pipeline.model.inference.cached_scoring import HistoryCache, encode_history
from pipeline.model.inference.graphed_model import GraphedModel
from pipeline.model.ranker import RankingModel
from pipeline.train.trainee import Trainee
from pipeline.train.waiting import HostNumbers, MessageClock

SEMI_LOCAL = {
    "attention": {"window": 256, "full_rows": 256},
    "truncate_after_layer": 1,
    "truncate_to": 256,
}


def check_token_backends(interleaved: bool, users: int, length: int, width: int) -> str | None:
    """The whole model in float32, its token encoder in Triton and in plain PyTorch: logits and all
    gradients.
    """
    results = []
    for backend in ("triton", "torch"):
        cfg = model_config(
            {**SEMI_LOCAL, "token_backend": backend, "merge": not interleaved}, 2, 2, width
        )
        batch = random_batch(cfg, users * length, length, 4, seed=0)
        results.append(logits_and_gradients(cfg, batch))
    return first_difference(*results)


def check_target_view(view: str, users: int, length: int, width: int) -> str | None:
    """The whole model in float32 on passes of requests that see different parts of the history, its
    attention in Triton and in plain PyTorch.
    """
    mask = {"window": length // 8, "full_rows": length // 10}
    model = {"attention": mask, "truncate_after_layer": 1, "truncate_to": length // 3}
    results = []
    for backend in ("triton", "torch"):
        cfg = model_config({**model, "attention_backend": backend}, 2, 2, width)
        cfg = replace(cfg, train=replace(cfg.train, target_view=view))
        batch = random_batch(cfg, users * length, length, 4, seed=0)
        # the first candidate of a user sees half of the history, the last one all
        visible = torch.linspace(length // 2, length, 4).int().repeat(users)
        span = torch.full((users,), length - length // 2, dtype=torch.int32)
        shared = replace(batch, target_visible=visible, target_span=span)
        results.append(logits_and_gradients(cfg, shared))
    return first_difference(*results)


def logits_and_gradients(cfg: RunConfig, batch: SequenceBatch) -> dict[str, Tensor]:
    # here and below: some of the model's own operations have no such form
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    model = RankingModel(cfg, vocabulary(cfg).vocab_sizes, dict.fromkeys(cfg.tasks, 0.2))
    model = model.to(DEVICE).train()
    logits = model(batch.to(DEVICE))
    logits.square().sum().backward()

    found = {"logits": logits.detach()}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is None:
            continue
        if grad.is_sparse:  # not `to_dense`, whose sums may come in any order
            dense = torch.zeros_like(parameter)
            grad = dense.index_add_(0, grad._indices()[0], grad._values())
        found[name] = grad
    return found


def first_difference(fast: dict[str, Tensor], plain: dict[str, Tensor]) -> str | None:
    if fast.keys() != plain.keys():
        return f"gradients of {sorted(fast.keys() ^ plain.keys())} in one form alone"
    for name, expected in plain.items():
        error = ((fast[name] - expected).norm() / expected.norm().clamp(min=1e-12)).item()
        if not error <= 1e-3:
            return f"{name}: {error:.1e} from plain PyTorch's"
    return None


def check_training(steps: int = 5) -> str | None:
    """A few steps in bfloat16: losses as with the token encoder in plain PyTorch, and the same in a
    second run.
    """
    torch.use_deterministic_algorithms(False)
    runs = []
    for backend in ("triton", "triton", "torch"):
        cfg = model_config({**SEMI_LOCAL, "token_backend": backend}, 2, 2, 64)
        batch = random_batch(cfg, 8192, 1024, 16, seed=0).to(DEVICE)
        torch.manual_seed(0)
        trainee = Trainee(cfg, vocabulary(cfg), DEVICE, rank=0, world_size=1)
        runs.append(torch.stack([trainee.step(batch, step, 100)[0].sum() for step in range(steps)]))
    fast, again, plain = runs
    if not torch.equal(fast, again):
        return f"losses of two runs differ: {fast.tolist()} and {again.tolist()}"
    error = ((fast - plain).abs() / plain.abs()).max().item()
    return (
        None
        if error <= 0.02
        else f"losses {fast.tolist()} where plain PyTorch has {plain.tolist()}"
    )


def check_graphs(settings: dict[str, Any], precision: str = "bf16") -> str | None:
    """Steps replayed from CUDA graphs train bit for bit as the same steps launched one by one."""
    torch.use_deterministic_algorithms(False)
    cfg = model_config({**settings, "dropout": 0.1}, 3, 2, 64)
    cfg = replace(cfg, features=replace(cfg.features, item_id_dropout=0.1))
    filler = BatchFiller.of_run(cfg)
    batches = []
    for seed, (events, length) in enumerate([(8192, 1024), (8192, 1024), (4000, 500)]):
        filled = filler.fill(random_batch(cfg, events, length, 16, seed))
        batches.append(filled.pack(pin_memory=True).to(DEVICE))

    found = []
    for graphs in ("on", "off"):
        torch.manual_seed(0)
        train = replace(cfg.train, cuda_graphs=graphs, precision=precision)
        of_graphs = replace(cfg, train=train)
        trainee = Trainee(of_graphs, vocabulary(cfg), DEVICE, rank=0, world_size=1)
        sums = [torch.cat(trainee.step(batches[i % 3], i, 100)) for i in range(7)]
        found.append(trainee.tensors() | {"sums": torch.stack(sums)})

    replayed, launched = found
    wrong = [name for name in launched if not torch.equal(replayed[name], launched[name])]
    return f"{len(wrong)} of {len(launched)} differ: {wrong[:5]}" if wrong else None


def check_graphed_model(settings: dict[str, Any], precision: str = "bf16") -> str | None:
    """Passes replayed from CUDA graphs give the logits of the same passes launched, to the last
    bit, and the histories that a launched pass over the history alone encodes.
    """
    torch.use_deterministic_algorithms(False)
    cfg = model_config({**settings, "dropout": 0.0}, 3, 2, 64)
    torch.manual_seed(0)
    maps = vocabulary(cfg)
    model = RankingModel(cfg, maps.vocab_sizes, maps.base_rates).eval().requires_grad_(False)
    model = model.to(DEVICE)
    graphed = GraphedModel(model, cfg)
    half = torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16")
    near = 0.02 if precision == "bf16" else 1e-4

    with torch.no_grad(), half:
        for seed in range(4):
            batch = random_batch(cfg, 8 * 1000, 1000, 16, seed)
            filled = graphed.fill(batch)
            (launched,) = graphed._score(filled)
            num_targets = int(batch.num_targets.sum())
            found = graphed.score_filled(filled, num_targets)
            if not torch.equal(found, launched[:num_targets]):
                return f"logits of pass {seed} differ from the launched ones"
            if cfg.model.encoder != "ultra_hstu":
                continue

            history = random_batch(cfg, 3000 + seed, 3000 + seed, 0, seed)
            history = replace(history, labels=None, label_weight=None)
            caches = graphed.encode_history(history), encode_history(model, history.to(DEVICE))
            difference = values_apart(*caches)
            if not difference <= near:
                return f"values of history {seed} are {difference:.1e} from the launched ones"
    if (graphed._scoring.replayed, graphed._scoring.captured) != (3, 1):
        return f"{graphed._scoring.replayed} passes replayed, {graphed._scoring.captured} recorded"
    return None


def values_apart(one: HistoryCache, other: HistoryCache) -> float:
    """The largest difference of any layer's values, in parts of their norm."""
    found = []
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        expected = theirs.v_THV.float()
        found.append(float((mine.v_THV.float() - expected).norm() / expected.norm()))
    return max(found)


def check_waiting() -> str | None:
    """A training step never makes the host wait for the device."""
    torch.use_deterministic_algorithms(False)
    cfg = model_config(SEMI_LOCAL, 2, 2, 64)
    batch = random_batch(cfg, 8192, 1024, 16, seed=0).to(DEVICE)
    trainee = Trainee(cfg, vocabulary(cfg), DEVICE, rank=0, world_size=1)
    for step in range(2):  # compiles kernels, makes the optimizers' state
        trainee.step(batch, step, 100)
    with no_waiting():
        trainee.step(batch, 2, 100)
    return None


def check_transfer() -> str | None:
    """Batches that go over while the device is at work arrive whole, and nobody waits for them."""
    cfg = model_config(SEMI_LOCAL, 2, 2, 64)
    pinned = DEVICE == "cuda"
    batches = [random_batch(cfg, 8192, 1024, 16, seed).pack(pin_memory=pinned) for seed in range(6)]
    busy = torch.randn(4096 if pinned else 64, 4096 if pinned else 64, device=DEVICE)
    found = []
    with no_waiting():
        for batch in batches * 4:
            busy = (busy @ busy).clamp(-1, 1)
            there = batch.to(DEVICE)
            found.append({name: x.double().sum() for name, x in there.tensors.items()})
            del there  # its memory may be given away before it was read
    for number, sums in enumerate(found):
        for name, expected in batches[number % 6].tensors.items():
            if float(sums[name]) != float(expected.double().sum()):
                return f"column {name} of batch {number} arrived changed"
    return None


def check_beside() -> str | None:
    """Numbers asked for beside the device's work are of what was given, though that is dropped and
    its memory taken by others at once.
    """
    numbers = HostNumbers(DEVICE, MessageClock(DEVICE))
    size = 4096 if DEVICE == "cuda" else 64
    busy = torch.randn(size, size, device=DEVICE)
    for number in range(20):
        codes = torch.full((2**16,), number, device=DEVICE)
        with numbers.beside([codes]):
            for _ in range(4):  # it comes to the codes late
                busy = (busy @ busy).clamp(-1, 1)
            read = numbers.ask(None, codes.sum)
        del codes
        torch.full((2**16,), -1, device=DEVICE)
        if read() != number * 2**16:
            return f"{read()} in place of {number * 2**16}"
    return None


def check_compilations(warm_up: int = 8, steps: int = 120) -> str | None:
    """Training steps of other sizes compile nothing after the first few."""
    added = late_compilations(warm_up, steps)
    return f"compiled after {warm_up} steps: {dict(added)}" if added else None


def late_compilations(warm_up: int, steps: int) -> Counter[str]:
    """Compilations by kernel in `steps` training steps over batches of random sizes, after
    `warm_up` others.
    """
    torch.use_deterministic_algorithms(False)
    cfg = model_config(SEMI_LOCAL, 2, 2, 64)
    trainee = Trainee(cfg, vocabulary(cfg), DEVICE, rank=0, world_size=1)
    draw = random.Random(0)
    for number in range(warm_up + steps):
        if number == warm_up:
            before = compilations_by_kernel()
        # the two classes of lengths of the tile table, then any
        length = (700, 2000)[number % 2] if number < warm_up else draw.randint(40, 2000)
        batch = random_batch(cfg, length * draw.randint(1, 20), length, 16, seed=number)
        trainee.step(batch.to(DEVICE), number, warm_up + steps)
    return Counter(compilations_by_kernel()) - Counter(before)


def model_checks() -> list[Check]:
    sizes = (8, 1024, 64), (3, 40, 16)
    models: list[Check] = [
        (check_token_backends, merged, *size) for size in sizes for merged in (False, True)
    ]
    views: list[Check] = [(check_target_view, view, 8, 1024, 64) for view in ("covering", "exact")]
    merged = {"encoder": "hstu_merged", "attention": {"window": None}, "relative_bias": True}
    graphs: list[Check] = [(check_graphs, SEMI_LOCAL), (check_graphs, SEMI_LOCAL, "fp32")]
    graphs.append((check_graphs, merged))
    graphs += [(check_graphed_model, SEMI_LOCAL), (check_graphed_model, SEMI_LOCAL, "fp32")]
    graphs += [(check_graphed_model, SEMI_LOCAL | {"fp8": True}), (check_graphed_model, merged)]
    steps: list[Check] = [(check_training,), (check_waiting,), (check_transfer,), (check_beside,)]
    steps += graphs
    return [*models, *views, *steps, (check_compilations,)]


SUITES = {
    "tokens": layer_parity.token_checks,
    "model": model_checks,
    "layer": layer_parity.layer_checks,
    "tables": tables_parity.parity_checks,
    "attention": attention_parity.parity_checks,
}
SMOKE = {
    "tokens": list,  # with the layer's
    "model": lambda: [
        (check_token_backends, False, 2, 10, 16),
        (check_target_view, "covering", 2, 20, 16),
        (check_target_view, "exact", 2, 20, 16),
        (check_transfer,),
        (check_beside,),
    ],
    "layer": layer_parity.smoke_checks,
    "tables": tables_parity.smoke_checks,
    "attention": attention_parity.smoke_checks,
}


def of_suite(checks: list[Check], wrong: list[str]) -> dict[str, object]:
    names = tuple(f"{name_of(check)}: " for check in checks)
    return {"cases": len(checks), "wrong": [line for line in wrong if line.startswith(names)]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=220, help="after which no further check is begun"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(SUITES), default=list(SUITES), metavar="SUITE"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="tiny checks and calls, in Triton's interpreter too"
    )
    parser.add_argument(
        "--out", type=Path, help="what was found, by suite, as JSON for --checked of the benchmarks"
    )
    arguments = parser.parse_args()
    suites = {name: (SMOKE if arguments.smoke else SUITES)[name]() for name in arguments.only}
    wrong = parity([check for checks in suites.values() for check in checks], arguments.seconds)
    if arguments.out:
        found = {name: of_suite(checks, wrong) for name, checks in suites.items()}
        arguments.out.write_text(
            json.dumps({"machine": versions(), "parity": found}, indent=1) + "\n"
        )
    if arguments.smoke:
        for benchmark in (layer, tables, attention):
            benchmark.smoke()
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
