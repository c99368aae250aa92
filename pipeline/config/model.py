"""The model: tokens, transducers, heads."""

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.values import require

RECOMPUTABLE = "normed_x", "uvqk", "y"


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """The semi-local mask (ULTRA-HSTU, arXiv:2602.16986, eq. 6-7) and the score scale."""

    window: int | None = 256  # K1: the largest distance q - k a row sees; None is plain causal
    full_rows: int = 256  # K2: the newest history rows that see everything before them
    extra_prefix: int = 0  # oldest events that every row sees, beside the context
    attn_alpha: float | None = None  # None: 1 / d_qk
    # fixed divisor of the scores; the batch's longest would differ in serving
    scaling_seq_len: int = 4096

    def __post_init__(self) -> None:
        window = self.window
        require(
            window is None or window >= 0,
            "model.attention.window",
            window,
            "a distance of 0 or more, or null",
        )
        for name in ("full_rows", "extra_prefix"):
            require(
                getattr(self, name) >= 0,
                f"model.attention.{name}",
                getattr(self, name),
                "0 or more",
            )
        require(
            self.scaling_seq_len >= 1,
            "model.attention.scaling_seq_len",
            self.scaling_seq_len,
            "1 or more",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelConfig:
    """One transducer of a mixture: which history rows it reads, how many, and how."""

    actions: tuple[str, ...] = ()  # rows on which any of these is known and set; empty: every row
    max_len: int | None = None  # the newest of those rows; None: all
    num_layers: int = 2
    # distances count the channel's own rows
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    truncate_after_layer: int | None = None
    truncate_to: int = 1024

    def __post_init__(self) -> None:
        require(
            self.max_len is None or self.max_len >= 1,
            "model.channels.*.max_len",
            self.max_len,
            "1 or more",
        )
        require_depth(
            "model.channels.*", self.num_layers, self.truncate_after_layer, self.truncate_to
        )

    @property
    def depends_on_later_rows(self) -> bool:
        """Whether what a row sees, or whether it is kept, depends on how many rows of the channel
        follow.
        """
        full = self.attention.window is not None and self.attention.full_rows > 0
        return full or self.max_len is not None or self.truncate_after_layer is not None


def require_depth(
    section: str, num_layers: int, truncate_after_layer: int | None, truncate_to: int
) -> None:
    require(num_layers >= 1, f"{section}.num_layers", num_layers, "1 or more")
    require(truncate_to >= 1, f"{section}.truncate_to", truncate_to, "1 or more")
    after = truncate_after_layer
    rule = f"between 1 and num_layers - 1 = {num_layers - 1}, or null"
    require(
        after is None or 1 <= after < num_layers, f"{section}.truncate_after_layer", after, rule
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """ULTRA-HSTU: tokens, stack of STU layers with truncation, one head per task; or a baseline in
    its place.
    """

    encoder: Literal["ultra_hstu", "hstu", "hstu_merged", "transformer", "sasrec", "din"] = (
        "ultra_hstu"
    )
    d_model: int = 64
    num_layers: int = 2
    num_heads: int = 2
    d_qk: int = 32
    d_v: int = 32
    dropout: float = 0.1
    norm_eps: float = 1e-6
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    # N1: later layers keep the context, the newest events and the candidates
    truncate_after_layer: int | None = None
    truncate_to: int = 1024  # L': newest events kept
    channels: dict[str, ChannelConfig] = field(default_factory=dict)
    # Mixture of transducers: one per channel, each with its own depth, mask and truncation in the
    # place of
    # num_layers, attention, truncate_after_layer and truncate_to here. Empty: one transducer over
    # every row.
    # hstu and hstu_merged: a bias of relative position and time on the scores
    relative_bias: bool = False
    # transformer, sasrec: width inside the feed-forward layers; din: of its attention's MLP
    ffn_dim: int = 256
    # item and action of an event in one token; false: two tokens, and distances count tokens
    merge: bool = True
    # false: an event tells whether there was any action, not which
    heterogeneous_actions: bool = True
    silu_qkv: bool = True  # False: SiLU on U only, the authors' production form
    # the output layer reads concat[U, A, Norm(A) * U] instead of Norm(A) * U
    concat_ua: bool = False
    # learned: one constant where an event has its actions
    candidate_action: Literal["none", "learned"] = "none"
    action_dim: int = 8  # learned row per action, and as many for "unknown"
    # Where a history row stands. event: its number among the user's rows and the gap to the row
    # before, so that an encoded history serves many requests. query, the authors' form: counted
    # back from the candidates, and the age at the request (time_buckets 2048).
    time_anchor: Literal["event", "query"] = "event"
    position_buckets: int = 8192
    # bucket 0 for "no real time"; event: log buckets of the gap, query: of sqrt(age in minutes)
    time_buckets: int = 64
    # where features.dense enter: candidate tokens, task heads
    dense_to: Literal["token", "head", "both"] = "token"
    head_hidden: int = 64
    # a hidden layer of head_hidden for each task; false: one for all of them
    task_towers: bool = False
    # on CUDA of the whole layer
    attention_backend: Literal["auto", "triton", "torch", "reference"] = "auto"
    # of the token encoder's row kernels
    token_backend: Literal["auto", "triton", "torch", "reference"] = "auto"
    # of normed_x, uvqk, y: on CUDA made again in backward instead of kept
    recompute: tuple[str, ...] = ()
    # the layers' linear maps on row-wise e4m3, forward only; where a CPU runs them, emulated
    fp8: bool = False

    def __post_init__(self) -> None:
        for name in (
            "d_model",
            "num_heads",
            "d_qk",
            "d_v",
            "action_dim",
            "position_buckets",
            "head_hidden",
            "ffn_dim",
        ):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "1 or more")
        require(self.time_buckets >= 2, "model.time_buckets", self.time_buckets, "2 or more")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "in [0, 1)")
        unknown = [name for name in self.recompute if name not in RECOMPUTABLE]
        require(
            not unknown, "model.recompute", list(self.recompute), f"of {', '.join(RECOMPUTABLE)}"
        )
        require_depth("model", self.num_layers, self.truncate_after_layer, self.truncate_to)
        # a baseline that ignored these would be compared under a wrong name
        if self.encoder != "ultra_hstu":
            where = f"where model.encoder is {self.encoder}"
            require(
                self.attention.window is None,
                "model.attention.window",
                self.attention.window,
                f"null {where}",
            )
            after = self.truncate_after_layer
            require(after is None, "model.truncate_after_layer", after, f"null {where}")
            require(not self.channels, "model.channels", list(self.channels), f"empty {where}")
            stu = self.encoder in ("hstu", "hstu_merged")
            require(stu or not self.fp8, "model.fp8", self.fp8, f"false {where}")
            require(self.merge, "model.merge", self.merge, f"true {where}: the encoder says it")
        if self.interleaved:
            where = "where item and action are two tokens (model.merge: false, encoder hstu)"
            require(
                self.candidate_action == "none",
                "model.candidate_action",
                self.candidate_action,
                f"none {where}",
            )
            require(not self.channels, "model.channels", list(self.channels), f"empty {where}")
        biased = self.encoder in ("hstu", "hstu_merged")
        # its times are sums of the gaps between events
        biased = biased and self.time_anchor == "event"
        rule = "false unless model.encoder is hstu or hstu_merged, and model.time_anchor event"
        require(biased or not self.relative_bias, "model.relative_bias", self.relative_bias, rule)

    @property
    def interleaved(self) -> bool:
        return self.encoder == "hstu" or not self.merge

    @property
    def cacheable(self) -> bool:
        """Whether an encoded history serves more than one request."""
        return self.time_anchor == "event" and self.encoder == "ultra_hstu" and self.merge
