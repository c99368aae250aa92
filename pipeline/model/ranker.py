"""ULTRA-HSTU (arXiv:2602.16986) as a multi-task ranker: token encoder → transducers → one head per
task.

`model.encoder` puts a baseline in the place of the transducers; everything around them stays.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.rates import dense_width
from pipeline.config import RunConfig
from pipeline.model.encoders.din import DIN
from pipeline.model.encoders.hstu import HSTU, InterleavedEncoder
from pipeline.model.encoders.mixture import MixtureOfTransducers
from pipeline.model.encoders.stu import STU
from pipeline.model.encoders.transducer import Transducer
from pipeline.model.encoders.transformer import SoftmaxEncoder
from pipeline.model.tokens import DenseEncoder, MakeTable, TokenEncoder, Tokens, table


class RankingModel(nn.Module):
    """Scores of the candidates of a batch.

    `vocab_sizes` and `base_rates` come from the training period's `FeatureMaps`: rows of each
    table, and the positive rate of each task, at which its head starts. Training may put its own
    tables in place of plain ones (`make_table`)."""

    def __init__(
        self,
        cfg: RunConfig,
        vocab_sizes: dict[str, int],
        base_rates: dict[str, float],
        make_table: MakeTable = table,
    ) -> None:
        super().__init__()
        self.tasks = cfg.tasks
        self.item_id_dropout = cfg.features.item_id_dropout
        self.encoder = (InterleavedEncoder if cfg.model.interleaved else TokenEncoder)(
            cfg, vocab_sizes, make_table
        )
        self.transducer = sequence_encoder(cfg, self.encoder.num_context)
        num_dense = dense_width(cfg.features, len(cfg.tasks))
        into_head = num_dense > 0 and cfg.model.dense_to != "token"
        self.dense = (
            DenseEncoder(num_dense, cfg.model.d_model, cfg.model.token_backend)
            if into_head
            else None
        )
        width = cfg.model.d_model * (max(len(cfg.model.channels), 1) + into_head)
        num_tasks, hidden = len(cfg.tasks), cfg.model.head_hidden
        logits = (
            Towers(num_tasks, hidden) if cfg.model.task_towers else nn.Linear(hidden, num_tasks)
        )
        with torch.no_grad():
            logits.bias.copy_(torch.tensor([_logit(base_rates[task]) for task in cfg.tasks]))
        hidden *= num_tasks if cfg.model.task_towers else 1
        self.heads = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Dropout(cfg.model.dropout), logits
        )

    def forward(self, batch: SequenceBatch) -> Tensor:
        """Logits, float32 [C, tasks], candidates in the order of the batch."""
        if self.training and self.item_id_dropout > 0:
            batch = without_item_ids(batch, self.item_id_dropout)
        tokens = self.encoder(batch)
        if isinstance(self.transducer, Transducer):
            return self.score(self.transducer(tokens), batch)
        return self.score(self.transducer(tokens, batch), batch)

    def score(self, x_CE: Tensor, batch: SequenceBatch) -> Tensor:
        """Logits of the batch's candidates from the transducers' outputs, float32 [C, tasks]."""
        if self.dense is not None:
            assert batch.dense is not None
            x_CE = torch.cat([x_CE, self.dense(batch.dense).to(x_CE.dtype)], dim=1)
        return self.heads(x_CE).float()


class Towers(nn.Module):
    """[C, tasks * hidden] → [C, tasks]: a logit of each task from a hidden layer of its own."""

    def __init__(self, num_tasks: int, hidden: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(hidden)  # as in nn.Linear
        self.weight = nn.Parameter(torch.empty(num_tasks, hidden).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(num_tasks))

    def forward(self, x_CH: Tensor) -> Tensor:
        return (x_CH.unflatten(1, self.weight.shape) * self.weight).sum(2) + self.bias


def without_item_ids(batch: SequenceBatch, share: float) -> SequenceBatch:
    """The batch with about this share of its item ids read as unknown, in the history and among the
    candidates.

    An id seen a few times is soon learned by heart; here each row must also do with what else is
    known of its item, as it has to for an item that training never saw, whose embedding this
    trains.
    """
    ids, others = batch.item_codes[:, :1], batch.item_codes[:, 1:]
    dropped = torch.rand(ids.shape, device=ids.device) < share
    return replace(batch, item_codes=torch.cat([ids.masked_fill(dropped, 0), others], dim=1))


SequenceEncoder = Transducer | MixtureOfTransducers | HSTU | SoftmaxEncoder | DIN


def sequence_encoder(cfg: RunConfig, num_context: int) -> SequenceEncoder:
    """Tokens (and their batch) → the candidates' outputs, by `model.encoder`."""
    model = cfg.model
    if model.encoder in ("hstu", "hstu_merged"):
        return HSTU(model, num_context)
    if model.encoder in ("transformer", "sasrec"):
        return SoftmaxEncoder(model)
    if model.encoder == "din":
        return DIN(model, num_context)
    return (
        MixtureOfTransducers(cfg, num_context) if model.channels else Transducer(model, num_context)
    )


@torch.no_grad()
def attention_variance(model: RankingModel, batch: SequenceBatch) -> list[float]:
    """Per layer the mean over tokens of the variance that Norm(A) divides by, to be held against
    `norm_eps`.
    """
    seen: list[float] = []

    def look(layer: STU, inputs: tuple[Tokens]) -> None:
        (tokens,) = inputs
        _, q, k, v = layer.project(tokens.x_TE)
        a_THV = layer.attend(q, k, v, tokens)
        seen.append(a_THV.float().flatten(1).var(dim=1, unbiased=False).mean().item())

    layers = [layer for layer in model.transducer.modules() if isinstance(layer, STU)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    model(batch)
    for hook in hooks:
        hook.remove()
    return seen


def _logit(rate: float) -> float:
    rate = min(max(rate, 1e-6), 1 - 1e-6)  # a task never or always seen in the training period
    return math.log(rate / (1 - rate))
