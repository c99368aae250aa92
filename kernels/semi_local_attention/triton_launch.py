"""Launches of the attention kernels: what all layers of a batch share is prepared once.

    plan + operands → AttentionProblem → PreparedLaunch of a kernel → one launch a layer

A layer then fills in its own tensors, by name. Nothing here reads a value from the device.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.launch import (
    compiled_under,
    keep_compiled,
    next_power_of_2,
    on_device,
    specialised_form,
)
from kernels.semi_local_attention import tile_table, triton_kernels
from kernels.semi_local_attention.plan import TileList, TritonPlan
from kernels.semi_local_attention.tile_table import AttentionTile
from kernels.semi_local_attention.triton_bias_inputs import BiasInputs, find_largest, units_per_one

OPERANDS = {
    "forward": ("q", "k", "v"),
    "forward_cached": ("q", "k", "v", "own_k", "own_v"),
    "backward_queries": ("q", "k", "v", "grad"),
    "backward_keys": ("q", "k", "v", "grad"),
    "backward_bias": ("q", "k", "v", "grad"),
}
# From so many numbers on, the rows of a tile are laid out in shared memory in one way; narrower
# ones each in a way of their own. ptxas 12.8 makes wrong addresses of two ways in one kernel
# (benchmarks/NOTES.md), so that narrow operands are padded to one width.
ONE_LAYOUT = 64
ROW_OPERANDS = ("q", "grad")  # read in tiles of rows, the others in tiles of keys
STRIDES = {"q": "q", "k": "k", "v": "v", "grad": "g", "own_k": "o", "own_v": "p"}
PARTIALS = {  # the names of partial sums
    "forward": ("partial",),
    "forward_cached": ("partial",),
    "backward_queries": ("partial",),
    "backward_keys": ("partial_k", "partial_v"),
    "backward_bias": (),
}
OF_BIAS = ("positions", "cells", "event_time", "query_time")
OF_BIAS_GRADIENTS = ("d_position", "d_time", "per_unit")
SLOPES = ("slope_q", "slope_k", "slope_v")
# numbers of a batch; the kernels name them in `do_not_specialize`
VARYING = ("num_tokens", "num_rows", "num_keys", "num_positions", "num_times", "reach")


class GradStores(NamedTuple):
    """Where a backward kernel's gradients go."""

    strides: tuple[tuple[str, int], ...]  # argument, distance of rows
    widths: tuple[int, int]  # of the heads of q and k, and of v, as they are stored
    sloped: bool  # each gradient is multiplied by a slope
    summed: int  # width of the rows' sums, 0 without


