"""Launches of the Triton kernels: tile lists of a batch, tile sizes, tensor descriptors, autograd.

Nothing here reads a value from the device: grids are bounded by what the host knows, and a program
past the end of
its list returns at once.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.launch import next_power_of_2
from kernels.semi_local_attention import triton_bias, triton_kernels, triton_tiles
from kernels.semi_local_attention.reference import (
    LOG_BUCKET,
    RelativeBias,
    time_bucket,
    whole_seconds,
)

# tiles are cut so that the cut ones give about two waves of two programs on 132 multiprocessors
SPLIT_PROGRAMS = 576
SHORTEST_PART = 8  # blocks: below, writing and adding a partial sum costs more than it hides
ENTRY = triton_tiles.ENTRY.value
CELLS = triton_bias.CELLS.value


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """Tile sizes of a kernel: `rows` queries, `keys` keys."""

    rows: int
    keys: int
    warps: int
    stages: int


def tile_sizes(
    kernel: str,
    width: int,
    *,
    half: bool,
    banded: bool,
    biased: bool,
    max_seq_len: int,
    hopper: bool,
):
    """The static table, measured on an H100 (benchmarks/NOTES.md); `width` is the wider head, a
    power of two.

    Two programs of four warps on a multiprocessor beat one of eight: stock Triton waits for both
    products in every step, so only another program can overlap with the activation.
    """
    if not half:
        return AttentionTile(32, 32 if width <= 64 else 16, 4, 2)
    if width > 128 and hopper and not biased:
        causal = (
            AttentionTile(128, 64, 8, 2) if kernel == "forward" else AttentionTile(64, 64, 8, 2)
        )
        return AttentionTile(64, 32, 4, 2) if banded and kernel == "forward" else causal
    if biased and hopper and width <= 128:
        return {
            "forward": AttentionTile(64, 64, 4, 2),
            "backward_queries": AttentionTile(64, 32, 4, 2),
        }.get(kernel, AttentionTile(32, 64, 4, 3))
    if width > 128 or not hopper:
        return AttentionTile(32, 32, 4, 2) if width > 128 else AttentionTile(64, 32, 4, 2)
    if width <= 64:
        stages = {"backward_queries": 4, "backward_keys": 2} if width <= 32 else {}
        return AttentionTile(64, 64, 4, stages.get(kernel, 3))
    if kernel == "backward_queries" and not banded and max_seq_len >= 1024:
        return AttentionTile(128, 64, 8, 3)
    if kernel.startswith("backward"):
        return AttentionTile(64, 64, 4, 2)
    if max_seq_len <= 1024:
        return AttentionTile(64, 32, 4, 3)
    return AttentionTile(64, 64, 4, 3) if banded else AttentionTile(128, 64, 4, 2)


@dataclass(frozen=True, slots=True)
class TileList:
    tiles: Tensor  # int32 [capacity, ENTRY]
    header: Tensor  # int32 [2]
    arrived: Tensor  # int32 [slots, H], zeros between launches
    capacity: int
    slots: int
    partials: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    sums: dict[int, Tensor] = field(default_factory=dict)

    def row_sums(self, width: int) -> Tensor:
        """Room for the sum of each tile's rows, [capacity, width]. A tile's is written by its first
        entry's number, so that always the same rows stay zero, and a launch need not clear it for
        the next."""
        if width not in self.sums:
            self.sums[width] = torch.zeros(
                self.capacity, width, dtype=torch.float32, device=self.tiles.device
            )
        return self.sums[width]

    def partial(self, *shape: int) -> Tensor:
        """Room for the sums of cut tiles, [slots, *shape]; kernels that follow each other share it."""
        if shape not in self.partials:
            self.partials[shape] = torch.empty(
                self.slots, *shape, dtype=torch.float32, device=self.tiles.device
            )
        return self.partials[shape]


@dataclass
class TritonPlan:
    """The mask of a batch; its tile lists are built on the device at first use and serve all layers
    and backward.

    Launches that share a plan must follow each other on one stream: the counters of cut tiles are
    shared.
    """

    seq_offsets: Tensor  # with `cached`, of the cache
    num_targets: Tensor | None  # with `cached`, the offsets of the new rows, int64 [B + 1]
    target_visible: Tensor | None
    num_tokens: int
    max_seq_len: int
    window: int | None
    full_rows: int
    prefix: int
    cached: bool = False
    lists: dict[tuple[bool, int, int, int], TileList] = field(default_factory=dict)
    problems: dict[tuple, "AttentionProblem"] = field(default_factory=dict)

    def tile_list(self, keys: bool, tile: AttentionTile, heads: int) -> TileList:
        """Tiles of keys for dk and dv, or of rows."""
        place = keys, tile.rows, tile.keys, heads
        if place not in self.lists:
            self.lists[place] = _build_list(self, keys, tile, heads)
        return self.lists[place]


def _build_list(plan: TritonPlan, keys: bool, tile: AttentionTile, heads: int) -> TileList:
    """Two launches. The capacity bounds what any lengths with these sums need: whole tiles, a
    broken tile per kind and sequence, and the parts, of which `count_tiles` allows SPLIT_PROGRAMS /
    heads beyond one per tile."""
    offsets, device = plan.seq_offsets, plan.seq_offsets.device
    num_sequences = len(offsets) - 1
    banded, candidates = plan.window is not None, plan.num_targets is not None
    kinds = 1 + (not plan.cached) * (candidates + (banded and not keys))
    extra = -(-SPLIT_PROGRAMS // heads)
    capacity = plan.num_tokens // (tile.keys if keys else tile.rows) + kinds * num_sequences + extra
    flat = torch.empty(2 + 3 * num_sequences + capacity * ENTRY, dtype=torch.int32, device=device)
    header, first, tiles = flat.split([2, 3 * num_sequences, capacity * ENTRY])
    arrived = torch.zeros(2 * extra * heads, dtype=torch.int32, device=device)
    targets = offsets if plan.num_targets is None else plan.num_targets
    visible = offsets if plan.target_visible is None else plan.target_visible
    kinds_of = {"BANDED": banded, "CANDIDATES": candidates}
    sizes = {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
    block = min(4096, next_power_of_2(num_sequences))
    triton_tiles.count_tiles[(1,)](
        offsets, targets, header, first, num_sequences, plan.full_rows, plan.prefix, KEYS=keys, CACHED=plan.cached,
        HEADS=heads, SPLIT_PROGRAMS=SPLIT_PROGRAMS, SHORTEST_PART=SHORTEST_PART, BLOCK_B=block, **kinds_of, **sizes,
        num_warps=min(16, max(1, block // 128)),
    )  # fmt: skip
    longest = plan.max_seq_len // (tile.keys if keys else tile.rows) + 2
    block = max(16, min(128, next_power_of_2(longest)))
    if keys:
        has_visible = plan.target_visible is not None
        triton_tiles.write_key_tiles[(num_sequences,)](
            offsets, targets, visible, header, first, tiles, num_sequences, plan.full_rows, plan.prefix,
            VISIBLE=has_visible, BLOCK_E=block, **kinds_of, **sizes, num_warps=2,
        )  # fmt: skip
    else:
        triton_tiles.write_row_tiles[(num_sequences,)](
            offsets, targets, header, first, tiles, num_sequences, plan.full_rows, CACHED=plan.cached, BLOCK_E=block,
            **kinds_of, **sizes, num_warps=1,
        )  # fmt: skip
    return TileList(tiles, header, arrived, capacity, 2 * extra)


@dataclass(slots=True)
class PreparedLaunch:
    """All of a kernel's launch that is the same for every layer: what is left to fill in are the
    tensors.
    """

    kernel: Any
    tile: AttentionTile
    programs: int
    # of the operands, none with pointers; their `base` is set at each launch
    descriptors: list[TensorDescriptor]
    partials: tuple[Tensor, ...]
    lists: tuple[Tensor, ...]
    numbers: tuple[object, ...]
    unused: Tensor  # stands for the bias where there is none
    row_sums: Tensor  # or `unused`
    compiled: Any = None

    def launch(self, operands: tuple[Tensor, ...], *arguments: Tensor) -> None:
        """The compiled kernel is kept and launched directly: going through the arguments again to
        find it costs more than the launch. With descriptors, nothing that its choice depends on
        differs between layers of one shape."""
        sources: list[Any] = list(operands)
        for i, descriptor in enumerate(self.descriptors):
            descriptor.base = operands[i]
            sources[i] = descriptor
        everything = *sources, *arguments, *self.partials, *self.lists, *self.numbers
        if self.compiled is None:
            options = {"num_warps": self.tile.warps, "num_stages": self.tile.stages}
            compiled = self.kernel[(self.programs,)](*everything, **options)
            if self.descriptors:
                self.compiled = compiled
        else:
            self.compiled[(self.programs, 1, 1)](*everything)
        for descriptor in self.descriptors:
            descriptor.base = None  # a plan must not keep a layer's tensors


@dataclass(frozen=True, slots=True)
class GradStores:
    """Where a backward kernel's gradients go."""

    strides: tuple[int, ...]  # of their rows, and last of the slopes' rows
    widths: tuple[int, int]  # of their heads, for q and k, and for v
    sloped: bool
    summed: int = 0  # width of the rows' sums, 0 without


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """What the launches of one layer shape share.

    Layers of a model have one shape, so a plan keeps its problems.
    """

    plan: TritonPlan
    alpha: float
    scale: float
    heads: int
    d_qk: int  # as the kernels see it, a power of two
    d_v: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    hopper: bool
    tables: tuple[int, int] | None  # entries of the bias tables
    on_gpu: bool  # rather than in the interpreter
    prepared: dict[tuple[str, "GradStores | None"], PreparedLaunch] = field(default_factory=dict)

    def prepare(
        self,
        name: str,
        operands: tuple[Tensor, ...],
        causal: bool = False,
        grads: "GradStores | None" = None,
    ) -> PreparedLaunch:
        """The launch of a kernel; `operands` are its first arguments, of which only shapes and
        strides count.
        """
        key = name, grads
        if key not in self.prepared:
            self.prepared[key] = self._prepare(name, operands, causal, grads)
        return self.prepared[key]

    def _prepare(
        self, name: str, operands: tuple[Tensor, ...], causal: bool, grads: "GradStores | None"
    ) -> PreparedLaunch:
        plan, keys, cached = self.plan, name == "backward_keys", name == "forward_cached"
        half = self.dtype.itemsize == 2
        tile = tile_sizes(
            name.removesuffix("_cached"), max(self.d_qk, self.d_v), half=half, banded=plan.window is not None,
            biased=self.tables is not None, max_seq_len=plan.max_seq_len, hopper=self.hopper,
        )  # fmt: skip
        tiles = plan.tile_list(keys, tile, self.heads)
        widths = {"backward_queries": (self.d_qk,), "backward_keys": (self.d_qk, self.d_v)}.get(
            name, (self.d_v,)
        )
        partials = tuple(
            tiles.partial(self.heads, tile.keys if keys else tile.rows, width) for width in widths
        )
        if len(partials) == 2 and widths[0] == widths[1]:
            partials = partials[0], torch.empty_like(partials[0])
        visible = tiles.tiles if plan.target_visible is None else plan.target_visible
        strides = [s for x in operands for s in x.stride()[:2]]
        if cached:
            sizes = len(operands[0]), len(operands[1]), *strides
            flags = causal, plan.target_visible is not None
        else:
            has_prefix = plan.prefix > 0 and plan.window is not None
            sizes = (
                plan.num_tokens,
                *strides,
                *(self.tables or (1, 1)),
                plan.max_seq_len,
                plan.window or 0,
                plan.prefix,
            )
            flags = (
                has_prefix,
                plan.num_targets is not None,
                plan.target_visible is not None,
                self.tables is not None,
            )
        # tanh.approx has an error with a sign, which adds up in a bias table, where a million pairs
        # share an entry
        fast = half and self.on_gpu and not (self.tables and name == "backward_queries")
        how = (self.hopper, fast, "ieee") if cached else (self.hopper, fast, "ieee", self.on_gpu)
        shape = self.heads, self.d_qk, self.d_v, tile.rows, tile.keys
        strides_out, how_out = (), ()
        if grads is not None:
            strides_out = *grads.strides, grads.summed
            how_out = *grads.widths, grads.sloped, grads.summed > 0
        by_rows = {"q", "grad"}
        names = ("q", "k", "v", "own_k", "own_v") if cached else ("q", "k", "v", "grad")
        descriptors = []
        if self.hopper:
            for of, x in zip(names, operands, strict=False):
                flat = [x.shape[0], x.shape[1] * x.shape[2]]
                box = [tile.rows if of in by_rows else tile.keys, x.shape[2]]
                descriptors.append(TensorDescriptor(x, flat, [x.stride(0), 1], box))
        return PreparedLaunch(
            kernel=getattr(triton_kernels, name), tile=tile, programs=tiles.capacity * self.heads,
            descriptors=descriptors, partials=partials, lists=(tiles.arrived, tiles.tiles, tiles.header, visible),
            numbers=(*sizes, self.alpha, self.scale, *strides_out, *shape, *flags, *how, *how_out), unused=tiles.tiles,
            row_sums=tiles.row_sums(grads.summed) if grads is not None and grads.summed else tiles.tiles,
        )  # fmt: skip


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _operand(x: Tensor, hopper: bool) -> Tensor:
    """`x` [T, H, W] as the kernels read it: W a power of two, dense; for descriptors heads packed
    and 16-byte rows.
    """
    width = max(16, next_power_of_2(x.shape[2]))
    if width != x.shape[2]:
        return F.pad(x, (0, width - x.shape[2]))
    if x.stride(2) != 1:
        return x.contiguous()
    packed = (
        x.stride(1) == width and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    )
    return x if packed or not hopper else x.clone(memory_format=torch.contiguous_format)


