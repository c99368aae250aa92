"""Every kernel's parity on the GPU at hand, within a time: the first thing to run on a new machine.

    python -m benchmarks.gpu_check --seconds 220 --out checked.json
    # some suites, some of their checks
    python -m benchmarks.gpu_check --only attention layer --match prefix "own view"
    # leaves the benchmarks' kernels compiled too
    python -m benchmarks.gpu_check --compile --out checked.json
    # without a GPU: that checks and benchmarks run at all
    TRITON_INTERPRET=1 python -m benchmarks.gpu_check --smoke

Prints a line for each check that fails and one for each that found no time; ends with 1 if there is
any. What has run least on GPUs goes first. Then, without paying for parity again: `python -m
benchmarks.kernels.layer --checked FILE`, and so `attention` and `tables`; with `--compile` they do
not wait for Triton either. `--parity-only` of a benchmark is for its own checks alone.
"""

import argparse
import json
import random
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu import (
    DEVICE,
    NOT_RUN,
    Check,
    name_of,
    no_waiting,
    parity,
    randint,
    randn,
    versions,
)
from benchmarks.kernels import (
    attention,
    attention_parity,
    layer,
    layer_parity,
    tables,
    tables_parity,
)
from benchmarks.serving.ranker import parts_of
from benchmarks.training.model import model_config, random_batch, vocabulary
from kernels.compilations import compilations_by_kernel
from pipeline.batches.collate import SequenceBatch
from pipeline.batches.features import FeatureMaps
from pipeline.batches.filling import BatchFiller
from pipeline.config import RunConfig
from pipeline.model.encoders.encoder import Encoded
from pipeline.model.encoders.stu import STU
from pipeline.model.inference.cached_scoring import (
    HistoryCache,
    encode_history,
    score_candidates,
)
from pipeline.model.inference.cuda_graph import GraphedScorer
from pipeline.model.inference.graphed_model import GraphedModel
from pipeline.model.ranker import RankingModel
from pipeline.train.reinforcement import pass_loss, step_log_shares
from pipeline.train.trainee import Trainee
from pipeline.train.waiting import HostNumbers, MessageClock
from serve_app.ranking.history_cache import CacheBudget, HistoryCaches

SEMI_LOCAL = {
    "attention": {"window": 256, "full_rows": 256},
    "truncate_after_layer": 1,
    "truncate_to": 256,
}


PLAIN_HSTU = {"encoder": "hstu_merged", "attention": {"window": None}}
# With 8 actions and few positions, batches of 7,200 tokens and more have their actions in a table.
TABLED = SEMI_LOCAL | {"position_buckets": 512, "candidate_action": "learned"}


