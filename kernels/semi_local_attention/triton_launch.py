"""Launches of the Triton kernels: tile lists of a batch, tile sizes, tensor descriptors, autograd.

Nothing here reads a value from the device: grids are bounded by what the host knows, and a program past the end of
its list returns at once.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.semi_local_attention import triton_kernels
from kernels.semi_local_attention.reference import RelativeBias

SPLIT_PROGRAMS = 512  # tiles are cut so that the cut ones give about two waves of two programs on 132 multiprocessors
SHORTEST_PART = 8  # blocks: below, writing and adding a partial sum costs more than it hides
ENTRY = triton_kernels.ENTRY.value


@dataclass(frozen=True, slots=True)
class Tile:
    """Tile sizes of a kernel: `rows` queries, `keys` keys."""

    rows: int
    keys: int
    warps: int
    stages: int


def tile_sizes(kernel: str, width: int, *, half: bool, banded: bool, biased: bool, max_seq_len: int, hopper: bool):
    """The static table, measured on an H100 (benchmarks/NOTES.md); `width` is the wider head, a power of two.

    Two programs of four warps on a multiprocessor beat one of eight: stock Triton waits for both products in every
    step, so only another program can overlap with the activation.
    """
    if not half:
        return Tile(32, 32 if width <= 64 else 16, 4, 2)
    if kernel == "backward_keys" and (biased or width > 128 or not hopper):
        return Tile(32, 64, 8 if width > 128 else 4, 2)
    if biased or width > 128 or not hopper:
        return Tile(64, 32, 4, 2)
    if width <= 64:
        return Tile(64, 64, 4, 3)
    if kernel == "backward_queries" and not banded and max_seq_len >= 1024:
        return Tile(128, 64, 8, 3)
    if kernel.startswith("backward"):
        return Tile(64, 64, 4, 2)
    if max_seq_len <= 1024:
        return Tile(64, 32, 4, 3)
    return Tile(64, 64, 4, 3) if banded else Tile(128, 64, 4, 2)


@dataclass(frozen=True, slots=True)
class TileList:
    tiles: Tensor  # int32 [capacity, ENTRY]
    header: Tensor  # int32 [2]
    arrived: Tensor  # int32 [slots, H], zeros between launches
    capacity: int
    slots: int


@dataclass
class TritonPlan:
    """The mask of a batch; its tile lists are built on the device at first use and serve all layers and backward.

    Launches that share a plan must follow each other on one stream: the counters of cut tiles are shared.
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
    problems: dict[tuple, "Problem"] = field(default_factory=dict)

    def tile_list(self, keys: bool, tile: Tile, heads: int) -> TileList:
        """Tiles of keys for dk and dv, or of rows."""
        place = keys, tile.rows, tile.keys, heads
        if place not in self.lists:
            self.lists[place] = _build_list(self, keys, tile, heads)
        return self.lists[place]