def make_problem(
    operands: tuple[Tensor, ...],
    plan: TritonPlan,
    alpha: float,
    scaling_seq_len: int,
    tables: tuple[int, int] | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[AttentionProblem, tuple[Tensor, ...]]:
    """The problem of q, k, v (and what else a kernel reads), and these as the kernels read them."""
    q, _, v, *_ = operands
    shapes = tuple([(x.shape, x.stride(), x.data_ptr() % 16) for x in operands])
    key = shapes, q.dtype, out_dtype, alpha, scaling_seq_len, tables
    if key in plan.problems:
        return plan.problems[key], operands
    hopper = _is_hopper(q.device)
    fit = tuple(_operand(x, hopper) for x in operands)
    if any(x is not y for x, y in zip(fit, operands, strict=True)):
        return make_problem(fit, plan, alpha, scaling_seq_len, tables, out_dtype)
    plan.problems[key] = AttentionProblem(
        plan=plan, alpha=alpha, scale=1 / scaling_seq_len, heads=q.shape[1], d_qk=q.shape[2], d_v=v.shape[2],
        dtype=q.dtype, out_dtype=out_dtype or q.dtype, hopper=hopper, tables=tables, on_gpu=q.is_cuda,
    )  # fmt: skip
    return plan.problems[key], operands


@dataclass(frozen=True, slots=True)
class BiasInputs:
    """A `RelativeBias` as the kernels read it."""

    positions: Tensor  # float32, as `spread_tables` leaves them
    cells: Tensor  # int32
    event_time: Tensor  # int32, s
    query_time: Tensor

    @property
    def all(self) -> tuple[Tensor, ...]:
        return self.positions, self.cells, self.event_time, self.query_time


@cache
def time_steps(device: torch.device) -> Tensor:
    """int32 [CELLS, 2]: the seconds, sign included, at which the time bucket changes within a cell,
    and the buckets below and from there on, in the lower and upper 16 bits. A cell is the upper 11
    bits of the seconds as float32."""
    cell = torch.arange(CELLS // 2, dtype=torch.int32, device=device)

    def first_of(cell: Tensor) -> Tensor:
        # no second is beyond 2**31
        begin = (cell.clamp(max=(127 + 31) << 2) << 21).view(torch.float32)
        return begin.double().ceil()

    first = first_of(cell)
    last = torch.maximum(first_of(cell + 1) - 1, first)
    below, above = (time_bucket(x, 2**15) for x in (first, last))
    step = torch.where(above > below, (above.double() * LOG_BUCKET).exp().ceil(), 2.0**31 - 1).to(
        torch.int64
    )
    forward, backward = (
        torch.stack([step, below | above << 16], 1),
        torch.stack([1 - step, above | below << 16], 1),
    )
    return torch.cat([forward, backward]).to(torch.int32)


def spread_bias(bias: RelativeBias, reach: int) -> BiasInputs:
    """`reach`: no distance between positions is longer."""
    position_table, time_table = (
        x.detach().float().contiguous() for x in (bias.position_table, bias.time_table)
    )
    device = position_table.device
    positions = torch.empty(2 * reach + 1, dtype=torch.float32, device=device)
    cells = torch.empty(CELLS, 4, dtype=torch.int32, device=device)
    block = 512
    triton_bias.spread_tables[(-(-max(CELLS, len(positions)) // block),)](
        position_table, time_table, time_steps(device), positions, cells, len(position_table), len(time_table), reach,
        BLOCK=block,
    )  # fmt: skip
    event_time = whole_seconds(bias.event_time_T)
    query_time = event_time if bias.query_time_T is None else whole_seconds(bias.query_time_T)
    return BiasInputs(positions, cells, event_time, query_time)


def launch_forward(
    problem: AttentionProblem, operands: tuple[Tensor, ...], bias: BiasInputs | None = None
) -> Tensor:
    q = operands[0]
    launch = problem.prepare("forward", operands)
    out = torch.empty(
        q.shape[0], problem.heads, problem.d_v, dtype=problem.out_dtype, device=q.device
    )
    launch.launch(operands, *(bias.all if bias is not None else (launch.unused,) * 4), out)
    return out


def launch_backward_queries(
    problem: AttentionProblem,
    operands: tuple[Tensor, ...],
    dq: Tensor,
    bias: BiasInputs | None = None,
    slope_q: Tensor | None = None,
    summed: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Fills dq [T, H, D], whose rows may lie apart; gives the float32 gradients of the bias tables
    and, `summed`, the sum of dq's rows [H D].

    The last operand is the gradient of the output. dq is multiplied by `slope_q` [T, H, D], the
    slope of what made q."""
    _, _, v, grad = operands
    strides, widths = (dq.stride(0), _row_stride(slope_q)), (dq.shape[2], v.shape[2])
    grads = GradStores(strides, widths, slope_q is not None, dq[0].numel() if summed else 0)
    launch = problem.prepare("backward_queries", operands, grads=grads)
    outs = dq, launch.unused if slope_q is None else slope_q, launch.row_sums
    if bias is None:
        launch.launch(operands, *(launch.unused,) * 4, *outs, *(launch.unused,) * 3)
        return None, None, launch.row_sums.sum(0) if summed else None
    assert problem.tables is not None
    num_positions, num_times = problem.tables
    sums = torch.zeros(
        num_positions + num_times * launch.tile.rows, dtype=torch.int64, device=dq.device
    )
    of_position, of_time = sums.tensor_split([num_positions])
    per_unit = _units(problem, grad, v)
    launch.launch(operands, *bias.all, *outs, of_position, of_time, per_unit)
    of_time = of_time.view(num_times, launch.tile.rows).sum(1)
    d_position, d_time = (
        (x * (0.5 * problem.scale / per_unit.double())).float() for x in (of_position, of_time)
    )
    return d_position, d_time, launch.row_sums.sum(0) if summed else None


def _row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _units(problem: AttentionProblem, grad: Tensor, v: Tensor) -> Tensor:
    """How many units of the whole-number sums of the bias gradients make 1.0: no sum of all pairs
    can pass 2**62.
    """
    grad_max, v_max = (
        torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32) for x in (grad, v)
    )
    # 2.2: twice SiLU's slope, as the kernels have it
    largest = grad_max * v_max * (2.2 * problem.d_v)
    pairs = problem.plan.num_tokens * problem.plan.max_seq_len * problem.heads
    return (2.0**62 / (largest * pairs).clamp(min=1e-18)).reshape(1)


def launch_backward_keys(
    problem: AttentionProblem,
    operands: tuple[Tensor, ...],
    dk: Tensor,
    dv: Tensor,
    bias: BiasInputs | None = None,
    slope_k: Tensor | None = None,
    slope_v: Tensor | None = None,
    summed: bool = False,
) -> Tensor | None:
    """Fills dk [T, H, D] and dv [T, H, V], whose rows may lie apart; `summed` gives the sums of
    both's rows
    [H D + H V].

    They are multiplied by `slope_k` and `slope_v`, the slopes of what made k and v, which have one
    row stride.
    """
    strides, widths = (dk.stride(0), dv.stride(0), _row_stride(slope_k)), (dk.shape[2], dv.shape[2])
    grads = GradStores(
        strides, widths, slope_k is not None, dk[0].numel() + dv[0].numel() if summed else 0
    )
    launch = problem.prepare("backward_keys", operands, grads=grads)
    slopes = (launch.unused,) * 2 if slope_k is None else (slope_k, slope_v)
    of_bias = bias.all if bias is not None else (launch.unused,) * 4
    launch.launch(operands, *of_bias, dk, dv, *slopes, launch.row_sums)
    return launch.row_sums.sum(0) if summed else None


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, k, v, position_table, time_table, problem: AttentionProblem, bias: BiasInputs | None
    ):
        ctx.save_for_backward(q, k, v)
        ctx.problem, ctx.bias = problem, bias
        return launch_forward(problem, (q, k, v), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        problem, bias = ctx.problem, ctx.bias
        q, k, v = ctx.saved_tensors
        grad = grad.to(q.dtype).contiguous()
        operands = q, k, v, grad if grad.data_ptr() % 16 == 0 else grad.clone()
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        d_position, d_time, _ = launch_backward_queries(problem, operands, dq, bias)
        launch_backward_keys(problem, operands, dk, dv, bias)
        return dq, dk, dv, d_position, d_time, None, None


def semi_local_attention_triton(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    plan: TritonPlan,
    *,
    bias: RelativeBias | None,
    attn_alpha: float,
    scaling_seq_len: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """As `reference.semi_local_attention_reference`; the sums are float32 until they are stored."""
    if plan.num_tokens == 0:
        return v_THV.new_empty(v_THV.shape, dtype=out_dtype)
    inputs, tables = None, None
    if bias is not None:
        inputs, tables = (
            spread_bias(bias, plan.max_seq_len),
            (len(bias.position_table), len(bias.time_table)),
        )
    problem, operands = make_problem(
        (q_THD, k_THD, v_THV), plan, attn_alpha, scaling_seq_len, tables, out_dtype
    )
    learned = (None, None) if bias is None else (bias.position_table, bias.time_table)
    if torch.is_grad_enabled():
        out = _TritonAttention.apply(*operands, *learned, problem, inputs)
    else:
        out = launch_forward(problem, operands, inputs)
    return out if out.shape[2] == v_THV.shape[2] else out[..., : v_THV.shape[2]]


def cached_attention_triton(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TritonPlan,
    *,
    causal: bool,
    attn_alpha: float,
    scaling_seq_len: int,
) -> Tensor:
    """As `reference.cached_attention_reference`, forward only."""
    if plan.num_tokens == 0:
        return own_v.new_empty(own_v.shape)
    if len(k) == 0:  # no user has a cache: a descriptor needs a row
        k, v = own_k, own_v
    problem, operands = make_problem((q, k, v, own_k, own_v), plan, attn_alpha, scaling_seq_len)
    launch = problem.prepare("forward_cached", operands, causal)
    out = torch.empty(len(q), problem.heads, problem.d_v, dtype=q.dtype, device=q.device)
    launch.launch(operands, out)
    return out[..., : own_v.shape[2]]
