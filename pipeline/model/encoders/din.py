"""Deep Interest Network (arXiv:1706.06978): each candidate weighs the rows it sees by a small MLP."""

import torch
from torch import Tensor, nn

from pipeline.batches.collate import SequenceBatch
from pipeline.config import ModelConfig
from pipeline.model.encoders.transducer import candidates
from pipeline.model.tokens import Tokens


class DIN(nn.Module):
    """The sum of the visible rows h, weighted by MLP([c, h, c - h, c * h]) without a softmax,
    beside the candidate c.

    One pair of candidate and row after another, [pairs, 4 d] at the widest: the memory grows with
    the pairs, of which the user layout has about as many as a causal mask.
    """

    def __init__(self, cfg: ModelConfig, num_context: int) -> None:
        super().__init__()
        d = cfg.d_model
        self.num_context = num_context
        self.weight = nn.Sequential(
            nn.Linear(4 * d, cfg.ffn_dim), nn.SiLU(), nn.Linear(cfg.ffn_dim, 1)
        )
        self.out = nn.Sequential(nn.Linear(2 * d, d), nn.SiLU(), nn.Dropout(cfg.dropout))
        self.norm_out = nn.LayerNorm(d, eps=cfg.norm_eps)

    def forward(self, tokens: Tokens, batch: SequenceBatch) -> Tensor:
        """[C, d]: the candidates' outputs, in the order of the batch."""
        c_CE = candidates(tokens)
        # on the host: the number of pairs is a shape
        visible = visible_rows(batch) + self.num_context
        num_pairs = int(visible.sum())
        visible = visible.to(c_CE.device, non_blocking=True)
        first = torch.repeat_interleave(
            tokens.seq_offsets[:-1], tokens.num_targets, output_size=len(c_CE)
        )
        candidate = torch.repeat_interleave(
            torch.arange(len(c_CE), device=c_CE.device), visible, output_size=num_pairs
        )
        number = (
            torch.arange(num_pairs, device=c_CE.device) - (visible.cumsum(0) - visible)[candidate]
        )
        c, h = c_CE[candidate], tokens.x_TE[first[candidate] + number]
        weighed = self.weight(torch.cat([c, h, c - h, c * h], dim=1)) * h
        interest = torch.segment_reduce(weighed.float(), "sum", lengths=visible, unsafe=True)
        return self.norm_out(self.out(torch.cat([interest.to(c_CE.dtype), c_CE], dim=1)))


def visible_rows(batch: SequenceBatch) -> Tensor:
    """int64 [C] on the CPU: how many history rows each candidate sees."""
    host = batch.on_host
    if host.target_visible is not None:
        return host.target_visible.long()
    return torch.repeat_interleave(
        host.seq_offsets.diff() - host.num_targets, host.num_targets.long()
    )