def _build_list(plan: TritonPlan, keys: bool, tile: Tile, heads: int) -> TileList:
    """Two launches. The capacity bounds what any lengths with these sums need: whole tiles, a broken tile per kind and
    sequence, and the parts, of which `count_tiles` allows SPLIT_PROGRAMS / heads beyond one per tile."""
    offsets, device = plan.seq_offsets, plan.seq_offsets.device
    num_sequences = len(offsets) - 1
    banded, candidates = plan.window is not None, plan.num_targets is not None
    kinds = 1 + (not plan.cached) * (candidates + (banded and not keys))
    extra = triton.cdiv(SPLIT_PROGRAMS, heads)
    capacity = plan.num_tokens // (tile.keys if keys else tile.rows) + kinds * num_sequences + extra
    flat = torch.empty(2 + 3 * num_sequences + capacity * ENTRY, dtype=torch.int32, device=device)
    header, first, tiles = flat.split([2, 3 * num_sequences, capacity * ENTRY])
    arrived = torch.zeros(2 * extra * heads, dtype=torch.int32, device=device)
    targets = offsets if plan.num_targets is None else plan.num_targets
    visible = offsets if plan.target_visible is None else plan.target_visible
    kinds_of = {"BANDED": banded, "CANDIDATES": candidates}
    sizes = {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
    block = min(4096, triton.next_power_of_2(num_sequences))
    triton_kernels.count_tiles[(1,)](
        offsets, targets, header, first, num_sequences, plan.full_rows, plan.prefix, KEYS=keys, CACHED=plan.cached,
        HEADS=heads, SPLIT_PROGRAMS=SPLIT_PROGRAMS, SHORTEST_PART=SHORTEST_PART, BLOCK_B=block, **kinds_of, **sizes,
        num_warps=min(16, max(1, block // 128)),
    )  # fmt: skip
    longest = plan.max_seq_len // (tile.keys if keys else tile.rows) + 2
    block = max(16, min(128, triton.next_power_of_2(longest)))
    if keys:
        has_visible = plan.target_visible is not None
        triton_kernels.write_key_tiles[(num_sequences,)](
            offsets, targets, visible, header, first, tiles, num_sequences, plan.full_rows, plan.prefix,
            VISIBLE=has_visible, BLOCK_E=block, **kinds_of, **sizes, num_warps=2,
        )  # fmt: skip
    else:
        triton_kernels.write_row_tiles[(num_sequences,)](
            offsets, targets, header, first, tiles, num_sequences, plan.full_rows, CACHED=plan.cached, BLOCK_E=block,
            **kinds_of, **sizes, num_warps=1,
        )  # fmt: skip
    return TileList(tiles, header, arrived, capacity, 2 * extra)


@dataclass(frozen=True, slots=True)
class Problem:
    """What the launches of one layer shape share. Layers of a model have one shape, so a plan keeps its problems."""

    plan: TritonPlan
    alpha: float
    scale: float
    heads: int
    d_qk: int  # as the kernels see it, a power of two
    d_v: int
    half: bool
    hopper: bool
    biased: bool
    on_gpu: bool  # rather than in the interpreter
    compiled: dict[str, Any] = field(default_factory=dict)

    def tile(self, kernel: str) -> Tile:
        plan, width = self.plan, max(self.d_qk, self.d_v)
        return tile_sizes(
            kernel, width, half=self.half, banded=plan.window is not None, biased=self.biased,
            max_seq_len=plan.max_seq_len, hopper=self.hopper,
        )  # fmt: skip

    def lists(self, tile: Tile, keys: bool = False) -> tuple[TileList, tuple[Tensor, ...]]:
        """The tile list, and its kernel arguments."""
        found = self.plan.tile_list(keys, tile, self.heads)
        visible = found.tiles if self.plan.target_visible is None else self.plan.target_visible
        return found, (found.arrived, found.tiles, found.header, visible)

    def numbers(self, bias: RelativeBias | None, *tensors: Tensor) -> tuple[float, ...]:
        plan = self.plan
        tables = (1, 1) if bias is None else (len(bias.position_table), len(bias.time_table))
        return plan.num_tokens, *_strides(*tensors), *tables, plan.window or 0, plan.prefix, self.alpha, self.scale

    def constants(self, tile: Tile) -> tuple[object, ...]:
        plan = self.plan
        has_prefix = plan.prefix > 0 and plan.window is not None
        flags = has_prefix, plan.num_targets is not None, plan.target_visible is not None, self.biased
        return self.heads, self.d_qk, self.d_v, tile.rows, tile.keys, *flags, *self.how

    @property
    def how(self) -> tuple[bool, bool, str]:
        """Descriptors, approximate tanh, precision of float32 products. The approximation has a sign of its own,
        which adds up in the gradient of a bias table, where a million pairs share an entry."""
        return self.hopper, self.half and self.on_gpu and not self.biased, "ieee"

    def source(self, x: Tensor, rows: int) -> Tensor | TensorDescriptor:
        """What a kernel reads `rows` rows at a time from: [T, H, W] as [T, H * W] by the bulk copy engine on Hopper."""
        if not self.hopper:
            return x
        width = x.shape[2]
        return TensorDescriptor(x, [x.shape[0], x.shape[1] * width], [x.stride(0), 1], [rows, width])

    def launch(self, kernel: Any, programs: int, tile: Tile, *arguments: object) -> None:
        """The compiled kernel is kept and launched directly: going through the arguments again to find it costs more
        than the launch. With descriptors, nothing that its choice depends on can differ within a problem."""
        name = kernel.fn.__name__
        if name in self.compiled:
            self.compiled[name][(programs, 1, 1)](*arguments)
            return
        found = kernel[(programs,)](*arguments, num_warps=tile.warps, num_stages=tile.stages)
        if self.hopper and not self.biased:
            self.compiled[name] = found


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(s for x in tensors for s in (x.stride(0), x.stride(1)))


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _is_hopper(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


def _operand(x: Tensor, hopper: bool) -> Tensor:
    """`x` [T, H, W] as the kernels read it: W a power of two, dense; for descriptors heads packed and 16-byte rows."""
    if _block(x.shape[2]) != x.shape[2]:
        return F.pad(x, (0, _block(x.shape[2]) - x.shape[2]))
    if x.stride(2) != 1:
        return x.contiguous()
    packed = x.stride(1) == x.shape[2] and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return x if packed or not hopper else x.clone(memory_format=torch.contiguous_format)


def _partial(tiles: TileList, *shape: int) -> Tensor:
    return torch.empty(tiles.slots, *shape, dtype=torch.float32, device=tiles.tiles.device)


def _bias_inputs(bias: RelativeBias | None, unused: Tensor) -> tuple[Tensor, ...]:
    if bias is None:
        return unused, unused, unused, unused
    asked = bias.event_time_T if bias.query_time_T is None else bias.query_time_T
    tables = (table.to(torch.float32).contiguous() for table in (bias.position_table, bias.time_table))
    return *tables, bias.event_time_T.contiguous(), asked.contiguous()


def launch_forward(problem: Problem, q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias | None = None) -> Tensor:
    heads, tile = problem.heads, problem.tile("forward")
    tiles, lists = problem.lists(tile)
    out = torch.empty(len(q), heads, problem.d_v, dtype=q.dtype, device=q.device)
    problem.launch(
        triton_kernels.forward, tiles.capacity * heads, tile,
        problem.source(q, tile.rows), problem.source(k, tile.keys), problem.source(v, tile.keys),
        *_bias_inputs(bias, tiles.tiles), out, _partial(tiles, heads, tile.rows, problem.d_v), *lists,
        *problem.numbers(bias, q, k, v), *problem.constants(tile),
    )  # fmt: skip
    return out


def launch_backward_queries(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, bias: RelativeBias | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dq and the gradients of the bias tables."""
    heads, tile = problem.heads, problem.tile("backward_queries")
    tiles, lists = problem.lists(tile)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    table_grads, per_unit = (tiles.tiles, tiles.tiles), tiles.tiles
    if bias is not None:
        table_grads = [torch.zeros(len(t), dtype=torch.int64, device=q.device) for t in _tables(bias)]
        per_unit = _units(problem, grad, v)
    problem.launch(
        triton_kernels.backward_queries, tiles.capacity * heads, tile,
        problem.source(q, tile.rows), problem.source(k, tile.keys), problem.source(v, tile.keys),
        problem.source(grad, tile.rows), *_bias_inputs(bias, tiles.tiles), dq, *table_grads, per_unit,
        _partial(tiles, heads, tile.rows, problem.d_qk), *lists, *problem.numbers(bias, q, k, v, grad),
        *problem.constants(tile),
    )  # fmt: skip
    if bias is None:
        return dq, None, None
    factor = problem.scale / per_unit.double()
    d_position, d_time = ((g * factor).to(t.dtype) for g, t in zip(table_grads, _tables(bias), strict=True))
    return dq, d_position, d_time


def _tables(bias: RelativeBias) -> tuple[Tensor, Tensor]:
    return bias.position_table, bias.time_table


def _units(problem: Problem, grad: Tensor, v: Tensor) -> Tensor:
    """How many units of the whole-number sums of the bias gradients make 1.0: no sum of all pairs can pass 2**62."""
    largest = grad.abs().amax().float() * v.abs().amax().float() * (1.1 * problem.d_v)  # 1.1: the slope of SiLU
    pairs = problem.plan.num_tokens * problem.plan.max_seq_len * problem.heads
    return (2.0**62 / (largest * pairs).clamp(min=1e-18)).reshape(1)


def launch_backward_keys(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, bias: RelativeBias | None = None
) -> tuple[Tensor, Tensor]:
    heads, tile = problem.heads, problem.tile("backward_keys")
    tiles, lists = problem.lists(tile, keys=True)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    problem.launch(
        triton_kernels.backward_keys, tiles.capacity * heads, tile,
        problem.source(q, tile.rows), problem.source(k, tile.keys), problem.source(v, tile.keys),
        problem.source(grad, tile.rows), *_bias_inputs(bias, tiles.tiles), dk, dv,
        _partial(tiles, heads, tile.keys, problem.d_qk), _partial(tiles, heads, tile.keys, problem.d_v), *lists,
        *problem.numbers(bias, q, k, v, grad), *problem.constants(tile),
    )  # fmt: skip
    return dk, dv


def make_problem(
    q: Tensor, k: Tensor, v: Tensor, plan: TritonPlan, alpha: float, scaling_seq_len: int, biased: bool = False
) -> Problem:
    """Of operands as `_operand` makes them."""
    key = q.shape, v.shape, q.dtype, _strides(q, k, v), alpha, scaling_seq_len, biased
    if key not in plan.problems:
        plan.problems[key] = Problem(
            plan=plan, alpha=alpha, scale=1 / scaling_seq_len, heads=q.shape[1], d_qk=q.shape[2], d_v=v.shape[2],
            half=q.element_size() == 2, hopper=_is_hopper(q), biased=biased, on_gpu=q.is_cuda,
        )  # fmt: skip
    return plan.problems[key]


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, position_table, time_table, times, plan: TritonPlan, alpha: float, scaling_seq_len: int):
        hopper = _is_hopper(q)
        ctx.widths = q.shape[2], v.shape[2]
        q, k, v = (_operand(x, hopper) for x in (q, k, v))
        bias = None if times is None else RelativeBias(position_table, time_table, *times)
        ctx.problem = make_problem(q, k, v, plan, alpha, scaling_seq_len, bias is not None)
        ctx.save_for_backward(q, k, v, position_table, time_table)
        ctx.times = times
        return launch_forward(ctx.problem, q, k, v, bias)[..., : ctx.widths[1]]

    @staticmethod
    def backward(ctx, grad):
        q, k, v, position_table, time_table = ctx.saved_tensors
        bias = None if ctx.times is None else RelativeBias(position_table, time_table, *ctx.times)
        grad = _operand(grad.to(q.dtype), ctx.problem.hopper)
        if not ctx.problem.hopper:
            grad = grad.contiguous()  # pointers: strides of an expanded gradient would choose another kernel
        dq, d_position, d_time = launch_backward_queries(ctx.problem, q, k, v, grad, bias)
        dk, dv = launch_backward_keys(ctx.problem, q, k, v, grad, bias)
        d_qk, d_v = ctx.widths
        return dq[..., :d_qk], dk[..., :d_qk], dv[..., :d_v], d_position, d_time, None, None, None, None


def semi_local_attention_triton(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    plan: TritonPlan,
    *,
    bias: RelativeBias | None,
    attn_alpha: float,
    scaling_seq_len: int,
) -> Tensor:
    """As `reference.semi_local_attention_reference`."""
    if plan.num_tokens == 0:
        return v_THV.new_empty(v_THV.shape)
    tables, times = (None, None), None
    if bias is not None:
        tables, times = _tables(bias), (bias.event_time_T, bias.query_time_T)
    return _TritonAttention.apply(q_THD, k_THD, v_THV, *tables, times, plan, attn_alpha, scaling_seq_len)


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
    hopper, width = _is_hopper(q), own_v.shape[2]
    q, own_k, own_v, k, v = (_operand(x, hopper) for x in (q, own_k, own_v, k, v))
    if len(k) == 0:  # no user has a cache: a descriptor needs a row
        k, v = own_k, own_v
    problem = make_problem(q, k, v, plan, attn_alpha, scaling_seq_len)
    tile, heads = problem.tile("forward"), problem.heads
    tiles, lists = problem.lists(tile)
    out = torch.empty(len(q), heads, problem.d_v, dtype=q.dtype, device=q.device)
    rows = (q, tile.rows), (k, tile.keys), (v, tile.keys), (own_k, tile.keys), (own_v, tile.keys)
    problem.launch(
        triton_kernels.forward_cached, tiles.capacity * heads, tile, *(problem.source(x, n) for x, n in rows), out,
        _partial(tiles, heads, tile.rows, problem.d_v), *lists, len(q), len(k), *_strides(q, k, v, own_k, own_v),
        attn_alpha, 1 / scaling_seq_len, heads, problem.d_qk, problem.d_v, tile.rows, tile.keys, causal,
        plan.target_visible is not None, *problem.how,
    )  # fmt: skip
    return out[..., :width]