@dataclass(slots=True)
class PreparedLaunch:
    """A kernel's launch but for the tensors of a layer.

    `arguments` has all of them in the kernel's order. A layer's own are missing: None where it must
    bring one, a stand-in that the kernel never reads where it need not.
    """

    kernel: Any
    tile: AttentionTile
    programs: int
    descriptors: list[TensorDescriptor]  # of the operands, none with pointers
    arguments: tuple[Any, ...]
    places: dict[str, int]  # of the arguments
    row_sums: Tensor | None
    device: torch.device
    compiled: Any = None

    def launch(self, operands: tuple[Tensor, ...], **tensors: Tensor) -> None:
        """One launch, of operands (the kernel's first arguments) and other tensors by name.

        With descriptors nothing that compiled code depends on differs between layers of one shape,
        so the compiled kernel is kept here and called directly.
        """
        places, descriptors = self.places, self.descriptors
        arguments = list(self.arguments)
        for name, tensor in tensors.items():
            arguments[places[name]] = tensor
        arguments[: len(operands)] = descriptors or operands
        for i, descriptor in enumerate(descriptors):
            descriptor.base = operands[i]

        with on_device(self.device):
            if self.compiled is None:
                self._launch_first(arguments)
            else:
                self.compiled[(self.programs, 1, 1)](*arguments)

        for descriptor in descriptors:
            descriptor.base = None  # a plan must not keep a layer's tensors

    def _launch_first(self, arguments: list[Any]) -> None:
        missing = [name for name, place in self.places.items() if arguments[place] is None]
        assert not missing, f"no {missing} given to {self.kernel}"
        run = self.kernel[(self.programs,)]
        tile = self.tile
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        if tile.max_registers is not None:
            options["maxnreg"] = tile.max_registers
        if not self.descriptors:
            run(*arguments, **options)
            return

        key = self._cache_key(arguments)
        self.compiled = compiled_under(key)
        if self.compiled is None:
            self.compiled = run(*arguments, **options)
            keep_compiled(key, self.kernel, self.compiled)
        else:
            self.compiled[(self.programs, 1, 1)](*arguments)

    def _cache_key(self, arguments: list[Any]) -> tuple:
        """What compiled code depends on; constants are written in capitals."""
        forms = [
            x if name.isupper() else specialised_form(x, varies=name in VARYING)
            for name, x in zip(self.places, arguments, strict=True)
        ]
        tile = self.tile
        options = tile.warps, tile.stages, tile.max_registers
        return id(self.kernel), self.device, *forms, *options


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """What the launches of one layer shape share. Layers of a model have one shape.

    It does not hold the plan that holds it.
    """

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
    prepared: dict[tuple, PreparedLaunch] = field(default_factory=dict)

    def prepare(
        self,
        plan: TritonPlan,
        name: str,
        operands: tuple[Tensor, ...],
        grads: GradStores | None = None,
    ) -> PreparedLaunch:
        """The launch of a kernel; only shapes and strides of the operands count."""
        key = name, grads
        prepared = self.prepared.get(key)
        if prepared is None:
            prepared = self.prepared[key] = _prepare(plan, self, name, operands, grads)
        return prepared


