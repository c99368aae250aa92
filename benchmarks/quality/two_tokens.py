"""How soon HSTU with two tokens an event learns what the merged one does: both written plainly, on
drifting tastes that are drawn as `pipeline.logs.drifting` plants them.

    windows of rows ──▶ [item, action, item, action, … | candidates] ──▶ AUC every so many steps

A candidate has no action, and an item's token does not see its action behind it. So the first layer
has to carry each item to its action's token, and the second to find that by the candidate's item.
`copied` is what is left to learn when the first is done: an action's token holds its item already.

    python -m benchmarks.quality.two_tokens --seconds 95 --out two_tokens.json

Every variant trains in a process of its own, all of them side by side; on a GPU a step is a CUDA
graph. tests/test_baselines.py holds the pipeline's HSTU against the same definition.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.machine import environment
from benchmarks.quality.study_points import take_gpu
from benchmarks.report import RUNS, write_run
from pipeline.batches.graphs import record_graph
from pipeline.config import DriftingConfig
from pipeline.evaluate.metrics import auc
from pipeline.logs import drifting
from pipeline.logs.shown import ShownRows

TASTES = DriftingConfig(interests=8, categories_per_interest=2, phase_rows=4, changed_share=0.05)
WINDOWS, HELD_OUT = 32768, 2048
ROWS, ASKED = 64, 32  # of a window, and its newest, which are scored
BATCH, WARM_UP = 64, 50  # windows of a step, steps
TABLE_LR, EVERY = 0.01, 500


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model and how it is trained."""

    form: str = "interleaved"  # or "merged", or "copied"
    lr: float = 0.001
    bias: bool = False  # a learned bias of relative position
    previous: float | None = None  # where the bias of the token before begins; none: near 0
    alpha: float = 1.0  # factor of the scores
    softmax: bool = False
    layers: int = 2
    width: int = 64
    heads: int = 2
    seed: int = 0


VARIANTS = {
    "merged": Variant(form="merged", alpha=4.0, lr=0.0007),
    "merged, one layer": Variant(form="merged", alpha=4.0, lr=0.0007, layers=1),
    "copied": Variant(form="copied", alpha=4.0, lr=0.0007),
    "interleaved": Variant(alpha=4.0, lr=0.0007),
    "with a bias": Variant(alpha=4.0, lr=0.0007, bias=True),
    "with a bias that knows": Variant(alpha=0.177, bias=True, previous=8.0),
    "with softmax": Variant(softmax=True, lr=0.0015),
}


@dataclass(frozen=True)
class Windows:
    """`count` windows of ROWS rows, int64 [count, ROWS] each, and what a request sees of them."""

    category: np.ndarray
    action: np.ndarray

    @classmethod
    def draw(cls, count: int, seed: int) -> "Windows":
        owner, place = _owner_and_place(count)
        category, action = drifting.plant(TASTES, owner, place, np.random.default_rng(seed))
        shape = count, ROWS
        return cls(category.reshape(shape), action.astype(np.int64).reshape(shape))

    def on(self, device: str) -> tuple[Tensor, Tensor]:
        category, action = torch.from_numpy(self.category), torch.from_numpy(self.action)
        return category.to(device), action.to(device)

    def auc(self, scores: np.ndarray) -> float:
        """Of scores of the newest rows, [count, ASKED]."""
        return float(auc(scores.ravel(), self.action[:, -ASKED:].ravel() > 0))

    def best_auc(self) -> float:
        """Of a reader who sees what the candidates see."""
        owner, place = _owner_and_place(len(self.category))
        rows = ShownRows(owner, place, self.category.ravel(), self.action.ravel())
        begin = place - place % TASTES.phase_rows
        best = drifting.best_log_odds(TASTES, rows, begin, np.zeros_like(begin))
        return self.auc(best.reshape(self.category.shape)[:, -ASKED:])


