"""What a cached history saves, beside what the counted work says that it saves; and the ranker's
own time.

    python -m benchmarks.serving.ranker                      2,048 events and 256 candidates; the
    server's reference model python -m benchmarks.serving.ranker --device cuda --out FILE
    16,384 events and 1,024 candidates, 12 layers of 512 python -m benchmarks.serving.ranker
    --report FILE …      → the section of RESULTS.md

Random weights and events. A cold user is encoded and scored, a warm one scored against the kept
keys and values; both times hold the copies to the device and of the scores back. Before the clock
runs, cached scores in float32 are held against those of the plain forward pass.
"""

import argparse
import json
import time
import traceback
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import environment
from benchmarks.report import table, write_run, write_section
from benchmarks.training.model import NUM_ITEMS, median_ms, model_config, random_batch, vocabulary
from pipeline.batches.collate import SequenceBatch
from pipeline.config import RunConfig
from pipeline.model.inference.appending import append_history, first_changed_row
from pipeline.model.inference.cached_scoring import encode_history, score_candidates
from pipeline.model.inference.cuda_graph import GraphedScorer
from pipeline.model.inference.graphed_model import GraphedModel
from pipeline.model.ranker import RankingModel
from pipeline.model.tokens import target_mask
from pipeline.model.work import cached_work

RUNS = Path(__file__).parents[1] / "runs"
LARGEST_ERROR = 1e-5  # of a float32 score
HEADS = 4
SEMI_LOCAL = {"attention": {"window": 256, "full_rows": 256}}
TRUNCATED = {"truncate_after_layer": 4, "truncate_to": 1024}


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    settings: dict[str, Any]
    layers: int
    width: int  # of each head
    events: int  # a user
    candidates: int  # a user
    users: int = 1
    precisions: tuple[str, ...] = ("fp32",)


small = partial(Case, layers=4, width=32, events=2048, candidates=256)
ALL = ("fp32", "bf16", "fp8")
large = partial(
    Case, layers=12, width=128, events=16384, candidates=1024, precisions=("fp32", "bf16")
)
CAUSAL = {"attention": {"window": None}}
CPU_CASES = (small("semi-local", SEMI_LOCAL), small("causal", CAUSAL))
GPU_CASES = (
    large("semi-local", SEMI_LOCAL, precisions=ALL),
    large("semi-local, the last 8 layers on 1,024 events", SEMI_LOCAL | TRUNCATED, precisions=ALL),
    large("causal", CAUSAL, precisions=("bf16",)),
    large("semi-local, 8 users", SEMI_LOCAL, users=8, events=4096),
)


def parts_of(batch: SequenceBatch) -> tuple[SequenceBatch, SequenceBatch]:
    """The batch's histories without candidates, and its candidates without histories."""
    is_target = target_mask(batch.seq_offsets, batch.num_targets, batch.num_tokens)
    num_targets = batch.num_targets.long()
    rows = ("item_codes", "request_codes", "action_mask", "known_mask", "position", "gap_ms")
    parts = []
    for chosen, lengths in (
        (~is_target, batch.seq_offsets.diff() - num_targets),
        (is_target, num_targets),
    ):
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        columns = {name: getattr(batch, name)[chosen] for name in rows}
        parts.append(replace(batch, seq_offsets=offsets, max_seq_len=int(lengths.max()), **columns))
    history, candidates = parts
    return replace(history, num_targets=torch.zeros_like(batch.num_targets), dense=None), candidates


def rows_of(history: SequenceBatch, begin: int, end: int) -> SequenceBatch:
    """Some rows of one history without candidates."""
    rows = ("item_codes", "request_codes", "action_mask", "known_mask", "position", "gap_ms")
    columns = {name: getattr(history, name)[begin:end] for name in rows}
    length = end - begin
    return replace(history, seq_offsets=torch.tensor([0, length]), max_seq_len=length, **columns)


class Passes:
    """One model in one precision, and the passes that a server makes of it; batches come from the
    CPU.
    """

    def __init__(self, cfg: RunConfig, device: str, precision: str) -> None:
        torch.manual_seed(0)
        maps = vocabulary(cfg)
        self.model = RankingModel(cfg, maps.vocab_sizes, maps.base_rates).eval().to(device)
        self.device, self.half = device, precision != "fp32"
        self.scorer, self.graphs = GraphedScorer(), GraphedModel(self.model, cfg)

    @torch.no_grad()
    def __call__(self, step: str, *inputs: Any) -> Any:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            return getattr(self, step)(*inputs)

    def plain(self, batch: SequenceBatch) -> torch.Tensor:
        return self.model(batch.to(self.device)).sigmoid().cpu()

    def encode(self, history: SequenceBatch) -> Any:
        return encode_history(self.model, history.to(self.device))

    def warm(self, cache: Any, candidates: SequenceBatch, micro_batch: int) -> torch.Tensor:
        return (
            score_candidates(self.model, cache, candidates.to(self.device), micro_batch)
            .sigmoid()
            .cpu()
        )

    def graphed(self, cache: Any, candidates: SequenceBatch, micro_batch: int) -> torch.Tensor:
        return (
            self.scorer(self.model, [cache], candidates.to(self.device), micro_batch)
            .sigmoid()
            .cpu()
        )

    def cold_graphed(
        self, history: SequenceBatch, candidates: SequenceBatch, micro_batch: int
    ) -> torch.Tensor:
        return self.graphed(self.graphs.encode_history(history), candidates, micro_batch)

    def appended(
        self, cache: Any, rows: SequenceBatch, candidates: SequenceBatch, num_rows: int
    ) -> torch.Tensor:
        """The newest event onto a cache of all before; then as `warm`, all candidates at once."""
        grown = append_history(self.model, cache, rows, num_rows - 1, num_rows)
        return self.warm(grown, candidates, candidates.num_tokens)

    def cold(
        self, history: SequenceBatch, candidates: SequenceBatch, micro_batch: int
    ) -> torch.Tensor:
        return self.warm(self.encode(history), candidates, micro_batch)


