"""One STU layer (ULTRA-HSTU, arXiv:2602.16986, eq. 1-5) over packed sequences: the weights; the
work is `stu_layer`.

    X = Norm(Z)
    U, Q, K, V = SiLU(f1(X))
    A = (SiLU(Q Kᵀ) ⊙ M) V
    Y = f2(Norm(A) ⊙ U)
    Z' = Y + Z

The authors' production code differs in two places, offered as switches: `silu_qkv: false` leaves Q,
K and V linear, and `concat_ua: true` is Y = f2(concat[U, A, Norm(A) ⊙ U]).

There is no softmax, so nothing fixes the size of A: the constant divisor of the scores cancels in
Norm(A) except through its epsilon. Where Var(A) is far below `norm_eps` the attention branch is
silent; training logs both.
"""

from torch import Tensor, nn

from kernels.semi_local_attention.types import QueryRows, RelativeBias
from kernels.stu import op as stu
from kernels.stu.types import STUShape, STUWeights
from pipeline.config import ModelConfig
from pipeline.model.tokens import Tokens


class STU(nn.Module):
    def __init__(self, cfg: ModelConfig, num_context: int) -> None:
        super().__init__()
        self.cfg = cfg
        attention = cfg.attention
        self.shape = STUShape(
            num_heads=cfg.num_heads,
            d_qk=cfg.d_qk,
            d_v=cfg.d_v,
            norm_eps=cfg.norm_eps,
            attn_alpha=1 / cfg.d_qk if attention.attn_alpha is None else attention.attn_alpha,
            scaling_seq_len=attention.scaling_seq_len,
            window=attention.window,
            full_rows=attention.full_rows,
            prefix=num_context + attention.extra_prefix,
            silu_qkv=cfg.silu_qkv,
            concat_ua=cfg.concat_ua,
            fp8=cfg.fp8,
            norm_a_fp32=cfg.norm_a_fp32,
            recompute=cfg.recompute,
        )
        d, width = cfg.d_model, cfg.num_heads * cfg.d_v
        self.norm_in = nn.LayerNorm(d, eps=cfg.norm_eps)
        self.uvqk = nn.Linear(d, sum(self.shape.uvqk_widths))
        self.norm_attn = nn.LayerNorm(width, eps=cfg.norm_eps)
        self.out = nn.Linear(width * (3 if cfg.concat_ua else 1), d)

    def forward(
        self,
        tokens: Tokens,
        *,
        rows: QueryRows | None = None,
        bias: RelativeBias | None = None,
    ) -> Tensor:
        """[T, d]; with `rows` [R, d] of these alone."""
        p = self.cfg.dropout if self.training else 0.0
        if rows is not None and not self.makes_rows(tokens, biased=bias is not None):
            return self(tokens, bias=bias).index_select(0, rows.index)
        if rows is not None:
            where, weights = sequences(tokens), self.weights()
            options = {"bias": bias, "p": p, "backend": self.cfg.attention_backend}
            return stu.stu_layer_rows(tokens.x_TE, weights, self.shape, where, rows, **options)

        if bias is not None:
            u, q, k, v = self.project(tokens.x_TE)
            return self.output(tokens.x_TE, u, self.attend(q, k, v, tokens, bias))
        return stu.stu_layer(
            tokens.x_TE,
            self.weights(),
            self.shape,
            sequences(tokens),
            p=p,
            backend=self.cfg.attention_backend,
        )

    def makes_rows(self, tokens: Tokens, *, biased: bool = False) -> bool:
        """True where `forward` makes some rows alone; the other forms make every row."""
        backend = self.cfg.attention_backend
        return stu.makes_rows(tokens.x_TE, self.shape, backend, biased=biased)

    def rows_and_keys(self, tokens: Tokens, rows: QueryRows) -> tuple[Tensor, Tensor, Tensor]:
        """Z' of these rows [R, d], K [T, h, d_qk] and V [T, h, d_v] of all; where `is_fused`."""
        where = sequences(tokens)
        return stu.stu_rows_and_keys(tokens.x_TE, self.weights(), self.shape, where, rows)

    def is_fused(self, tokens: Tokens) -> bool:
        """True where the layer is the fused kernels."""
        return stu.is_fused(tokens.x_TE, self.shape, self.cfg.attention_backend)

    def project(self, x_TE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """U [T, h * d_v] as `output` takes it, Q and K [T, h, d_qk], V [T, h, d_v]; no row needs
        another.
        """
        return stu.project_uvqk(
            x_TE, self.weights(), self.shape, backend=self.cfg.attention_backend
        )

    def project_rows(self, x_TE: Tensor, rows: QueryRows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same with U and Q of these rows alone; on a CPU."""
        return stu.project_rows_reference(x_TE, self.weights(), self.shape, rows.index)

    def attend(
        self,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THV: Tensor,
        tokens: Tokens,
        bias: RelativeBias | None = None,
    ) -> Tensor:
        """A, [T, h, d_v]."""
        where = sequences(tokens)
        return stu.attend_rows(
            q_THD, k_THD, v_THV, self.shape, where, bias=bias, backend=self.cfg.attention_backend
        )

    def output(self, x_TE: Tensor, u: Tensor, a_THV: Tensor) -> Tensor:
        """Z' of rows Z from their gate U and their attention A; no row needs another."""
        p = self.cfg.dropout if self.training else 0.0
        return stu.gated_output(
            x_TE, u, a_THV, self.weights(), self.shape, p=p, backend=self.cfg.attention_backend
        )

    def weights(self) -> STUWeights:
        layers = self.norm_in, self.uvqk, self.norm_attn, self.out
        return STUWeights(*(tensor for layer in layers for tensor in (layer.weight, layer.bias)))


def sequences(tokens: Tokens) -> stu.Sequences:
    return stu.Sequences(
        tokens.seq_offsets,
        tokens.max_seq_len,
        tokens.num_targets,
        tokens.target_visible,
        tokens.target_from,
        tokens.span,
    )


def layer_flops(cfg: ModelConfig, num_tokens: int, pairs: int, num_rows: int | None = None) -> int:
    """Products of one layer, forward, with `pairs` kept pairs of query and key.

    2·T·d·(2h·d_qk + 2h·d_v) + 2·T·h·d_v·d + 2·pairs·h·(d_qk + d_v); with `concat_ua` the middle
    term, the output map, is three times as large. Where only `num_rows` are made, U, Q and the
    output are of these.
    """
    h, d = cfg.num_heads, cfg.d_model
    rows = num_tokens if num_rows is None else num_rows
    attention = 2 * pairs * h * (cfg.d_qk + cfg.d_v)
    out_width = h * cfg.d_v * (3 if cfg.concat_ua else 1)
    # U and Q are as wide as V and K
    projected = (projection_flops(cfg, num_tokens) + projection_flops(cfg, rows)) // 2
    return attention + projected + 2 * rows * out_width * d


def projection_flops(cfg: ModelConfig, num_tokens: int) -> int:
    """Products that make U, Q, K and V of one layer."""
    return 2 * num_tokens * cfg.d_model * 2 * cfg.num_heads * (cfg.d_qk + cfg.d_v)