def _owner_and_place(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(np.arange(count), ROWS), np.tile(np.arange(ROWS), count)


@dataclass(frozen=True)
class Sight:
    """What each of T tokens sees, bool [T, T], and how far before it that lies, int64 [T, T]."""

    mask: Tensor
    distance: Tensor

    @classmethod
    def of(cls, tokens: int, device: str) -> "Sight":
        """History of `tokens` an event and then candidates, each of which sees the phases before
        its own, and itself. It stands right behind the last token that it sees.
        """
        rows = torch.arange(ROWS, device=device)
        seen = tokens * (rows - rows % TASTES.phase_rows)[-ASKED:]
        history = torch.arange(tokens * ROWS, device=device)
        own = torch.eye(ASKED, dtype=torch.bool, device=device)
        before = torch.zeros(len(history), ASKED, dtype=torch.bool, device=device)

        old = torch.cat([history[:, None] >= history, before], dim=1)
        new = torch.cat([history < seen[:, None], own], dim=1)
        place = torch.cat([history, seen])
        distance = (place[:, None] - place).clamp(min=0)
        return cls(torch.cat([old, new]), distance)


class Layer(nn.Module):
    """HSTU, arXiv:2402.17152, eq. 1-3: pointwise attention, whose norm U gates."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        width = variant.width
        self.norm_in, self.norm_attn = nn.LayerNorm(width), nn.LayerNorm(width)
        self.uvqk, self.out = nn.Linear(width, 4 * width), nn.Linear(width, width)
        self.bias = None
        if variant.bias:
            self.bias = nn.Parameter(0.02 * torch.randn(2 * ROWS + 1))
            if variant.previous is not None:
                with torch.no_grad():
                    self.bias[1] = variant.previous

    def forward(self, x: Tensor, sight: Sight) -> Tensor:
        batch, length, width = x.shape
        heads, softmax = self.variant.heads, self.variant.softmax
        u, *parts = self.uvqk(self.norm_in(x)).chunk(4, -1)
        v, q, k = [part.view(batch, length, heads, -1).transpose(1, 2) for part in parts]

        factor = (width // heads) ** -0.5 if softmax else self.variant.alpha
        score = factor * q @ k.transpose(-1, -2)
        if self.bias is not None:
            score = score + self.bias[sight.distance]
        if softmax:
            weight = score.masked_fill(~sight.mask, -1e4).softmax(-1)
        else:
            weight = functional.silu(score) * sight.mask / 16
        made = (weight @ v).transpose(1, 2).reshape(batch, length, width)
        return x + self.out(self.norm_attn(made) * functional.silu(u))


class Model(nn.Module):
    """Tokens of category, action and position; layers; a head."""

    def __init__(self, variant: Variant, device: str) -> None:
        super().__init__()
        self.form, width = variant.form, variant.width
        self.item = nn.Embedding(TASTES.interests * TASTES.categories_per_interest, 32)
        self.position = nn.Embedding(ROWS, width)
        for table in (self.item, self.position):
            nn.init.normal_(table.weight, 0, 0.02)
        self.content = nn.Sequential(
            nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width), nn.LayerNorm(width)
        )
        self.action = nn.Sequential(nn.Embedding(2, width), nn.LayerNorm(width))
        self.layers = nn.ModuleList(Layer(variant) for _ in range(variant.layers))
        self.norm_out = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, 1))
        self.to(device)
        self.sight = Sight.of(1 if variant.form == "merged" else 2, device)

    def forward(self, category: Tensor, action: Tensor) -> Tensor:
        """Logits of the newest rows, [B, ASKED]."""
        rows = torch.arange(ROWS, device=category.device)
        content, position = self.content(self.item(category)), self.position(rows)
        asked_at = self.position(rows - rows % TASTES.phase_rows)
        candidates = (content + asked_at)[:, -ASKED:]

        item, done = content + position, self.action(action) + position
        if self.form == "merged":
            history = content + done
        else:
            second = content + done if self.form == "copied" else done
            history = torch.stack([item, second], dim=2).flatten(1, 2)

        x = torch.cat([history, candidates], dim=1)
        for layer in self.layers:
            x = layer(x, self.sight)
        return self.head(self.norm_out(x[:, -ASKED:]))[..., 0]


class Training:
    """Steps on windows drawn with replacement; on a GPU a replay each."""

    def __init__(self, variant: Variant, windows: Windows, device: str) -> None:
        torch.manual_seed(variant.seed)
        self.model = Model(variant, device)
        self.category, self.action = windows.on(device)
        self.chosen = torch.zeros(BATCH, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)

        tables = [self.model.item.weight, self.model.position.weight]
        apart = {id(table) for table in tables}
        others = [weight for weight in self.model.parameters() if id(weight) not in apart]
        self.rates = variant.lr, TABLE_LR
        on_gpu = device == "cuda"
        groups = []
        for parameters in (others, tables):
            groups.append({"params": parameters, "lr": torch.zeros((), device=device)})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, capturable=on_gpu)
        self.run = self._recorded() if on_gpu else self._step

    def step(self, number: int) -> None:
        """The step of that number, from 1."""
        share = min(1.0, number / WARM_UP)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"].fill_(rate * share)
        self.chosen.random_(0, len(self.category))
        self.run()

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        category, action = self.category[self.chosen], self.action[self.chosen]
        labels = action[:, -ASKED:].float()
        loss = functional.binary_cross_entropy_with_logits(self.model(category, action), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def _recorded(self) -> Any:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()  # at a rate of 0
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with record_graph(graph):
            self._step()
        return graph.replay

    @torch.no_grad()
    def scores(self, windows: Windows) -> np.ndarray:
        """Logits of the newest rows, [count, ASKED]."""
        category, action = windows.on(self.chosen.device.type)
        parts = []
        for first in range(0, len(category), 256):
            part = slice(first, first + 256)
            parts.append(self.model(category[part], action[part]).float().cpu())
        return torch.cat(parts).numpy()


def train(variant: Variant, seconds: float, steps: int, scale: int) -> dict[str, Any]:
    """AUC as training goes on, until `seconds` or `steps` are over; `scale` divides the data."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    held = Windows.draw(HELD_OUT // scale, 999)
    training = Training(variant, Windows.draw(WINDOWS // scale, 1000 + variant.seed), device)

    begin, number, curve = time.perf_counter(), 0, []
    while number < steps and time.perf_counter() - begin < seconds:
        number += 1
        training.step(number)
        if number % EVERY == 0 or number == steps:
            curve.append([number, round(held.auc(training.scores(held)), 4)])
    return {"variant": asdict(variant), "curve": curve, "best": round(held.best_auc(), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=95, help="of training, each")
    parser.add_argument("--steps", type=int, default=10**9, help="of training, at most")
    parser.add_argument("--scale", type=int, default=1, help="to divide the data by")
    parser.add_argument("--gpus", type=int, default=1, help="that the processes share")
    parser.add_argument("--out", type=Path, default=RUNS / "two_tokens.json")
    options = parser.parse_args()

    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    started = spawn.Value("i", 0)
    count = len(options.variants) * len(options.seeds)
    run: dict[str, Any] = {
        "command": "python -m benchmarks.quality.two_tokens",
        "environment": environment("cuda" if torch.cuda.is_available() else "cpu"),
        "trained": [],
    }
    with ProcessPoolExecutor(count, spawn, take_gpu, (started, options.gpus)) as pool:
        futures = {}
        for seed in options.seeds:
            for name in options.variants:
                variant = replace(VARIANTS[name], seed=seed)
                limits = options.seconds, options.steps, options.scale
                futures[pool.submit(train, variant, *limits)] = name

        for future in as_completed(futures):
            trained = {"name": futures[future], **future.result()}
            run["trained"].append(trained)
            write_run(options.out, run)
            steps, reached = trained["curve"][-1]
            print(f"{trained['name']:28} {steps:7,} steps  AUC {reached:.4f}", flush=True)


if __name__ == "__main__":
    main()