def measure(case: Case, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    cfg = model_config(case.settings | {"fp8": precision == "fp8"}, case.layers, HEADS, case.width)
    batch = random_batch(cfg, case.users * case.events, case.events, case.candidates, seed=0)
    batch = replace(batch, labels=None, label_weight=None)
    history, candidates = parts_of(batch)
    run = Passes(cfg, options.device, precision)
    cache = run("encode", history)
    expected = run("plain", batch)
    # the last micro-batch is a short one
    every, quarter = case.candidates * case.users, case.candidates // 4 + 1
    steps = ["warm"] + ["graphed"] * (options.device == "cuda" and case.users == 1)
    errors = [
        (run(step, cache, candidates, size) - expected).abs().max().item()
        for step in steps
        for size in (every, quarter)
    ]
    times = {
        "plain": lambda _: run("plain", batch),
        "cold": lambda _: run("cold", history, candidates, every),
    }
    times |= {step: lambda _, step=step: run(step, cache, candidates, every) for step in steps}
    if "graphed" in steps:
        for _ in range(2):  # launched, then recorded
            run("cold_graphed", history, candidates, every)
        errors.append(
            (run("cold_graphed", history, candidates, every) - expected).abs().max().item()
        )
        times["cold graphed"] = lambda _: run("cold_graphed", history, candidates, every)
    if options.device == "cpu" and case.users == 1:
        first = first_changed_row(
            cfg.model, run.model.encoder.num_context, case.events - 1, case.events
        )
        assert first is not None
        before = run("encode", rows_of(history, 0, case.events - 1))
        given = before, rows_of(history, first, case.events), candidates, case.events
        errors.append((run("appended", *given) - expected).abs().max().item())
        times["appended"] = lambda _: run("appended", *given)
    encode_flop, score_flop = cached_work(history, candidates, cfg.inputs)
    row = {
        "case": case.name,
        "precision": precision,
        "size": f"{case.users} × ({case.events:,} events, {case.candidates:,} candidates)",
        "model": f"{case.layers} layers of {HEADS * case.width}",
        "largest_error": max(errors),
        "ms": {
            step: median_ms(call, options.device, options.repeats) for step, call in times.items()
        },
        "encode_tflop": encode_flop / 1e12,
        "score_tflop": score_flop / 1e12,
        "cache_mb": cache.num_bytes / 2**20,
    }
    row["flop_ratio"] = (encode_flop + score_flop) / score_flop
    warm_ms = min(row["ms"][step] for step in steps)
    row["time_ratio"] = (row["ms"]["cold"] - row["ms"]["warm"] + warm_ms) / warm_ms
    print(json.dumps(row), flush=True)
    return row


def reference_ranker(options: argparse.Namespace) -> dict[str, Any]:
    """`Ranker.rank` at the reference load's model: 4 layers of 128, histories of 256 events, 100
    candidates.
    """
    from pipeline.config import ServeConfig
    from pipeline.model.artifact import LoadedModel
    from serve_app.columns import RankColumns
    from serve_app.history.published import sequence_row
    from serve_app.ranking.ranker import Ranker
    from serve_app.schemas import RankHead

    events, num_candidates, users = 256, 100, 200
    cfg = model_config({"attention": {"window": 64, "full_rows": 32}}, 4, 4, 32)
    items = np.arange(NUM_ITEMS)
    maps = replace(
        vocabulary(cfg),
        item_ids=items,
        item_codes=np.stack(
            [np.append(0, items) % NUM_ITEMS, np.append(0, items) % 100], axis=1
        ).astype(np.int32),
        item_count=np.ones(NUM_ITEMS + 1, np.int64),
        request_values={"tab": np.arange(8)},
    )
    torch.manual_seed(0)
    model = RankingModel(cfg, maps.vocab_sizes, maps.base_rates).eval()
    start = 1_767_225_600_000
    rng = np.random.default_rng(0)

    class Generated:
        """Every user of the reference load, in memory."""

        digest, columns = "", cfg.source.events

        def __init__(self) -> None:
            self.rows = [sequence_row(self._rows(), self.columns) for _ in range(users)]

        def _rows(self) -> dict[str, np.ndarray]:
            return {
                "item_id": rng.integers(0, NUM_ITEMS, events),
                "event_time": start + np.arange(events) * 60_000,
                "action_mask": rng.integers(0, 256, events),
                "known_mask": np.full(events, 255),
                "request_index": np.arange(events),
                "tab": rng.integers(0, 8, events),
            }

        def sequence(self, user_id: int) -> Any:
            return self.rows[user_id]

    ranker = Ranker(LoadedModel(model, cfg, maps, {}), Generated(), 1, "reference", ServeConfig())
    head = {"request_time_ms": start + 10**9, "request_features": {"tab": 1}}
    asked = [
        RankColumns(RankHead(user_id=user, **head), rng.integers(0, NUM_ITEMS, num_candidates), {})
        for user in range(users)
    ]
    ranker.rank(asked[:1])
    row: dict[str, Any] = {"case": "reference ranker", "threads": torch.get_num_threads()}
    for kind in ("cold", "warm"):  # the second time around everybody is known
        times = [timed_ms(ranker, [request]) for request in asked[1:]]
        row[f"{kind}_ms"] = dict(
            zip(("p50", "p95", "p99"), np.percentile(times, [50, 95, 99]).tolist(), strict=True)
        )
    print(json.dumps(row), flush=True)
    return row


def timed_ms(ranker: Any, requests: list[Any]) -> float:
    begin = time.perf_counter()
    ranker.rank(requests)
    return 1000 * (time.perf_counter() - begin)


def section(runs: list[dict[str, Any]]) -> str:
    parts = ["## Ranker"]
    for run in runs:
        machine, rows = run["environment"], run["rows"]
        parts.append(
            f"`{run['command']}`, {machine['device']}, {run['threads']} threads, torch "
            f"{machine['torch']}, triton "
            f"{machine['triton']}; medians of {run['repeats']} whole calls, the host's part "
            "included. Plain: history "
            "and candidates in one forward pass. Cold: encoded, then scored. Warm: scored against "
            "keys and values kept "
            "from an earlier request; graphed: the same by CUDA graph. Time cold ÷ warm is for "
            "the faster way to score." + f" {run.get('note', '')}"
        )
        cases = [row for row in rows if "ms" in row]
        steps = " / ".join(max((row["ms"] for row in cases), key=len))
        if "cold graphed" in steps:
            parts[-1] += " Cold graphed: encoded by CUDA graph too."
        if "appended" in steps:
            parts[-1] += " Appended: the newest event onto a cache of all before, then as warm."
        header = [
            "case",
            "size",
            f"{steps}, ms",
            "FLOP cold ÷ warm",
            "time cold ÷ warm",
            "of it",
            "largest error",
        ]
        cells = [
            [
                f"{row['case']}, {row['precision']}, {row['model']}",
                row["size"],
                " / ".join(f"{row['ms'][step]:.2f}" for step in row["ms"]),
                f"{row['flop_ratio']:.2f}",
                f"{row['time_ratio']:.2f}",
                f"{row['time_ratio'] / row['flop_ratio']:.0%}",
                f"{row['largest_error']:.1e}",
            ]
            for row in cases
        ]
        parts.append(table(header, cells))
        for row in rows:
            if "cold_ms" in row:
                cold, warm = (
                    " / ".join(f"{row[kind][p]:.1f}" for p in ("p50", "p95", "p99"))
                    for kind in ("cold_ms", "warm_ms")
                )
                parts.append(
                    "`Ranker.rank` alone, one request at a time (d = 128, 4 layers, 4 heads, 256 "
                    "events, 100 "
                    f"candidates, {row['threads']} thread): p50 / p95 / p99 {cold} ms cold, "
                    f"{warm} ms warm."
                )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--precisions", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--out", type=Path, default=RUNS / "ranker_cpu.json")
    parser.add_argument(
        "--report", type=Path, nargs="+", metavar="FILE", help="write RESULTS.md from FILEs and end"
    )
    options = parser.parse_args()
    if options.report:
        write_section("ranker", section([json.loads(path.read_text()) for path in options.report]))
        return
    torch.set_num_threads(options.threads)
    cuda = options.device == "cuda"
    settings = ["--device cuda"] * cuda
    if options.precisions != list(ALL):
        settings.append("--precisions " + " ".join(options.precisions))
    run = {
        "command": " ".join(["python -m benchmarks.serving.ranker", *settings]),
        "environment": environment(options.device),
        "threads": options.threads,
        "repeats": options.repeats,
        "rows": [],
    }
    cases = GPU_CASES if cuda else CPU_CASES
    work = [
        partial(measure, case, precision, options)
        for case in cases
        for precision in case.precisions
        if precision in options.precisions
    ]
    work += [] if cuda else [partial(reference_ranker, options)]
    failed = 0
    for one in work:
        try:
            run["rows"].append(one())
        except Exception:  # an out of memory, say, must not take the other rows along
            traceback.print_exc()
            failed += 1
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_run(options.out, run)
    wrong = [
        row
        for row in run["rows"]
        if row.get("precision") == "fp32" and not row["largest_error"] <= LARGEST_ERROR
    ]
    raise SystemExit(bool(failed or wrong))


if __name__ == "__main__":
    main()