def find_problem(
    operands: tuple[Tensor, ...],
    plan: TritonPlan,
    alpha: float,
    scaling_seq_len: int,
    tables: tuple[int, int] | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[AttentionProblem, tuple[Tensor, ...]]:
    """The problem of q, k, v (and what else a kernel reads), and these as the kernels read them."""
    q = operands[0]
    rest = q.dtype, out_dtype, alpha, scaling_seq_len, tables
    problem = plan.problems.get((_forms_of(operands), rest))
    if problem is not None:
        return problem, operands

    hopper = _is_hopper(q.device)
    widths = _fit_widths(operands, hopper)
    pairs = zip(operands, widths, strict=True)
    operands = tuple([_fit_operand(x, width, hopper) for x, width in pairs])
    key = _forms_of(operands), rest
    if key not in plan.problems:
        q, _, v, *_ = operands
        plan.problems[key] = AttentionProblem(
            alpha=alpha,
            scale=1 / scaling_seq_len,
            heads=q.shape[1],
            d_qk=q.shape[2],
            d_v=v.shape[2],
            dtype=q.dtype,
            out_dtype=out_dtype or q.dtype,
            hopper=hopper,
            tables=tables,
            on_gpu=q.is_cuda,
        )
    return plan.problems[key], operands


def _forms_of(operands: tuple[Tensor, ...]) -> tuple:
    return tuple([(x.shape, x.stride(), x.data_ptr() % 16) for x in operands])


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _fit_widths(operands: tuple[Tensor, ...], hopper: bool) -> list[int]:
    """Widths of the operands' heads as the kernels read them, powers of two.

    On Hopper none is narrower than both the widest and ONE_LAYOUT:

        q and k, v     50, 25    128, 16    25, 50    20, 20
        as read        64, 64    128, 64    64, 64    32, 32
    """
    widths = [max(16, next_power_of_2(x.shape[2])) for x in operands]
    if hopper:
        narrowest = min(max(widths), ONE_LAYOUT)
        widths = [max(width, narrowest) for width in widths]
    return widths


def _fit_operand(x: Tensor, width: int, hopper: bool) -> Tensor:
    """`x` [T, H, W] as the kernels read it: `width` wide, dense.

    For descriptors, heads are packed and rows are a multiple of 16 bytes.
    """
    if width != x.shape[2]:
        return F.pad(x, (0, width - x.shape[2]))
    if x.stride(2) != 1:
        return x.contiguous()
    if not hopper:
        return x

    aligned = x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    packed = x.stride(1) == width
    return x if packed and aligned else x.clone(memory_format=torch.contiguous_format)


def _prepare(
    plan: TritonPlan,
    problem: AttentionProblem,
    name: str,
    operands: tuple[Tensor, ...],
    grads: GradStores | None,
) -> PreparedLaunch:
    """All arguments of a kernel by name, then in its order; every one must be named."""
    kernel = getattr(triton_kernels, name)
    tile = tile_table.tile_sizes(
        name.removesuffix("_cached"),
        max(problem.d_qk, problem.d_v),
        half=problem.dtype.itemsize == 2,
        banded=plan.window is not None,
        biased=problem.tables is not None,
        max_seq_len=plan.max_seq_len,
        hopper=problem.hopper,
    )
    # a program of the tables' gradients takes all heads
    program_heads = 1 if name == "backward_bias" else problem.heads
    tiles = plan.tile_list(name == "backward_keys", tile, program_heads)
    row_sums = None
    if grads is not None and grads.summed:
        row_sums = tiles.workspace.row_sums(grads.summed)

    named = {
        **_own_tensors(kernel.arg_names, tiles.tiles, problem, grads),
        **_list_tensors(plan, problem, name, tile, tiles),
        **_operand_strides(name, operands),
        **_mask_numbers(plan, problem, operands, cached=name == "forward_cached"),
        **_constants(plan, problem, name, tile),
        **_grad_arguments(grads),
    }
    if row_sums is not None:
        named["sums"] = row_sums
    missing = set(kernel.arg_names) - named.keys()
    assert not missing, missing

    places = {argument: place for place, argument in enumerate(kernel.arg_names)}
    return PreparedLaunch(
        kernel=kernel,
        tile=tile,
        programs=tiles.capacity * program_heads,
        descriptors=_descriptors(name, operands, tile) if problem.hopper else [],
        arguments=tuple([named[argument] for argument in kernel.arg_names]),
        places=places,
        row_sums=row_sums,
        device=tiles.tiles.device,
    )


def _own_tensors(
    arguments: list[str], stand_in: Tensor, problem: AttentionProblem, grads: GradStores | None
) -> dict[str, Tensor | None]:
    """The arguments that a layer brings: None, or `stand_in` where it brings none."""
    unused: list[str] = []
    if problem.tables is None:
        unused += OF_BIAS + OF_BIAS_GRADIENTS
    if grads is None or not grads.sloped:
        unused += SLOPES
    if grads is None or not grads.summed:
        unused.append("sums")

    brought = [*STRIDES, "out", "dq", "dk", "dv", *OF_BIAS, *OF_BIAS_GRADIENTS, *SLOPES, "sums"]
    named: dict[str, Tensor | None] = {}
    for name in brought:
        if name in arguments:
            named[name] = stand_in if name in unused else None
    return named


def _list_tensors(
    plan: TritonPlan, problem: AttentionProblem, name: str, tile: AttentionTile, tiles: TileList
) -> dict[str, Tensor]:
    visible = tiles.tiles if plan.target_visible is None else plan.target_visible
    oldest = {"oldest": tiles.tiles if plan.target_from is None else plan.target_from}
    named = {
        "arrived": tiles.workspace.arrived,
        "tiles": tiles.tiles,
        "header": tiles.header,
        "visible": visible,
        **({} if name == "forward_cached" else oldest),
    }

    rows = tile.keys if name == "backward_keys" else tile.rows
    widths = {"partial": problem.d_qk if name == "backward_queries" else problem.d_v}
    widths |= {"partial_k": problem.d_qk, "partial_v": problem.d_v}
    taken: list[int] = []
    for partial in PARTIALS[name]:
        width = widths[partial]
        room = tiles.workspace.partial_sums(problem.heads, rows, width)
        # two sums of one width need a room each
        named[partial] = torch.empty_like(room) if width in taken else room
        taken.append(width)
    return named


def _operand_strides(name: str, operands: tuple[Tensor, ...]) -> dict[str, int]:
    strides = {}
    for operand, x in zip(OPERANDS[name], operands, strict=True):
        letter = STRIDES[operand]
        strides[f"stride_{letter}t"], strides[f"stride_{letter}h"] = x.stride()[:2]
    return strides


def _mask_numbers(
    plan: TritonPlan,
    problem: AttentionProblem,
    operands: tuple[Tensor, ...],
    cached: bool,
) -> dict[str, Any]:
    """The mask's sizes and what of it a kernel is compiled for."""
    named = {
        "alpha": problem.alpha,
        "scale": problem.scale,
        "VISIBLE": plan.target_visible is not None,
    }
    if cached:
        sizes = {"num_rows": len(operands[0]), "num_keys": len(operands[1])}
        return {**named, **sizes}

    num_positions, num_times = problem.tables or (1, 1)
    return {
        **named,
        "num_tokens": plan.num_tokens,
        "num_positions": num_positions,
        "num_times": num_times,
        "reach": plan.max_seq_len,
        "window": plan.window or 0,
        "prefix": plan.prefix,
        "HAS_PREFIX": plan.prefix > 0 and (plan.window is not None or plan.target_from is not None),
        "CANDIDATES": plan.num_targets is not None,
        "FROM": plan.target_from is not None,
        "BIAS": problem.tables is not None,
        "ON_GPU": problem.on_gpu,
    }


def _constants(
    plan: TritonPlan, problem: AttentionProblem, name: str, tile: AttentionTile
) -> dict[str, Any]:
    half = problem.dtype.itemsize == 2
    return {
        "HEADS": problem.heads,
        "D": problem.d_qk,
        "V": problem.d_v,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "TMA": problem.hopper,
        "HELD": tile.held,
        "FAST": half and problem.on_gpu,
        "PRECISION": "ieee",
    }


def _grad_arguments(grads: GradStores | None) -> dict[str, Any]:
    if grads is None:
        return {}

    out_d, out_v = grads.widths
    return {
        **dict(grads.strides),
        "stride_sums": grads.summed,
        "OUT_D": out_d,
        "OUT_V": out_v,
        "SLOPE": grads.sloped,
        "SUMS": grads.summed > 0,
    }


def _descriptors(
    name: str, operands: tuple[Tensor, ...], tile: AttentionTile
) -> list[TensorDescriptor]:
    """Over [T, H * width], a box of a tile's rows or keys and one head."""
    descriptors = []
    for operand, x in zip(OPERANDS[name], operands, strict=True):
        rows = tile.rows if operand in ROW_OPERANDS else tile.keys
        flat = [x.shape[0], x.shape[1] * x.shape[2]]
        descriptors.append(TensorDescriptor(x, flat, [x.stride(0), 1], [rows, x.shape[2]]))
    for descriptor in descriptors:
        descriptor.base = None  # until a launch
    return descriptors


def launch_forward(
    plan: TritonPlan,
    problem: AttentionProblem,
    operands: tuple[Tensor, ...],
    bias: BiasInputs | None = None,
) -> Tensor:
    """Attention [T, H, V] of q, k, v."""
    q = operands[0]
    prepared = problem.prepare(plan, "forward", operands)
    out = torch.empty(
        q.shape[0], problem.heads, problem.d_v, dtype=problem.out_dtype, device=q.device
    )
    if bias is None:
        prepared.launch(operands, out=out)
    else:
        prepared.launch(operands, out=out, **bias.by_name())
    return out


def launch_forward_cached(
    plan: TritonPlan, problem: AttentionProblem, operands: tuple[Tensor, ...]
) -> Tensor:
    """Attention [C, H, V] of new rows over cached keys; operands q, k, v, own k, own v."""
    q = operands[0]
    prepared = problem.prepare(plan, "forward_cached", operands)
    out = torch.empty(
        q.shape[0], problem.heads, problem.d_v, dtype=problem.out_dtype, device=q.device
    )
    prepared.launch(operands, out=out)
    return out


def launch_backward_queries(
    plan: TritonPlan,
    problem: AttentionProblem,
    operands: tuple[Tensor, ...],
    dq: Tensor,
    bias: BiasInputs | None = None,
    slope_q: Tensor | None = None,
    summed: bool = False,
) -> Tensor | None:
    """Fill dq [T, H, D], whose rows may lie apart.

    The last operand is the gradient of the output. dq is multiplied by `slope_q` [T, H, D], the
    slope of what made q. With `summed`, the sum of dq's rows [H D] is returned.
    """
    v = operands[2]
    strides = ("stride_dq", dq.stride(0)), ("stride_slope", _row_stride(slope_q))
    widths, sum_width = (dq.shape[2], v.shape[2]), dq[0].numel() if summed else 0
    grads = GradStores(strides, widths, slope_q is not None, sum_width)
    prepared = problem.prepare(plan, "backward_queries", operands, grads)

    tensors = {"dq": dq}
    if slope_q is not None:
        tensors["slope_q"] = slope_q
    if bias is not None:
        tensors |= bias.by_name()
    prepared.launch(operands, **tensors)
    return _summed_rows(prepared)


def launch_backward_bias(
    plan: TritonPlan,
    problem: AttentionProblem,
    operands: tuple[Tensor, ...],
    dq: Tensor,
    bias: BiasInputs,
) -> tuple[Tensor, Tensor]:
    """The float32 gradients of the position and of the time table.

    `dq` is what `launch_backward_queries` has filled from the same operands.
    """
    _, _, v, grad = operands
    assert problem.tables is not None
    num_positions, num_times = problem.tables
    prepared = problem.prepare(plan, "backward_bias", operands)

    rows = prepared.tile.rows
    sums = torch.zeros(num_positions + num_times * rows, dtype=torch.int64, device=dq.device)
    of_position, of_time = sums.tensor_split([num_positions])
    num_pairs = plan.num_tokens * plan.max_seq_len * problem.heads
    largest = find_largest(grad, v, dq)
    per_unit = units_per_one(largest, problem.d_v, num_pairs)
    tensors = {"d_position": of_position, "d_time": of_time, "per_unit": per_unit}
    prepared.launch(operands, **tensors, **bias.by_name())

    # whole numbers have no NaN; dq, which comes of the same scores, says whether one was
    broken = 0 * largest[2]
    unit = 0.5 * problem.scale / per_unit.double() + broken
    of_time = of_time.view(num_times, rows).sum(1)
    return (of_position * unit).float(), (of_time * unit).float()


def launch_backward_keys(
    plan: TritonPlan,
    problem: AttentionProblem,
    operands: tuple[Tensor, ...],
    dk: Tensor,
    dv: Tensor,
    bias: BiasInputs | None = None,
    slope_k: Tensor | None = None,
    slope_v: Tensor | None = None,
    summed: bool = False,
) -> Tensor | None:
    """Fill dk [T, H, D] and dv [T, H, V], whose rows may lie apart.

    They are multiplied by `slope_k` and `slope_v`, the slopes of what made k and v, which have one
    row stride. With `summed`, the sums of both's rows [H D + H V] are returned.
    """
    strides = (
        ("stride_dk", dk.stride(0)),
        ("stride_dv", dv.stride(0)),
        ("stride_slope", _row_stride(slope_k)),
    )
    sum_width = dk[0].numel() + dv[0].numel() if summed else 0
    widths = dk.shape[2], dv.shape[2]
    grads = GradStores(strides, widths, slope_k is not None, sum_width)
    prepared = problem.prepare(plan, "backward_keys", operands, grads)

    tensors = {"dk": dk, "dv": dv}
    if slope_k is not None and slope_v is not None:
        tensors |= {"slope_k": slope_k, "slope_v": slope_v}
    if bias is not None:
        tensors |= bias.by_name()
    prepared.launch(operands, **tensors)
    return _summed_rows(prepared)


def _row_stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _summed_rows(prepared: PreparedLaunch) -> Tensor | None:
    return None if prepared.row_sums is None else prepared.row_sums.sum(0)
