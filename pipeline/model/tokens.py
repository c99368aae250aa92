"""Codes to tokens: a `SequenceBatch` becomes the packed input of the transducer, `[context | uih |
candidates]`.

An event is one token: item and action merged by addition (ULTRA-HSTU, arXiv:2602.16986, figure 2b).
A candidate has no action; one learned constant may stand in its place. Position and time are those
of the event itself, so an encoded history does not depend on the request.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kernels.backend import Backend, choose_backend
from kernels.frozen_tokens import MOST_INPUTS
from kernels.jagged.op import concatenate_sequences, sequence_index
from kernels.layer_norm.op import layer_norm, swish_layer_norm
from kernels.position_time.op import add_position_time
from kernels.position_time.reference import BUCKETS
from kernels.position_time.types import Anchor
from pipeline.batches.collate import SequenceBatch
from pipeline.batches.rates import dense_width
from pipeline.config import ColumnFeature, FeatureConfig, HistoryFeature, InputConfig, ModelConfig


@dataclass(frozen=True, slots=True)
class Tokens:
    """The packed sequences that the transducer works on; every count includes the context."""

    x_TE: Tensor
    seq_offsets: Tensor  # int64 [B + 1]
    num_targets: Tensor  # int32 [B]
    # int32 [C]: a candidate sees the positions before this one, and itself
    target_visible: Tensor | None
    max_seq_len: int
    # int64 [2, B] on the CPU: tokens and candidates of each sequence
    host_lengths: Tensor | None = None
    # Of next items (`SequenceBatch.num_next`): their number in each sequence, int32 [B], and how
    # many positions lie before each, int32 [P]. They are no tokens: their rows are the last before.
    num_next: Tensor | None = None
    next_visible: Tensor | None = None
    # int32 [C]: of the positions before `target_visible`, a candidate sees the context and those
    # from this one on
    target_from: Tensor | None = None
    # int [B]: history tokens that its first request does not see, for attention
    span: Tensor | None = None
    # the same for truncation, and on the CPU; below 0 in a sequence that only fills a batch up
    tail_span: Tensor | None = None
    host_tail_span: Tensor | None = None

    def lengths_on_host(self) -> Tensor:
        """`host_lengths`, from which sizes of later tensors follow; where they are not given a GPU
        is waited for.
        """
        if self.host_lengths is None:
            return torch.stack([self.seq_offsets.diff(), self.num_targets.long()]).cpu()
        return self.host_lengths


# Of a frozen model whose table of the actions' states is kept: nine actions' are 20 MB of 512
# columns in bfloat16.
MOST_KEPT_STATES = 3**9

# a table's name, as in `train.tables`, its rows and its width
MakeTable = Callable[[str, int, int], nn.Module]


def plain_table(name: str, rows: int, dim: int) -> nn.Embedding:
    """An embedding table with gradients of touched rows only.

    Row 0, never or rarely trained, starts as zero.
    """
    embedding = nn.Embedding(rows, dim, sparse=True)
    with torch.no_grad():
        embedding.weight.normal_(0, 0.02)
        embedding.weight[0].zero_()
    return embedding


class NarrowLayerNorm(nn.LayerNorm):
    """A layer norm whose output has its input's type. Autocast would make it float32: under
    bfloat16 the encoder is bound by memory, and the statistics are float32 either way."""

    def __init__(self, dim: int, backend: Backend) -> None:
        super().__init__(dim)
        self.backend: Backend = backend

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.weight, self.bias, eps=self.eps, backend=self.backend)


def look_up_rows(rows: nn.Module, index: Tensor, dtype: torch.dtype) -> Tensor:
    """`rows(index)` in `dtype`.

    Where nothing is recorded the table is cast rather than what was read of it.
    """
    if isinstance(rows, nn.Embedding) and not torch.is_grad_enabled():
        return nn.functional.embedding(index, rows.weight.to(dtype))
    return rows(index).to(dtype)


class HalfLinear(nn.Linear):
    """A linear map whose weights autocast would cast in every pass: on a GPU those of a frozen
    model are cast once.
    """

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if kind != "cuda" or self.weight.requires_grad or not torch.is_autocast_enabled(kind):
            return super().forward(input)
        # where Triton is not installed, CPUs still work
        from kernels.linear.weights import cast_weight

        dtype = torch.get_autocast_dtype(kind)
        weight, bias = cast_weight(self.weight, dtype), cast_weight(self.bias, dtype)
        return nn.functional.linear(input.to(dtype), weight, bias)


class SwishLayerNorm(nn.Module):
    """x * sigmoid(Norm(x))"""

    def __init__(self, dim: int, backend: Backend) -> None:
        super().__init__()
        self.norm = NarrowLayerNorm(dim, backend)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return swish_layer_norm(x, norm.weight, norm.bias, eps=norm.eps, backend=norm.backend)


class ContentEncoder(nn.Module):
    """Item id, item columns and request columns of one event through a small MLP."""

    def __init__(
        self,
        features: FeatureConfig,
        model: ModelConfig,
        vocab_sizes: dict[str, int],
        make_table: MakeTable,
    ) -> None:
        super().__init__()
        self.names = ["item_id", *(f"item.{name}" for name in features.item)]
        self.item_sizes = [1, *(column.num_codes for column in features.item.values())]
        self.names += [f"request.{name}" for name in features.request]
        self.sizes = [*self.item_sizes, *(1 for _ in features.request)]
        self.item_id = make_table("item_id", vocab_sizes["item_id"], features.item_id_dim)
        self.item = column_tables("item", features.item, vocab_sizes, make_table)
        self.request = column_tables("request", features.request, vocab_sizes, make_table)

        width = features.item_id_dim
        for column in (*features.item.values(), *features.request.values()):
            width += column.dim
        d, backend = model.d_model, model.token_backend
        self.backend: Backend = backend
        self.mlp = nn.Sequential(
            HalfLinear(width, 2 * d),
            SwishLayerNorm(2 * d, backend),
            HalfLinear(2 * d, d),
            NarrowLayerNorm(d, backend),
        )

    def item_features(self, item_codes: Tensor) -> Tensor:
        """[N, widths]: the embeddings of id and item columns side by side, of codes [N, 1 + item
        codes].
        """
        codes = item_codes.split(self.item_sizes, dim=1)
        rows = map(mean_rows, [self.item_id, *self.item], codes)
        return torch.cat(list(rows), dim=1)

    def forward(self, item_codes: Tensor, request_codes: Tensor) -> Tensor:
        """[T, d], from codes [T, 1 + item codes] and [T, request columns]."""
        norm = self.layers[-1]
        return norm(self.rows_before_norm(item_codes, request_codes))

    @property
    def layers(self) -> tuple[HalfLinear, SwishLayerNorm, HalfLinear, NarrowLayerNorm]:
        """Those of `mlp`, in order."""
        first, gate, second, norm = self.mlp
        assert isinstance(first, HalfLinear) and isinstance(gate, SwishLayerNorm)
        assert isinstance(second, HalfLinear) and isinstance(norm, NarrowLayerNorm)
        return first, gate, second, norm

    def rows_before_norm(self, item_codes: Tensor, request_codes: Tensor) -> Tensor:
        """`forward` without its last norm, for a kernel that makes it together with what follows
        (`TokenEncoder`).
        """
        first, gate, second, _ = self.layers
        codes = torch.cat([item_codes, request_codes], dim=1).split(self.sizes, dim=1)
        tables = [self.item_id, *self.item, *self.request]
        dtype, width = unrecorded_dtype(item_codes, self.backend), first.in_features
        trained = first.weight.requires_grad or first.bias.requires_grad
        if dtype is None or trained or width % 8 or width > MOST_INPUTS:
            rows = map(mean_rows, tables, codes)
            return second(gate(first(torch.cat(list(rows), dim=1))))

        # where Triton is not installed, CPUs still work
        from kernels.frozen_tokens.triton_launch import FrozenSwish, launch_linear_swish
        from kernels.linear.weights import frozen_form

        x_TK = _look_up_all(tables, codes, width, dtype)
        linear, norm = (first.weight, first.bias), gate.norm
        frozen = frozen_form(
            first.weight, ("swish", dtype), lambda: FrozenSwish.of(*linear, dtype), linear[1:]
        )
        return second(launch_linear_swish(x_TK, frozen, norm.weight, norm.bias, norm.eps))


def unrecorded_dtype(x: Tensor, backend: Backend) -> torch.dtype | None:
    """The type in which the kernels of `kernels/frozen_tokens` compute on `x`'s device; None where
    PyTorch and training's own kernels do: where gradients are recorded, on a CPU, in float32 on a
    GPU, whose products the library does faster.
    """
    if torch.is_grad_enabled() or len(x) == 0 or choose_backend(backend, x) != "triton":
        return None
    kind = x.device.type
    dtype = torch.float32
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return dtype if dtype.itemsize == 2 or kind == "cpu" else None


def _look_up_all(
    tables: Sequence[nn.Module], codes: Sequence[Tensor], width: int, dtype: torch.dtype
) -> Tensor:
    """[T, width] in `dtype`: `mean_rows` of each table side by side."""
    from kernels.frozen_tokens.triton_launch import launch_look_up

    x_TK = torch.empty(len(codes[0]), width, dtype=dtype, device=codes[0].device)
    begin = 0
    for table, own in zip(tables, codes, strict=True):
        rows = None
        if isinstance(table, nn.Embedding) and own.shape[1] == 1:
            end = begin + table.embedding_dim
            launch_look_up(own[:, 0], table.weight, x_TK[:, begin:end])
        else:
            rows = mean_rows(table, own)
            end = begin + rows.shape[1]
            x_TK[:, begin:end] = rows
        begin = end
    return x_TK


def mean_rows(table: nn.Module, codes: Tensor) -> Tensor:
    """[N, width]: the mean of a table's rows over the codes [N, k] that are not 0; nothing where
    all are. Of one code its row, which 0 has too.
    """
    num_rows, num_codes = codes.shape
    if num_codes == 1:
        return table(codes[:, 0])
    # of no rows at all, an empty history, a width of -1 would be anything
    rows = table(codes.reshape(-1)).unflatten(0, (num_rows, num_codes))
    known = (codes > 0).to(rows.dtype)
    return (rows * known[:, :, None]).sum(1) / known.sum(1, keepdim=True).clamp(min=1)


def column_tables(
    side: str,
    columns: Mapping[str, ColumnFeature],
    vocab_sizes: dict[str, int],
    make_table: MakeTable,
) -> nn.ModuleList:
    """A table for each column of a side: `item.tag`, `request.tab` and so on."""
    tables = nn.ModuleList()
    for name, column in columns.items():
        path = f"{side}.{name}"
        tables.append(make_table(path, vocab_sizes[path], column.dim))
    return tables


class ActionEncoder(nn.Module):
    """Bit mask of actions: per action a learned row when set, zero when known and absent, another
    row when unknown.
    """

    def __init__(self, num_actions: int, dim: int, d_model: int, backend: Backend = "auto") -> None:
        super().__init__()
        self.set_rows = nn.Parameter(torch.randn(num_actions, dim))
        self.unknown_rows = nn.Parameter(torch.randn(num_actions, dim))
        self.mlp = nn.Sequential(
            HalfLinear(num_actions * dim, d_model),
            SwishLayerNorm(d_model, backend),
            HalfLinear(d_model, d_model),
        )
        number = torch.arange(num_actions, dtype=torch.int32)
        self.bits: Tensor
        self.register_buffer("bits", 2**number, persistent=False)
        self.powers: Tensor
        self.register_buffer("powers", 3 ** number.long(), persistent=False)

    def forward(self, action_mask: Tensor, known_mask: Tensor) -> Tensor:
        """[T, d], from bit masks int32 [T].

        actions      click  like  hate
        known          1      1     0
        set            1      0     0
        row          set_0    0   unknown_2
        """
        known = (known_mask[:, None] & self.bits) != 0
        done = ((action_mask[:, None] & self.bits) != 0) & known
        dtype = self.set_rows.dtype
        rows = (
            done[:, :, None].to(dtype) * self.set_rows
            + (~known)[:, :, None].to(dtype) * self.unknown_rows
        )
        return self.mlp(rows.flatten(1))

    @property
    def num_states(self) -> int:
        """States of all actions together, of which each is absent, set or unknown."""
        return 3 ** len(self.bits)

    def state_rows(self) -> Tensor:
        """[3 ** actions, d]: `forward` of every state, by the numbers of `number_states`.

        Many tokens share few rows.
        """
        state = torch.arange(self.num_states, device=self.bits.device)
        digit = state[:, None] // self.powers % 3
        action_mask = ((digit == 1) * self.bits).sum(1)
        known_mask = ((digit != 2) * self.bits).sum(1)
        return self(action_mask.int(), known_mask.int())

    def number_states(self, action_mask: Tensor, known_mask: Tensor) -> Tensor:
        """int64 [T], from bit masks int32 [T]: a number whose digits to base 3 are the actions, 0
        absent, 1 set, 2 unknown.

        actions      click  like  hate
        known          1      1     0
        set            1      0     0
        number         1  +  0·3 + 2·9  = 19
        """
        known = (known_mask[:, None] & self.bits) != 0
        done = (action_mask[:, None] & self.bits) != 0
        digit = torch.where(known, done.long(), 2)
        return (digit * self.powers).sum(1)


class OutcomeEncoder(nn.Module):
    """The buckets of a history row's outcomes: a learned row each, summed.

    The tables are small, so they are one parameter with the columns one after another.
    """

    def __init__(self, history: dict[str, HistoryFeature], d_model: int) -> None:
        super().__init__()
        # one row for unknown, and a bucket more than there are edges
        sizes = [len(feature.edges) + 2 for feature in history.values()]
        self.rows = nn.Parameter(torch.empty(sum(sizes), d_model).normal_(0, 0.02))
        self.first: Tensor
        first = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        self.register_buffer("first", first, persistent=False)

    def forward(self, history_codes: Tensor) -> Tensor:
        """[T, d] from int32 [T, history columns]."""
        return nn.functional.embedding(history_codes + self.first, self.rows).sum(1)


class DenseEncoder(nn.Module):
    """Rates and counts of a candidate through a small MLP, as nothing at the start of training."""

    def __init__(self, width: int, d_model: int, backend: Backend) -> None:
        super().__init__()
        self.hidden = nn.Sequential(HalfLinear(width, d_model), SwishLayerNorm(d_model, backend))
        self.out = HalfLinear(d_model, d_model)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, dense: Tensor) -> Tensor:
        return self.out(self.hidden(dense))


class ContextEncoder(nn.Module):
    """One prefix token per group of user columns. Its own linear layer tells a token what it is."""

    def __init__(
        self,
        features: FeatureConfig,
        d_model: int,
        vocab_sizes: dict[str, int],
        make_table: MakeTable,
    ) -> None:
        super().__init__()
        names = list(features.user)
        self.names = [f"user.{name}" for name in names]
        self.sizes = [column.num_codes for column in features.user.values()]
        self.user = column_tables("user", features.user, vocab_sizes, make_table)

        self.groups: list[list[int]] = []  # numbers of each token's columns
        self.out = nn.ModuleList()
        for group in features.user_tokens.values():
            self.groups.append([names.index(name) for name in group])
            width = sum(features.user[name].dim for name in group)
            self.out.append(nn.Sequential(HalfLinear(width, d_model), nn.LayerNorm(d_model)))

    def forward(self, user_codes: Tensor) -> Tensor:
        """[B, context tokens, d]"""
        codes = user_codes.split(self.sizes, dim=1)
        rows = list(map(mean_rows, self.user, codes))

        tokens = []
        for out, group in zip(self.out, self.groups, strict=True):
            tokens.append(out(torch.cat([rows[i] for i in group], dim=1)))
        return torch.stack(tokens, dim=1)


class TokenEncoder(nn.Module):
    """SequenceBatch → Tokens."""

    one_token_per_event = True

    def __init__(
        self,
        inputs: InputConfig,
        vocab_sizes: dict[str, int],
        make_table: MakeTable = plain_table,
    ) -> None:
        super().__init__()
        features, model = inputs.features, inputs.model
        self.time_anchor: Anchor = model.time_anchor
        self.backend: Backend = model.token_backend
        self.num_context = len(features.user_tokens)
        self.content = ContentEncoder(features, model, vocab_sizes, make_table)

        self.heterogeneous = model.heterogeneous_actions
        num_actions = inputs.num_action_bits if self.heterogeneous else 1
        self.action = ActionEncoder(num_actions, model.action_dim, model.d_model, self.backend)
        self.outcome = None
        if features.history:
            self.outcome = OutcomeEncoder(features.history, model.d_model)
        learned = model.candidate_action == "learned"
        self.candidate_action = nn.Parameter(torch.zeros(model.d_model)) if learned else None

        num_dense = dense_width(features, len(inputs.task_bits))
        into_token = num_dense > 0 and model.dense_to != "head"
        self.dense = DenseEncoder(num_dense, model.d_model, self.backend) if into_token else None
        self.context = None
        if self.num_context:
            self.context = ContextEncoder(features, model.d_model, vocab_sizes, make_table)

        position = make_table("position", model.position_buckets, model.d_model)
        time = make_table("time", model.time_buckets, model.d_model)
        # small, never sharded
        assert isinstance(position, nn.Embedding) and isinstance(time, nn.Embedding)
        self.position, self.time = position, time
        # of a frozen model: what the table of the actions' states was made of, and it
        self._kept_table: tuple[list[object], Tensor] | None = None
        self.dropout = nn.Dropout(model.dropout)

    def table_codes(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """int32 [T] or [B], of lists times their length: the rows of each feature's table that
        `forward` looks up, in order.
        """
        columns = torch.cat([batch.item_codes, batch.request_codes], dim=1)
        codes = _by_table(self.content.names, columns, self.content.sizes)
        if self.context is None:
            return codes
        return codes | _by_table(self.context.names, batch.user_codes, self.context.sizes)

    def place_codes(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """int [T] each: the rows of the tables of positions and of times that are looked up."""
        position = batch.position % self.position.num_embeddings
        return position, BUCKETS[self.time_anchor](batch.gap_ms, self.time.num_embeddings)

    def forward(self, batch: SequenceBatch) -> Tokens:
        if self._places_rows(batch):
            return self._placed_tokens(batch)

        tokens = self.sequence_tokens(batch)
        if self.context is not None:
            tokens = prepend_context(self.context(batch.user_codes), tokens)
        return replace(tokens, x_TE=self.dropout(tokens.x_TE))

    def _placed_tokens(self, batch: SequenceBatch) -> Tokens:
        """The same where `_places_rows`: rows are written behind their context at once."""
        no_rows = batch.position.new_empty(batch.num_tokens, 0)
        tokens = self.as_tokens(no_rows, batch)
        if self.context is None:
            return replace(tokens, x_TE=self._placed_rows(batch, 0, batch.num_tokens))

        context = self.context(batch.user_codes)
        tokens = prepend_context(context[:, :, :0], tokens)
        x_TE = self._placed_rows(batch, self.num_context, len(tokens.x_TE))
        # where each sequence begins, and its context
        first = tokens.seq_offsets[:-1, None] + torch.arange(self.num_context, device=x_TE.device)
        x_TE.index_copy_(0, first.flatten(), context.flatten(0, 1).to(x_TE.dtype))
        return replace(tokens, x_TE=self.dropout(x_TE))

    def sequence_tokens(self, batch: SequenceBatch) -> Tokens:
        """History rows and candidates, one token each, without their context."""
        return self.as_tokens(self.event_rows(batch), batch)

    def as_tokens(self, x_TE: Tensor, batch: SequenceBatch) -> Tokens:
        host = batch.on_host
        lengths = torch.stack([host.seq_offsets.diff(), host.num_targets.long()])
        span = batch.target_span
        if span is not None and batch.filling is not None:
            span = span.clamp(min=0)
        return Tokens(
            x_TE,
            batch.seq_offsets,
            batch.num_targets,
            batch.target_visible,
            batch.max_seq_len,
            lengths,
            batch.num_next,
            batch.next_visible,
            target_from=batch.target_from,
            span=span,
            tail_span=batch.target_span,
            host_tail_span=host.target_span,
        )

    def event_rows(self, batch: SequenceBatch) -> Tensor:
        """[T, d]: history rows and candidates, no context; none depends on another."""
        if self._places_rows(batch):
            return self._placed_rows(batch, 0, batch.num_tokens)

        x_TE = self.item_rows(batch)
        if not self._shares_states(batch):
            return self.add_position_and_time(x_TE + self.action_rows(batch), batch)

        is_target = target_mask(batch.seq_offsets, batch.num_targets, batch.num_tokens)
        if self.outcome is not None:
            assert batch.history_codes is not None, "collate makes them where the model reads them"
            buckets = self.outcome(batch.history_codes).to(x_TE.dtype)
            x_TE = x_TE + buckets.masked_fill(is_target[:, None], 0)

        number = self.action.number_states(*self._action_masks(batch))
        number = number.masked_fill(is_target, self.action.num_states)
        return self.add_position_and_time(x_TE, batch, third=(self._states_table(), number))

    def _places_rows(self, batch: SequenceBatch) -> bool:
        """True where one kernel makes the content's last norm, adds position, time and actions and
        writes each row to its place: in a pass without gradients, of rows that hold no more.
        """
        if self.outcome is not None or (self.dense is not None and batch.dense is not None):
            return False
        if unrecorded_dtype(batch.position, self.backend) is None:
            return False
        return self.one_token_per_event and self._shares_states(batch)

    def _placed_rows(self, batch: SequenceBatch, num_context: int, num_rows: int) -> Tensor:
        """[num_rows, d]: `event_rows` where `_places_rows`, each sequence's behind `num_context`
        rows that are not written.
        """
        from kernels.frozen_tokens.triton_launch import (
            TokenSequences,
            find_token_rows,
            launch_place,
        )
        from kernels.linear.weights import cast_weight

        found = find_token_rows(
            batch.position,
            batch.gap_ms,
            (batch.action_mask, batch.known_mask),
            TokenSequences(batch.seq_offsets, batch.num_targets, num_context),
            (self.position.num_embeddings, self.time.num_embeddings),
            self.time_anchor,
            num_actions=len(self.action.bits),
            merged=not self.heterogeneous,
        )
        x_TE = self.content.rows_before_norm(batch.item_codes, batch.request_codes)
        norm = self.content.layers[-1]
        tables = (
            cast_weight(self.position.weight, x_TE.dtype),
            cast_weight(self.time.weight, x_TE.dtype),
            self._states_table(),
        )
        return launch_place(x_TE, (norm.weight, norm.bias, norm.eps), tables, found, num_rows)

    def _states_table(self) -> Tensor:
        """[3 ** actions + 1, d]: every state's row, and behind them the candidates'. Of a frozen
        model it is made once.
        """
        parameters = list(self.action.parameters())
        if self.candidate_action is not None:
            parameters.append(self.candidate_action)
        if any(parameter.requires_grad for parameter in parameters):
            return self._make_states_table()

        kind = parameters[0].device.type
        made_of: list[object] = [torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)]
        for parameter in parameters:
            made_of += [parameter.data_ptr(), parameter._version]
        if self._kept_table is None or self._kept_table[0] != made_of:
            self._kept_table = made_of, self._make_states_table()
        return self._kept_table[1]

    def _make_states_table(self) -> Tensor:
        rows = self.action.state_rows()
        of_target = self.candidate_action
        if of_target is None:
            of_target = rows.new_zeros(rows.shape[1])
        return torch.cat([rows, of_target[None].to(rows.dtype)])

    def _shares_states(self, batch: SequenceBatch) -> bool:
        """True where the action MLP runs over every state there is and not over every token, and
        the kernel that adds position and time adds its rows: where there are more tokens than rows
        of all three tables, and in a frozen model, whose table is made once.
        """
        position, time = self.position, self.time
        if not (isinstance(position, nn.Embedding) and isinstance(time, nn.Embedding)):
            return False
        if choose_backend(self.backend, position.weight) != "triton":
            return False

        num_states = self.action.num_states
        if not self.action.set_rows.requires_grad:
            return num_states <= MOST_KEPT_STATES
        rows = position.num_embeddings + time.num_embeddings + num_states + 1
        return batch.num_tokens >= rows

    def candidate_rows(self, batch: SequenceBatch) -> Tensor:
        """The same, [C, d], of a batch without history rows: no action is computed."""
        x_TE = self.item_rows(batch)
        if self.candidate_action is not None:
            x_TE = x_TE + self.candidate_action
        return self.add_position_and_time(x_TE, batch)

    def item_rows(self, batch: SequenceBatch) -> Tensor:
        """[T, d]: what was shown, on which surface, and the rates that a candidate carries."""
        x_TE = self.content(batch.item_codes, batch.request_codes)
        if self.dense is None or batch.dense is None:  # a batch of histories alone has none
            return x_TE
        at = target_index(batch.seq_offsets, batch.num_targets, batch.dense.shape[0])
        return x_TE.index_add(0, at, self.dense(batch.dense).to(x_TE.dtype))

    def action_rows(self, batch: SequenceBatch) -> Tensor:
        """[T, d]: what the user did, and what came of it.

        A candidate's own outcome must not reach it, not even as "unknown".
        """
        is_target = target_mask(batch.seq_offsets, batch.num_targets, batch.num_tokens)
        x_TE = self.action(*self._action_masks(batch))
        if self.outcome is not None:
            assert batch.history_codes is not None, "collate makes them where the model reads them"
            x_TE = x_TE + self.outcome(batch.history_codes).to(x_TE.dtype)

        x_TE = x_TE.masked_fill(is_target[:, None], 0)
        if self.candidate_action is None:
            return x_TE
        return x_TE + is_target[:, None] * self.candidate_action

    def _action_masks(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """int32 [T] each: bits of the actions, and of those that are known."""
        actions, known = batch.action_mask, batch.known_mask
        if self.heterogeneous:
            return actions, known
        return ((actions & known) != 0).int(), (known != 0).int()

    def add_position_and_time(
        self, x_TE: Tensor, batch: SequenceBatch, third: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """[T, d]: position and time added, and rows of a `third` table where they are tables."""
        position, time, gap_ms = self.position, self.time, batch.gap_ms
        # neither of them packed to INT4
        if isinstance(position, nn.Embedding) and isinstance(time, nn.Embedding):
            tables, anchor = (position.weight, time.weight), self.time_anchor
            return add_position_time(
                *(x_TE, *tables, batch.position, gap_ms),
                anchor=anchor,
                third=third,
                backend=self.backend,
            )
        assert third is None, "only kernels that have all three tables add them"

        number, bucket = self.place_codes(batch)
        x_TE = x_TE + look_up_rows(position, number, x_TE.dtype)
        return x_TE + look_up_rows(time, bucket, x_TE.dtype)


def _by_table(names: list[str], codes: Tensor, sizes: list[int]) -> dict[str, Tensor]:
    """Flat codes by table, from [N, all codes]."""
    found = {}
    for name, own in zip(names, codes.split(sizes, dim=1), strict=True):
        found[name] = own.reshape(-1)
    return found


def target_mask(seq_offsets: Tensor, num_targets: Tensor, num_tokens: int) -> Tensor:
    """bool [T], true on the candidates."""
    first_target = (seq_offsets[1:] - num_targets)[sequence_index(seq_offsets, num_tokens)]
    return torch.arange(num_tokens, device=seq_offsets.device) >= first_target


def target_index(seq_offsets: Tensor, num_targets: Tensor, total: int) -> Tensor:
    """int64 [C]: where the candidates are among the tokens; `total` is C, known without asking the
    device.
    """
    ends = num_targets.long().cumsum(0)
    shift = torch.repeat_interleave(seq_offsets[1:] - ends, num_targets, output_size=total)
    return torch.arange(total, device=seq_offsets.device) + shift


def prepend_context(context_BCE: Tensor, tokens: Tokens) -> Tokens:
    """Each sequence after its context tokens; no loop over sequences.

    context    c0 | c1
    tokens     h0 h1 x | y            offsets 0 3 4
    result     c0 h0 h1 x | c1 y      offsets 0 4 6
    """
    num_sequences, num_context, _ = context_BCE.shape
    shift = torch.arange(num_sequences + 1, device=tokens.seq_offsets.device) * num_context
    context = context_BCE.flatten(0, 1).to(tokens.x_TE.dtype)
    visible, next_visible = tokens.target_visible, tokens.next_visible
    oldest = tokens.target_from
    return Tokens(
        x_TE=concatenate_sequences(context, shift, tokens.x_TE, tokens.seq_offsets),
        seq_offsets=tokens.seq_offsets + shift,
        num_targets=tokens.num_targets,
        target_visible=None if visible is None else visible + num_context,
        max_seq_len=tokens.max_seq_len + num_context,
        host_lengths=tokens.lengths_on_host() + torch.tensor([[num_context], [0]]),
        num_next=tokens.num_next,
        next_visible=None if next_visible is None else next_visible + num_context,
        target_from=None if oldest is None else oldest + num_context,
        span=tokens.span,
        tail_span=tokens.tail_span,
        host_tail_span=tokens.host_tail_span,
    )
