"""SASRec (arXiv:1808.09781) in the form of its authors' code."""

from torch import Tensor, nn

from kernels.semi_local_attention.types import QueryRows
from pipeline.config import ModelConfig
from pipeline.model.encoders.transformer import (
    Padding,
    SelfAttention,
    SoftmaxEncoder,
    chosen_rows,
)


class SASRec(SoftmaxEncoder):
    """Blocks of attention whose queries alone are normalised."""

    @staticmethod
    def make_block(cfg: ModelConfig) -> nn.Module:
        return SASRecBlock(cfg)


class SASRecBlock(nn.Module):
    """Q = LN(x); x = LN(Q + MHA(Q, x, x)); x + FFN(x): norms without weights, keys and values not
    normalised.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.norm_query = nn.LayerNorm(cfg.d_model, eps=1e-8, elementwise_affine=False)
        self.attention = SelfAttention(cfg)
        self.norm_ffn = nn.LayerNorm(cfg.d_model, eps=1e-8, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(cfg.d_model, cfg.ffn_dim),
            nn.ReLU(),
            nn.Dropout(cfg.dropout),
            nn.Linear(cfg.ffn_dim, cfg.d_model),
            nn.Dropout(cfg.dropout),
        )

    def forward(self, x_TE: Tensor, padding: Padding, rows: QueryRows | None = None) -> Tensor:
        query = self.norm_query(chosen_rows(x_TE, rows))
        x_RE = self.norm_ffn(query + self.attention(query, x_TE, padding, rows))
        return x_RE + self.ffn(x_RE)
