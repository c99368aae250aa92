"""Deep Interest Network (arXiv:1706.06978): each candidate weighs the rows it sees by an MLP."""

import torch
from torch import Tensor, nn

from pipeline.batches.collate import SequenceBatch
from pipeline.config import ModelConfig
from pipeline.model.encoders.encoder import Encoded, Encoder, TokenLayout, candidate_rows
from pipeline.model.flops import Flops
from pipeline.model.tokens import Tokens


class DIN(Encoder):
    """The sum of the visible rows h, weighted by MLP([c, h, c - h, c * h]) without a softmax,
    beside the candidate c.

    A history row depends on no other, so there is no newest history row to return.

    One pair of candidate and row after another, [pairs, 4 d] at the widest: the memory grows with
    the pairs, of which the user layout has about as many as a causal mask.
    """

    def __init__(self, cfg: ModelConfig, layout: TokenLayout) -> None:
        super().__init__(cfg, layout)
        d = cfg.d_model
        self.weight = nn.Sequential(
            nn.Linear(4 * d, cfg.ffn_dim), nn.SiLU(), nn.Linear(cfg.ffn_dim, 1)
        )
        self.out = nn.Sequential(nn.Linear(2 * d, d), nn.SiLU(), nn.Dropout(cfg.dropout))
        self.norm_out = nn.LayerNorm(d, eps=cfg.norm_eps)

    def forward(
        self, tokens: Tokens, batch: SequenceBatch, *, last_history: bool = False
    ) -> Encoded:
        c_CE = candidate_rows(tokens)
        # on the host: the number of pairs is a shape
        skipped = skipped_rows(batch)
        visible = visible_rows(batch) + self.num_context - skipped
        num_pairs = int(visible.sum())
        visible = visible.to(c_CE.device, non_blocking=True)
        skipped = skipped.to(c_CE.device, non_blocking=True)

        candidate, row = _visible_pairs(tokens, visible, skipped, self.num_context, num_pairs)
        c, h = c_CE[candidate], tokens.x_TE[row]
        weighed = self.weight(torch.cat([c, h, c - h, c * h], dim=1)) * h

        interest = torch.segment_reduce(weighed.float(), "sum", lengths=visible, unsafe=True)
        both = torch.cat([interest.to(c_CE.dtype), c_CE], dim=1)
        return Encoded(self.norm_out(self.out(both)))

    @classmethod
    def work(
        cls, tokens: Tokens, batch: SequenceBatch, cfg: ModelConfig, layout: TokenLayout
    ) -> Flops:
        """Every candidate weighs every row that it sees, not itself: 2·(4d + 1)·ffn_dim each."""
        num_candidates = int(tokens.num_targets.sum())
        visible = tokens.target_visible
        if visible is None:
            history = tokens.seq_offsets.diff() - tokens.num_targets
            visible = history * tokens.num_targets
        pairs = int(visible.long().sum() - skipped_rows(batch).sum())

        d = cfg.d_model
        weights = 2 * pairs * (4 * d * cfg.ffn_dim + cfg.ffn_dim)
        outputs = 2 * num_candidates * 2 * d * d
        return Flops(
            tokens=len(tokens.x_TE),
            causal_pairs=pairs,
            kept_pairs=pairs,
            flops=weights + outputs,
        )


def visible_rows(batch: SequenceBatch) -> Tensor:
    """int64 [C] on the CPU: how many history rows each candidate sees."""
    host = batch.on_host
    if host.target_visible is not None:
        return host.target_visible.long()

    num_history = host.seq_offsets.diff() - host.num_targets
    return torch.repeat_interleave(num_history, host.num_targets.long())


def skipped_rows(batch: SequenceBatch) -> Tensor:
    """int64 [C] on the CPU: the oldest history rows that a candidate does not see."""
    host = batch.on_host
    if host.target_from is not None:
        return host.target_from.long()
    return torch.zeros(int(host.num_targets.sum()), dtype=torch.int64)


def _visible_pairs(
    tokens: Tokens, visible: Tensor, skipped: Tensor, num_context: int, num_pairs: int
) -> tuple[Tensor, Tensor]:
    """int64 [pairs] each: a candidate's number, and the index of a token that it sees.

    tokens     0 1 2 3 x y      0 is context; x and y the candidates 0 and 1, which see 3 and 2
    skipped                     0 1
    candidate  0 0 0 1 1
    token      0 1 2 0 2
    """
    device, num_candidates = visible.device, len(visible)
    candidate = torch.repeat_interleave(
        torch.arange(num_candidates, device=device), visible, output_size=num_pairs
    )

    # number of a pair among its candidate's, and where that candidate's sequence begins
    pairs_before = visible.cumsum(0) - visible
    number = torch.arange(num_pairs, device=device) - pairs_before[candidate]
    first = torch.repeat_interleave(
        tokens.seq_offsets[:-1], tokens.num_targets, output_size=num_candidates
    )
    behind = torch.where(number >= num_context, skipped[candidate], 0)
    return candidate, first[candidate] + number + behind