def check_token_backends(
    settings: dict[str, Any], users: int, length: int, width: int
) -> str | None:
    """The whole model in float32, its token encoder in Triton and in plain PyTorch: logits and all
    gradients.
    """
    results = []
    for backend in ("triton", "torch"):
        cfg = model_config(settings | {"token_backend": backend}, 2, 2, width)
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
    bit, and the histories that a launched pass over the history alone encodes; those that go from a
    graph into pages are the same ones.
    """
    torch.use_deterministic_algorithms(False)
    cfg = model_config({**settings, "dropout": 0.0}, 3, 2, 64)
    torch.manual_seed(0)
    maps = vocabulary(cfg)
    model = RankingModel(cfg, maps.vocab_sizes, maps.base_rates).eval().requires_grad_(False)
    model = model.to(DEVICE)
    graphed = GraphedModel(model, cfg)
    kept = HistoryCaches(CacheBudget.of_mb(64, for_rooms=True))
    half = torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16")
    near = 0.02 if precision == "bf16" else 1e-4

    with torch.no_grad(), half:
        for seed in range(4):
            batch = random_batch(cfg, 8 * 1000, 1000, 16, seed)
            filled = graphed.fill(batch)
            launched = model(filled)
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

            key = bytes([seed])
            held = graphed.encode_kept(history, partial(kept.keep_entry, key))
            if isinstance(held, HistoryCache):
                return f"history {seed} was not kept"
            if not is_same_history(held.read(), caches[0]):
                return f"history {seed} differs in its pages"
            kept.release_entries([held])
    if (graphed._scoring.replayed, graphed._scoring.captured) != (3, 1):
        return f"{graphed._scoring.replayed} passes replayed, {graphed._scoring.captured} recorded"
    return None


def check_kept_history(settings: dict[str, Any], precision: str = "bf16") -> str | None:
    """Candidates of a history that is kept in pages, scored by a graph: the logits of a launched
    pass over the encoded history, to the last bit where as many candidates are a graph's size.
    """
    torch.use_deterministic_algorithms(False)
    cfg = model_config({**settings, "dropout": 0.0}, 3, 2, 64)
    torch.manual_seed(0)
    maps = vocabulary(cfg)
    model = RankingModel(cfg, maps.vocab_sizes, maps.base_rates).eval().requires_grad_(False)
    model = model.to(DEVICE)
    scorer, caches = GraphedScorer(), HistoryCaches(CacheBudget.of_mb(64, for_rooms=True))
    half = torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16")
    near = 0.02 if precision == "bf16" else 1e-4

    with torch.no_grad(), half:
        for seed, (events, num_candidates) in enumerate([(3000, 512), (700, 512), (2500, 300)]):
            batch = random_batch(cfg, events, events, num_candidates, seed)
            history, candidates = parts_of(replace(batch, labels=None, label_weight=None))
            encoded = encode_history(model, history.to(DEVICE))
            caches.keep_entry(bytes([seed]), encoded)
            held = caches.hold_entry(bytes([seed]))
            if held is None:
                return f"history {seed} was not kept"
            found = scorer(model, [held], candidates, num_candidates)
            caches.release_entries([held])

            launched = score_candidates(model, encoded, candidates.to(DEVICE), num_candidates)
            difference = (found - launched).abs().max().item()
            allowed = 0.0 if num_candidates == 512 else near
            if not difference <= allowed:
                return f"{num_candidates} candidates: {difference:.1e} from the launched pass"
    return None


def check_kept_orders(settings: dict[str, Any], orders: int = 4) -> str | None:
    """Kept histories of one bucket, some of which truncation cuts, in several orders: whichever
    comes first, for which the room is made, each has the logits of the launched pass.
    """
    torch.use_deterministic_algorithms(False)
    cfg = model_config(settings | {"dropout": 0.0, "truncate_to": 128}, 3, 2, 64)
    torch.manual_seed(0)
    maps = vocabulary(cfg)
    model = RankingModel(cfg, maps.vocab_sizes, maps.base_rates).eval().requires_grad_(False)
    model = model.to(DEVICE)
    # with their context in a room of 256 rows a layer; of the first two all rows are kept
    lengths = [100, 20, 250, 200, 160]
    for order in range(orders):
        if order:  # at first a short one before those that are cut
            random.Random(order).shuffle(lengths)
        scorer, caches = GraphedScorer(), HistoryCaches(CacheBudget.of_mb(64, for_rooms=True))
        for length in lengths:
            with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
                batch = random_batch(cfg, length, length, 64, seed=length)
                history, candidates = parts_of(replace(batch, labels=None, label_weight=None))
                encoded = encode_history(model, history.to(DEVICE))
                caches.keep_entry(bytes([length]), encoded)
                held = caches.hold_entry(bytes([length]))
                if held is None:
                    return f"the history of {length} rows was not kept"
                found = scorer(model, [held], candidates, 64)
                caches.release_entries([held])
                launched = score_candidates(model, encoded, candidates.to(DEVICE), 64)

            difference = (found - launched).abs().max().item()
            if not difference <= 0.0:
                return f"{length} rows, in the order {lengths}: {difference:.1e} from launched"
        if len(scorer._rooms) != 1:
            return f"{len(scorer._rooms)} rooms where the histories have one size"
    return None


def check_rows(settings: dict[str, Any]) -> str | None:
    """Logits and gradients where a layer makes only the rows that are read after it, and where it
    makes all.
    """
    torch.use_deterministic_algorithms(False)
    cfg = model_config(settings, 3, 2, 64)
    maps = vocabulary(cfg)
    batch = random_batch(cfg, 8 * 1000, 1000, 16, seed=0).to(DEVICE)
    found: list[dict[str, Tensor]] = []
    for makes_rows in (STU.makes_rows, lambda *_, **__: False):
        torch.manual_seed(0)
        model = RankingModel(cfg, maps.vocab_sizes, maps.base_rates).train().to(DEVICE)
        half = torch.autocast(DEVICE, torch.bfloat16)
        with patch.object(STU, "makes_rows", makes_rows), half:
            logits = model(batch)
            logits.square().sum().backward()
            with torch.no_grad():
                again = model(batch)

        of_layers = {}
        for name, parameter in model.transducer.named_parameters():
            if parameter.grad is not None:
                of_layers[name] = parameter.grad
        found.append({"logits": logits.detach(), "no gradients": again} | of_layers)

    rows, everything = found
    for name, expected in everything.items():
        error = ((rows[name] - expected).norm() / expected.norm().clamp(min=1e-12)).item()
        # in backward sums of half precision are added in other orders
        allowed = 1e-3 if name in ("logits", "no gradients") else 0.03
        if not error <= allowed:
            return f"{name}: {error:.1e} from what it is where all rows are made"
    return None


def is_same_history(one: HistoryCache, other: HistoryCache) -> bool:
    """Tell whether keys, values and offsets of all layers are equal, bit by bit."""
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        for name in ("k_THD", "v_THV", "offsets"):
            if not torch.equal(getattr(mine, name), getattr(theirs, name)):
                return False
    return True


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


LARES = {
    "encoder": "lares",
    "attention": {"window": None},
    "dropout": 0.1,
    "loop": {"pre_layers": 1, "steps": 2},
}


def reinforced_config(width: int) -> RunConfig:
    """LARES in its second stage, with two layers of 2 heads."""
    cfg = model_config(LARES, 2, 2, width)
    head = replace(cfg.retrieval, enabled=True, temperature=0.2, reinforce="ndcg_10")
    train = replace(cfg.train, init="champion")  # of weights that the caller gives
    return replace(cfg, tasks=(), retrieval=head, train=train)


def items_to_find(cfg: RunConfig, num_items: int) -> FeatureMaps:
    """A vocabulary whose items have codes 1, 2, …"""
    codes = torch.arange(1, num_items + 1, dtype=torch.int32)
    shown = torch.stack([codes, codes % 100], dim=1)
    return replace(vocabulary(cfg), item_codes=shown.numpy())


def check_reinforced_loss(
    positions: int = 700, num_items: int = 9000, width: int = 64
) -> str | None:
    """The loss of LARES's second stage by the full softmax's kernel, and the gradients of rows and
    items, beside float64.
    """
    torch.use_deterministic_algorithms(False)
    cfg = reinforced_config(width)
    torch.manual_seed(0)
    head = RankingModel(cfg, vocabulary(cfg).vocab_sizes, {}).retrieval
    assert head is not None
    head = head.to(DEVICE).requires_grad_(False)
    found = randn(2, positions, cfg.model.d_model), randn(num_items, cfg.retrieval.dim, seed=1)
    item, advantage = randint(num_items, positions, seed=2), randn(positions, seed=3)

    def run(dtype: torch.dtype) -> list[Tensor]:
        of_type = deepcopy(head).to(dtype)
        rows, items = (x.to(dtype).requires_grad_() for x in found)
        encoded = Encoded(rows[0], every_step=tuple(rows))
        units = torch.nn.functional.normalize(items, dim=1)
        shares = step_log_shares(of_type, encoded, units, item)
        start = (shares + randn(*shares.shape, seed=4).to(dtype)).detach()
        loss = pass_loss(shares, start, advantage.to(dtype), cfg.retrieval.reinforce_kl).mean()
        return [loss.detach(), *torch.autograd.grad(loss, (rows, items))]

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # else it is no kernel of ours
    try:
        fast, again = run(torch.float32), run(torch.float32)
    finally:
        torch.set_float32_matmul_precision(precision)
    if not all(torch.equal(a, b) for a, b in zip(fast, again, strict=True)):
        return "two runs differ"
    for name, got, expected in zip(
        ("loss", "rows", "items"), fast, run(torch.float64), strict=True
    ):
        error = ((got.double() - expected).norm() / expected.norm()).item()
        if not error <= 2 * tables_parity.MOST_TF32_ERROR:
            return f"{name}: error {error:.1e}"
    return None


def check_reinforced_steps(events: int = 4096, length: int = 256, width: int = 64) -> str | None:
    """Steps of LARES's second stage: finite, the first the same in a second run, and the others
    near, whose gradients PyTorch adds in any order.
    """
    torch.use_deterministic_algorithms(False)
    cfg = reinforced_config(width)
    num_items = 3000
    batch = with_next_items(random_batch(cfg, events, length, 4, seed=0), num_items)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        maps = items_to_find(cfg, num_items)
        trainee = Trainee(cfg, maps, DEVICE, rank=0, world_size=1)
        there = batch.to(DEVICE)
        runs.append(torch.stack([torch.cat(trainee.step(there, i, 100)) for i in range(4)]))

    first, second = runs
    if not first.isfinite().all():
        return f"sums of losses and weights: {first.tolist()}"
    alike = torch.equal(first[0], second[0]) and torch.allclose(first, second, rtol=0.02)
    return None if alike else f"{first.tolist()}, then {second.tolist()}"


def with_next_items(batch: SequenceBatch, num_items: int) -> SequenceBatch:
    """The batch with two next items a user, behind the middle and the end of the history."""
    users = len(batch.num_targets)
    history = batch.seq_offsets.diff() - batch.num_targets
    visible = torch.stack([history // 2, history], dim=1).flatten().int()
    draws = torch.Generator().manual_seed(1)
    return replace(
        batch,
        num_next=torch.full((users,), 2, dtype=torch.int32),
        next_visible=visible,
        next_code=torch.randint(1, num_items + 1, (2 * users,), generator=draws),
        next_weight=torch.ones(2 * users),
    )


def model_checks() -> list[Check]:
    models: list[Check] = [(check_token_backends, TABLED, 8, 1024, 64)]
    for settings in (SEMI_LOCAL, SEMI_LOCAL | {"merge": False}):
        for size in ((8, 1024, 64), (3, 40, 16)):
            models.append((check_token_backends, settings, *size))
    views: list[Check] = [(check_target_view, view, 8, 1024, 64) for view in ("covering", "exact")]
    merged = PLAIN_HSTU | {"relative_bias": True}
    rows: list[Check] = [
        (check_rows, settings) for settings in (SEMI_LOCAL, SEMI_LOCAL | {"fp8": True}, PLAIN_HSTU)
    ]
    graphs: list[Check] = [(check_graphs, TABLED), (check_graphs, SEMI_LOCAL, "fp32")]
    graphs.append((check_graphs, merged))
    graphs += [(check_kept_history, TABLED), (check_kept_history, SEMI_LOCAL, "fp32")]
    graphs += [(check_kept_orders, SEMI_LOCAL)]
    graphs += [(check_graphed_model, TABLED), (check_graphed_model, SEMI_LOCAL, "fp32")]
    graphs += [(check_graphed_model, SEMI_LOCAL | {"fp8": True}), (check_graphed_model, merged)]
    steps: list[Check] = [(check_training,), (check_waiting,), (check_transfer,), (check_beside,)]
    steps += graphs
    steps += [(check_reinforced_loss,), (check_reinforced_steps,)]
    return [*models, *views, *rows, *steps, (check_compilations,)]


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
        (check_token_backends, SEMI_LOCAL, 2, 10, 16),
        (check_target_view, "covering", 1, 12, 16),
        (check_target_view, "exact", 1, 12, 16),
        (check_transfer,),
        (check_beside,),
        (check_reinforced_loss, 20, 50, 16),
        (check_reinforced_steps, 40, 10, 16),
    ],
    "layer": layer_parity.smoke_checks,
    "tables": tables_parity.smoke_checks,
    "attention": attention_parity.smoke_checks,
}


def of_suite(checks: list[Check], wrong: list[str]) -> dict[str, object]:
    """How many checks of a suite ran, what was wrong, and how many found no time."""
    names = tuple(f"{name_of(check)}: " for check in checks)
    lines = [line for line in wrong if line.startswith(names)]
    not_run = [line for line in lines if f": {NOT_RUN}" in line]
    return {
        "cases": len(checks) - len(not_run),
        "wrong": [line for line in lines if line not in not_run],
        "not_run": len(not_run),
    }


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
        "--match", nargs="+", metavar="TEXT", help="only checks whose name has one of these in it"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="leave the kernels of the benchmarks in Triton's cache too",
    )
    parser.add_argument(
        "--out", type=Path, help="what was found, by suite, as JSON for --checked of the benchmarks"
    )
    arguments = parser.parse_args()
    suites = {name: (SMOKE if arguments.smoke else SUITES)[name]() for name in arguments.only}
    if arguments.match:
        for name, of_suites in suites.items():
            suites[name] = [
                check for check in of_suites if any(x in name_of(check) for x in arguments.match)
            ]
    checks = [check for checks in suites.values() for check in checks]
    if arguments.compile:
        compiled: list[Check] = []
        for benchmark in (attention, layer, tables):
            compiled += benchmark.compile_checks()
        checks = compiled + checks  # they take longest
    wrong = parity(checks, arguments.seconds)
    if arguments.out:
        found = {name: of_suite(checks, wrong) for name, checks in suites.items()}
        whole = {"machine": versions(), "compiled": arguments.compile, "parity": found}
        arguments.out.write_text(json.dumps(whole, indent=1) + "\n")
    if arguments.smoke:
        for benchmark in (layer, tables, attention):
            benchmark.smoke()
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
