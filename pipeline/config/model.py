"""The model: tokens, encoder, heads."""

from dataclasses import dataclass, field
from typing import Literal

from kernels.stu.recompute import Recomputable
from pipeline.config.errors import require
from pipeline.config.setting import check_ranges, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """The semi-local mask (ULTRA-HSTU, arXiv:2602.16986, eq. 6-7) and the score scale."""

    window: int | None = setting(
        256,
        at_least=0,
        rule="a distance of 0 or more",
        doc="K1: largest distance, in rows, from a query back to a key that it sees. Null: plain "
        "causal attention.",
    )
    full_rows: int = setting(
        256, at_least=0, doc="K2: number of newest history rows that see everything before them."
    )
    extra_prefix: int = setting(
        0, at_least=0, doc="Number of oldest events that every row sees, beside the context."
    )
    attn_alpha: float | None = setting(
        None, doc="Factor of the scores before SiLU. Null: 1 / d_qk."
    )
    scaling_seq_len: int = setting(
        64,
        at_least=1,
        doc="Length, in rows, by which the scores are divided. It is fixed because a batch's "
        "longest sequence would differ in serving. Norm(A) undoes it but for model.norm_eps: where "
        "it is too large for attn_alpha the attention starts silent, and training warns.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, "model.attention")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelConfig:
    """One transducer of a mixture: which history rows it reads, how many, and how. Distances of its
    attention count the channel's own rows.
    """

    actions: tuple[str, ...] = setting(
        (),
        doc="Actions of which at least one is known and set on each row that is read. Empty: every "
        "row.",
    )
    max_len: int | None = setting(
        None, at_least=1, doc="Number of the newest of those rows that are read. Null: all."
    )
    num_layers: int = setting(2, at_least=1, doc="Number of layers.")
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    truncate_after_layer: int | None = setting(
        None,
        doc="Layer, counted from 1, after which the older history is dropped. Null: never.",
    )
    truncate_to: int = setting(
        1024, at_least=1, doc="Number of newest rows that the later layers keep."
    )

    def __post_init__(self) -> None:
        check_ranges(self, "model.channels.*")
        _refuse_truncation_after_the_last_layer(
            "model.channels.*", self.num_layers, self.truncate_after_layer
        )

    @property
    def depends_on_later_rows(self) -> bool:
        """True if what a row sees, or if it is kept, depends on the number of the channel's rows
        after it.
        """
        full = self.attention.window is not None and self.attention.full_rows > 0
        return full or self.max_len is not None or self.truncate_after_layer is not None


def _refuse_truncation_after_the_last_layer(
    section: str, num_layers: int, truncate_after_layer: int | None
) -> None:
    """Truncation shortens the layers after it, so there must be one."""
    require(
        truncate_after_layer is None or 1 <= truncate_after_layer < num_layers,
        f"{section}.truncate_after_layer",
        truncate_after_layer,
        f"between 1 and num_layers - 1 = {num_layers - 1}, or null",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """The loop of the encoder lares: model.num_layers layers, gone through again and again."""

    layer: Literal["stu", "transformer"] = setting(
        "stu", doc="Kind of the layers: those of hstu_merged or of transformer."
    )
    pre_layers: int = setting(2, at_least=0, doc="Layers before the loop.")
    steps: int = setting(4, at_least=1, doc="Times that the loop is gone through.")
    random_steps: bool = setting(
        True, doc="Training draws the number of steps for each batch, from 1 to twice steps."
    )
    join: Literal["linear", "mean", "gate"] = setting(
        "linear",
        doc="How a step's input is made of the step before and the rows before the loop: a linear "
        "map of both, their mean, or a mean by one learned share.",
    )
    noise: float = setting(
        1.0, at_least=0, doc="Standard deviation of the loop's first state in training; 0 else."
    )

    def __post_init__(self) -> None:
        check_ranges(self, "model.loop")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """ULTRA-HSTU: tokens, a stack of STU layers with truncation, one head per task; or a baseline
    in its place.
    """

    encoder: Literal[
        "ultra_hstu",
        "hstu",
        "hstu_merged",
        "transformer",
        "sasrec",
        "din",
        "fuxi_alpha",
        "fuxi_beta",
        "lares",
    ] = setting("ultra_hstu", doc="Encoder of the history: ultra_hstu, or one of the baselines.")
    d_model: int = setting(64, at_least=1, doc="Width of a token.")
    num_layers: int = setting(2, at_least=1, doc="Number of layers.")
    num_heads: int = setting(2, at_least=1, doc="Number of attention heads.")
    d_qk: int = setting(32, at_least=1, doc="Width of a query and of a key, for each head.")
    d_v: int = setting(32, at_least=1, doc="Width of a value, for each head.")
    dropout: float = setting(
        0.1, at_least=0, below=1, doc="Share of the values that are dropped in training."
    )
    norm_eps: float = setting(
        1e-6, above=0, doc="Added to the variance in the layers' normalisations."
    )
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    truncate_after_layer: int | None = setting(
        None,
        doc="N1: layer, counted from 1, after which the older history is dropped; later layers "
        "keep the context, the newest events and the candidates. Null: never.",
    )
    truncate_to: int = setting(
        1024, at_least=1, doc="L': number of newest events that the later layers keep."
    )
    channels: dict[str, ChannelConfig] = setting(
        {},
        doc="Mixture of transducers, by a name of your own. Each has its own depth, mask and "
        "truncation in the place of num_layers, attention, truncate_after_layer and truncate_to "
        "of this section. Empty: one transducer over every row.",
    )
    relative_bias: bool = setting(
        False,
        doc="Add a bias of relative position and time to the scores, for the encoders hstu and "
        "hstu_merged.",
    )
    ffn_dim: int = setting(
        256,
        at_least=1,
        doc="Width inside the feed-forward layers of transformer, sasrec, fuxi_alpha, fuxi_beta "
        "and lares, and of the MLP in din's attention.",
    )
    loop: LoopConfig = field(default_factory=LoopConfig)
    merge: bool = setting(
        True,
        doc="Item and action of an event are one token. False: two tokens, and distances count "
        "tokens.",
    )
    heterogeneous_actions: bool = setting(
        True, doc="An event tells its actions. False: it tells only if there was any."
    )
    silu_qkv: bool = setting(
        True,
        doc="SiLU on U, V, Q and K. False: on U only, the production form of the paper's authors.",
    )
    norm_a_fp32: bool = setting(
        False,
        doc="Norm(A) reads the attention output A in float32, for layers of STUs in bfloat16. "
        "False: A is rounded to bfloat16 first, half the bytes. In float32 both are the same.",
    )
    concat_ua: bool = setting(
        False,
        doc="The output layer of an STU reads concat[U, A, Norm(A) * U] instead of Norm(A) * U.",
    )
    candidate_action: Literal["none", "learned"] = setting(
        "none",
        doc="What a candidate has where an event has its actions: nothing, or one learned "
        "constant.",
    )
    action_dim: int = setting(
        8,
        at_least=1,
        doc='Width of the learned row of each action; "unknown" has as wide a row.',
    )
    time_anchor: Literal["event", "query"] = setting(
        "event",
        doc="Where a history row stands. event: its number among the user's rows and the gap to "
        "the row before, so that an encoded history serves many requests. query, the authors' "
        "form: counted back from the candidates, and the age at the request.",
    )
    position_buckets: int = setting(
        8192,
        at_least=1,
        doc="Rows of the position embedding. Larger distances from the query share the last; with "
        "model.time_anchor: event, larger places in the history begin again at the first. A "
        "relative bias has as many rows, and larger distances share its last.",
    )
    time_buckets: int = setting(
        64,
        at_least=2,
        doc='Rows of the time embedding; row 0 is "no real time". event: logarithmic buckets of '
        "the gap. query: of the square root of the age in minutes, for which the authors have "
        "2048.",
    )
    dense_to: Literal["token", "head", "both"] = setting(
        "token", doc="Where features.dense enter: the candidates' tokens, the task heads, or both."
    )
    head_hidden: int = setting(64, at_least=1, doc="Width of the heads' hidden layer.")
    task_towers: bool = setting(
        False, doc="A hidden layer for each task. False: one for all of them."
    )
    attention_backend: Literal["auto", "triton", "torch", "reference"] = setting(
        "auto",
        doc="Implementation of the attention; on CUDA of the whole layer. auto: Triton on CUDA, "
        "PyTorch on CPU.",
    )
    token_backend: Literal["auto", "triton", "torch", "reference"] = setting(
        "auto",
        doc="Implementation of the token encoder's row kernels. auto: Triton on CUDA, PyTorch on "
        "CPU.",
    )
    recompute: tuple[Recomputable, ...] = setting(
        (),
        doc="Values of a layer that are computed again in the backward pass on CUDA instead of "
        "kept in memory.",
    )
    fp8: bool = setting(
        False,
        doc="The layers' linear maps use row-wise FP8 (e4m3) in the forward pass; emulated on a "
        "CPU.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, "model")
        _refuse_truncation_after_the_last_layer("model", self.num_layers, self.truncate_after_layer)
        rule = "false where model.concat_ua is true: U, A and Norm(A) * U would share one scale"
        require(not (self.fp8 and self.concat_ua), "model.fp8", self.fp8, rule)

    @property
    def cacheable(self) -> bool:
        """True if an encoded history serves more than one request."""
        return self.time_anchor == "event" and self.encoder == "ultra_hstu" and self.merge
