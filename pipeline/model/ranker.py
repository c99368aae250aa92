"""The model: token encoder → sequence encoder (`model.encoder`) → heads.

ULTRA-HSTU (arXiv:2602.16986) is one of the sequence encoders; with a baseline in its place
everything around it stays.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.rates import dense_width
from pipeline.config import RunConfig
from pipeline.model.encoders import ENCODERS, check_run
from pipeline.model.encoders.encoder import Encoded, TokenLayout
from pipeline.model.encoders.hstu import InterleavedEncoder
from pipeline.model.encoders.stu import STU
from pipeline.model.heads import RankingHead
from pipeline.model.retrieval import RetrievalHead
from pipeline.model.tokens import DenseEncoder, MakeTable, TokenEncoder, Tokens, plain_table


class RankingModel(nn.Module):
    """Scores of the candidates of a batch; with `retrieval.enabled` also vectors of users and items
    (`retrieval`).

    `vocab_sizes` and `base_rates` come from the training period's `FeatureMaps`: rows of each
    table, and the positive rate of each task, at which its head starts. Training may put its own
    tables in place of plain ones (`make_table`).

    Raises:
        ConfigError: the encoder does not know a setting of `cfg.model`.
    """

    def __init__(
        self,
        cfg: RunConfig,
        vocab_sizes: dict[str, int],
        base_rates: dict[str, float],
        make_table: MakeTable = plain_table,
    ) -> None:
        super().__init__()
        model = cfg.model
        check_run(model, cfg.train, retrieval=cfg.retrieval.enabled)
        self.item_id_dropout = cfg.features.item_id_dropout

        encoder = ENCODERS[model.encoder]
        interleaved = encoder.two_tokens_per_event(model)
        make_tokens = InterleavedEncoder if interleaved else TokenEncoder
        self.encoder = make_tokens(cfg.inputs, vocab_sizes, make_table)
        layout = TokenLayout(
            self.encoder.num_context,
            cfg.source.actions,
            knows_request_time=not cfg.retrieval.enabled,
            exact_view=cfg.train.target_view == "exact",
            every_step=cfg.retrieval.reinforce != "none",
        )
        self.transducer = encoder(model, layout)

        self.dense, width = None, self.transducer.width
        num_dense = dense_width(cfg.features, len(cfg.tasks))
        if num_dense > 0 and model.dense_to != "token":
            self.dense = DenseEncoder(num_dense, model.d_model, model.token_backend)
            width += model.d_model
        self.heads = RankingHead(model, width, cfg.tasks, base_rates)

        self.retrieval = None
        if cfg.retrieval.enabled:
            self.retrieval = RetrievalHead(
                cfg.retrieval, cfg.features, model, self.transducer.width, self.encoder.content
            )

    def forward(self, batch: SequenceBatch) -> Tensor:
        """Logits, float32 [C, tasks], candidates in the order of the batch."""
        return self.score_rows(self.encode(batch).candidate_rows, batch)

    def encode(self, batch: SequenceBatch, *, last_history: bool = False) -> Encoded:
        """The sequence encoder's rows of the batch; in training some item ids are left out."""
        return self.encode_codes(self.leave_ids_out(batch), last_history=last_history)

    def leave_ids_out(self, batch: SequenceBatch) -> SequenceBatch:
        """The batch as it is encoded: in training a share of its item ids is read as unknown."""
        if self.training and self.item_id_dropout > 0:
            return without_item_ids(batch, self.item_id_dropout)
        return batch

    def encode_codes(self, batch: SequenceBatch, *, last_history: bool = False) -> Encoded:
        """The sequence encoder's rows of the batch as it is."""
        return self.transducer(self.encoder(batch), batch, last_history=last_history)

    def score_rows(self, x_CE: Tensor, batch: SequenceBatch) -> Tensor:
        """Logits of the batch's candidates from the encoder's rows, float32 [C, tasks]."""
        if self.dense is not None:
            assert batch.dense is not None
            x_CE = torch.cat([x_CE, self.dense(batch.dense).to(x_CE.dtype)], dim=1)
        return self.heads(x_CE).float()


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


@torch.no_grad()
def attention_variance(model: RankingModel, batch: SequenceBatch) -> list[float]:
    """Per layer the mean over tokens of the variance that Norm(A) divides by, to be held against
    `norm_eps`; of the sequences as they are served.
    """
    batch = replace(batch, target_visible=None, target_from=None, target_span=None)
    seen: list[float] = []

    def measure_variance(layer: STU, inputs: tuple[Tokens]) -> None:
        (tokens,) = inputs
        _, q, k, v = layer.project(tokens.x_TE)
        a_THV = layer.attend(q, k, v, tokens)
        seen.append(a_THV.float().flatten(1).var(dim=1, unbiased=False).mean().item())

    hooks = []
    for layer in model.transducer.modules():
        if isinstance(layer, STU):
            hooks.append(layer.register_forward_pre_hook(measure_variance))
    model(batch)
    for hook in hooks:
        hook.remove()
    return seen
