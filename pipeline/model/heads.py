"""Heads: what the model is trained for. Each owns its layers, its targets and loss, and the metrics
that it reports.

The trainer, validation and evaluation know a head by the five names of `Head` and nothing of tasks.
"""

import math
from typing import Protocol, Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.loader import EvaluationBatch
from pipeline.config import ModelConfig
from pipeline.evaluate.metrics import TaskMetrics
from pipeline.model.tokens import HalfLinear


class HeadMetrics(Protocol):
    """Scores so far; parts computed anywhere are merged, then summarised once."""

    names: tuple[str, ...]  # those that validation reports, alone and averaged over the tasks

    def add(self, outputs: np.ndarray, part: EvaluationBatch) -> None: ...

    def merge(self, other: Self) -> None: ...

    def result(self) -> dict[str, float]: ...


class Head(Protocol):
    """Rows of candidates → outputs, and everything that follows from these."""

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Names of the L parts of the loss."""
        ...

    def __call__(self, x_CE: Tensor) -> Tensor: ...

    def loss(self, outputs: Tensor, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Sums of losses and sums of weights, [L] each: sums add over ranks, means would not."""
        ...

    def new_metrics(self) -> HeadMetrics: ...

    def prediction_columns(self, outputs: Tensor, part: EvaluationBatch) -> dict[str, pa.Array]: ...


class RankingHead(nn.Sequential):
    """A logit per task and candidate, from one hidden layer or from a tower of each task's own.

    Args:
        width: of a candidate's row, what the encoder gives and rates that join it.
        base_rates: positive rate of each task, at which its logit starts.
    """

    def __init__(
        self, cfg: ModelConfig, width: int, tasks: tuple[str, ...], base_rates: dict[str, float]
    ) -> None:
        num_tasks, hidden = len(tasks), cfg.head_hidden
        if num_tasks == 0:  # a model for retrieval alone
            super().__init__()
            self.loss_names = tasks
            return

        logits = Towers(num_tasks, hidden) if cfg.task_towers else nn.Linear(hidden, num_tasks)
        biases = [_logit(base_rates[task]) for task in tasks]
        with torch.no_grad():
            logits.bias.copy_(torch.tensor(biases))

        hidden *= num_tasks if cfg.task_towers else 1
        super().__init__(HalfLinear(width, hidden), nn.SiLU(), nn.Dropout(cfg.dropout), logits)
        self.loss_names = tasks

    def forward(self, input: Tensor) -> Tensor:
        """Logits [C, tasks], in float32 under autocast too: in bfloat16 a user's thousand
        candidates would share some 75 scores.
        """
        if not self.loss_names:
            return input.new_zeros(len(input), 0)
        *hidden, logits = self
        x_CH = input
        for layer in hidden:
            x_CH = layer(x_CH)

        weight = logits.weight
        assert isinstance(weight, Tensor)
        with torch.autocast(x_CH.device.type, enabled=False):
            return logits(x_CH.to(weight.dtype))

    def loss(self, outputs: Tensor, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Log losses of the known labels, which have a weight above 0.

        label         1    0    1
        weight        1    1    0      the last one's label is unknown
        log loss    0.1  0.3  2.3      sums: loss 0.4, weight 2
        """
        assert batch.labels is not None and batch.label_weight is not None
        losses = nn.functional.binary_cross_entropy_with_logits(
            outputs, batch.labels, reduction="none"
        )
        return (losses * batch.label_weight).sum(0), batch.label_weight.sum(0)

    def new_metrics(self) -> "RankingMetrics":
        return RankingMetrics(self.loss_names)

    def prediction_columns(self, outputs: Tensor, part: EvaluationBatch) -> dict[str, pa.Array]:
        """Per task `label`, null where unknown, `score` in 0..1, and its `logit`."""
        scores = outputs.sigmoid()
        columns = {}
        for i, task in enumerate(self.loss_names):
            labels = part.labels[:, i].astype(np.int8)
            columns[f"label.{task}"] = pa.array(labels, mask=~part.known[:, i])
            columns[f"score.{task}"] = pa.array(scores[:, i].numpy())
            columns[f"logit.{task}"] = pa.array(outputs[:, i].numpy())
        return columns


class RankingMetrics:
    """NE, AUC and GAUC of each task, over the rows whose label is known."""

    names: tuple[str, ...] = ("ne", "auc", "gauc")

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self.tasks = {task: TaskMetrics() for task in tasks}

    def add(self, outputs: np.ndarray, part: EvaluationBatch) -> None:
        """Logits, float [C, tasks], of the candidates of `part`."""
        for i, metrics in enumerate(self.tasks.values()):
            known = part.known[:, i]
            metrics.add(outputs[known, i], part.labels[known, i], part.user_id[known])

    def merge(self, other: Self) -> None:
        """Take in the rows of another rank, behind one's own."""
        for task, metrics in self.tasks.items():
            metrics.merge(other.tasks[task])

    def result(self) -> dict[str, float]:
        """`ne/is_click` and so on: see `TaskMetrics.result`."""
        values = {}
        for task, metrics in self.tasks.items():
            for name, value in metrics.result().items():
                values[f"{name}/{task}"] = value
        return values


class Towers(nn.Module):
    """[C, tasks * hidden] → [C, tasks]: a logit of each task from a hidden layer of its own."""

    def __init__(self, num_tasks: int, hidden: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(hidden)  # as in nn.Linear
        self.weight = nn.Parameter(torch.empty(num_tasks, hidden).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(num_tasks))

    def forward(self, x_CH: Tensor) -> Tensor:
        return (x_CH.unflatten(1, self.weight.shape) * self.weight).sum(2) + self.bias


def _logit(rate: float) -> float:
    rate = min(max(rate, 1e-6), 1 - 1e-6)  # a task never or always seen in the training period
    return math.log(rate / (1 - rate))
