"""docs/reference/metrics.md: what Prometheus reads of the server, and what MLflow has of a run."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from prometheus_client.core import Metric
from prometheus_client.metrics import MetricWrapperBase

from serve_app.metrics import IngressMetrics, ReplicaMetrics
from serve_app.ranking.history_cache import HistoryCaches
from tests.support.reference.markdown import plain, table

ROOT = Path(__file__).parents[3]

INTRODUCTION = """\
# Metrics

## Prometheus

`GET /metrics` of the server. A histogram has `_bucket`, `_sum` and `_count` behind its name.
Metrics of the replicas also have the label `replica`. `deploy/grafana/ranking.json` is a dashboard.
"""

# Names as the code writes them; TASK is one of `tasks`.
RUN_METRICS = {
    "train/loss": "Loss that is minimised: the weighted mean of the tasks' since the last line.",
    "train/loss/TASK": "Mean loss of a task since the last line, in nats.",
    "train/bad_steps": "Steps left out so far because loss or gradient was not finite.",
    "train/graphs_captured": "CUDA graphs of a training step recorded so far, where "
    "`train.cuda_graphs` applies: one for each size of batches that came twice.",
    "train/steps_replayed": "Training steps of this worker that were replayed from such a graph so "
    "far, since it began.",
    "train/filled_share": "Share of the tokens that only fill batches up to those sizes.",
    "train/kernels_compiled": "Triton kernels compiled so far in the first worker's process. It "
    "stands still after the first steps.",
    "train/grad_norm": "Norm of the dense gradients of the last step, before clipping.",
    "train/lr": "Learning rate of the dense weights in the last step.",
    "train/examples_per_s": "Training targets per second, over all workers.",
    "train/tokens_per_s": "Tokens per second, over all workers.",
    "train/gflop_per_example": "Floating-point operations of a training target, forward and "
    "backward, in 10⁹.",
    "train/data_wait_share": "Share of the time that a worker waited for batches.",
    "train/message_wait_share": "Share of the time in which worker 0 waited for messages of others "
    "and did nothing else; on a GPU that of the device.",
    "train/step_ms": "Mean time of a step, in milliseconds.",
}
SCORE_METRICS = {
    "ne": "Normalised entropy: mean log loss over the entropy of the rows' positive rate. Lower is "
    "better; 1 is as good as the base rate.",
    "auc": "Share of (positive, negative) pairs in the right order; a tie counts one half.",
    "gauc": "AUC of each user, averaged by the user's rows. Users with one class are left out.",
    "rows": "Rows with a known label, behind ne and auc.",
    "gauc_users": "Users behind gauc.",
    "gauc_rows": "Rows behind gauc.",
}
RUN_INTRODUCTION = """\
## MLflow

Metrics of a run by step, also in `train/metrics.jsonl` of its folder:
"""
SCORE_INTRODUCTION = """\
Metrics of a model: `val/NAME/TASK` and `test/NAME/TASK` from `jobs.evaluate`, also in
`model/metrics.json`, and `val_sample/NAME` (a mean over tasks) and `val_sample/NAME/TASK` by step
where `train.validate_every` is set:
"""


@dataclass(frozen=True)
class ServerMetric:
    """A metric of the server, and the process that counts it."""

    family: Metric
    place: str
    labels: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.family.name}_total" if self.family.type == "counter" else self.family.name


def server_metrics() -> list[ServerMetric]:
    """Every metric that a server with one model may export."""
    replica = ReplicaMetrics()
    found = []
    holders = [("ingress", IngressMetrics())]
    holders += [("replica", counts) for counts in (replica, replica.lists, replica.shadow)]
    for place, counts in holders:
        for metric in vars(counts).values():
            if isinstance(metric, MetricWrapperBase):
                labels = tuple(metric._labelnames)
                found += [ServerMetric(family, place, labels) for family in metric.describe()]

    replica.loaded.roles["champion"] = cast(Any, _EmptyRanker())
    for family in replica.loaded.collect():
        found.append(ServerMetric(family, "replica", replica.loaded.LABELS))
    return found


class _EmptyRanker:
    """A ranker to the eyes of the metrics: it has a version, an empty cache and an index."""

    version = 1

    def cache_stats(self) -> dict[str, int]:
        return HistoryCaches(1).cache_stats()

    def index_stats(self) -> dict[str, float]:
        return {"index_items": 0, "index_recall": 1.0}


def written_run_metrics() -> set[str]:
    """Names of the form train/... that the library writes, parts in braces as TASK."""
    found: set[str] = set()
    for path in (ROOT / "pipeline").rglob("*.py"):
        for text in _texts(ast.parse(path.read_text())):
            if re.fullmatch(r"train/[a-z_]+(/[a-zA-Z_]+)?", text):
                found.add(text)
    return found


def _texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        if isinstance(node, ast.JoinedStr):
            parts = [
                str(part.value) if isinstance(part, ast.Constant) else "TASK"
                for part in node.values
            ]
            yield "".join(parts)


def write_page() -> str:
    rows = []
    for metric in server_metrics():
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        meaning = plain(metric.family.documentation)
        rows.append([f"`{metric.name}`", metric.family.type, metric.place, labels, meaning])
    header = ["Metric", "Type", "Counted by", "Labels", "Meaning"]

    run_rows = [[f"`{name}`", meaning] for name, meaning in RUN_METRICS.items()]
    score_rows = [[f"`{name}`", meaning] for name, meaning in SCORE_METRICS.items()]
    return "\n".join(
        [
            INTRODUCTION,
            table(header, rows),
            RUN_INTRODUCTION,
            table(["Metric", "Meaning"], run_rows),
            SCORE_INTRODUCTION,
            table(["NAME", "Meaning"], score_rows),
        ]
    )
