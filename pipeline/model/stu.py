"""One STU layer (ULTRA-HSTU, arXiv:2602.16986, eq. 1-5) over packed sequences.

    X = Norm(Z);  U, Q, K, V = SiLU(f1(X));  A = (SiLU(Q Kᵀ) ⊙ M) V;  Y = f2(Norm(A) ⊙ U);  Z' = Y + Z

The authors' production code differs in two places, offered as switches: `silu_qkv: false` leaves Q, K and V linear,
and `concat_ua: true` is Y = f2(concat[U, A, Norm(A) ⊙ U]).

There is no softmax, so nothing fixes the size of A: the constant divisor of the scores cancels in Norm(A) except
through its epsilon. Where Var(A) is far below `norm_eps` the attention branch is silent; training logs both.
"""

import torch
from torch import Tensor, nn

from kernels.semi_local_attention.op import semi_local_attention
from pipeline.config import ModelConfig
from pipeline.model.embeddings import Tokens


class STU(nn.Module):
    def __init__(self, cfg: ModelConfig, num_context: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.prefix = num_context + cfg.attention.extra_prefix
        self.attn_alpha = 1 / cfg.d_qk if cfg.attention.attn_alpha is None else cfg.attention.attn_alpha
        heads, d = cfg.num_heads, cfg.d_model
        self.split = [heads * cfg.d_v, heads * cfg.d_qk, heads * cfg.d_qk, heads * cfg.d_v]
        self.norm_in = nn.LayerNorm(d, eps=cfg.norm_eps)
        self.uvqk = nn.Linear(d, sum(self.split))
        self.norm_attn = nn.LayerNorm(heads * cfg.d_v, eps=cfg.norm_eps)
        self.dropout = nn.Dropout(cfg.dropout)
        self.out = nn.Linear(heads * cfg.d_v * (3 if cfg.concat_ua else 1), d)

    def forward(self, tokens: Tokens) -> Tensor:
        u, q, k, v = self.project(tokens.x_TE)
        return self.output(tokens.x_TE, u, self.attend(q, k, v, tokens))

    def project(self, x_TE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """U [T, h * d_v], Q and K [T, h, d_qk], V [T, h, d_v] of rows: like `output`, no row needs another."""
        cfg = self.cfg
        uvqk = self.uvqk(self.norm_in(x_TE))
        if cfg.silu_qkv:
            u, q, k, v = nn.functional.silu(uvqk).split(self.split, dim=1)
        else:
            u, q, k, v = uvqk.split(self.split, dim=1)
            u = nn.functional.silu(u)
        q, k = (x.unflatten(1, (cfg.num_heads, cfg.d_qk)) for x in (q, k))
        return u, q, k, v.unflatten(1, (cfg.num_heads, cfg.d_v))

    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THV: Tensor, tokens: Tokens) -> Tensor:
        """A, [T, h, d_v]."""
        attention = self.cfg.attention
        return semi_local_attention(
            q_THD,
            k_THD,
            v_THV,
            tokens.seq_offsets,
            max_seq_len=tokens.max_seq_len,
            num_targets=tokens.num_targets,
            target_visible=tokens.target_visible,
            window=attention.window,
            full_rows=attention.full_rows,
            prefix=self.prefix,
            attn_alpha=self.attn_alpha,
            scaling_seq_len=attention.scaling_seq_len,
            backend=self.cfg.attention_backend,
        )

    def output(self, x_TE: Tensor, u: Tensor, a_THV: Tensor) -> Tensor:
        """Z' of rows Z from their gate U and their attention A."""
        a = a_THV.flatten(1)
        gated = self.norm_attn(a).to(u.dtype) * u  # autocast runs the norm itself in fp32
        if self.cfg.concat_ua:
            gated = torch.cat([u, a.to(u.dtype), gated], dim=1)
        return x_TE + self.out(self.dropout(gated))
