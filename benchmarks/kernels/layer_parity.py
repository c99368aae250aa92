"""Parity of the STU layer, its FP8, and the token encoder's row kernels, on a GPU or in Triton's
interpreter.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu import DEVICE, Check, generator, no_waiting, offsets_of, randint, randn
from benchmarks.kernels.accuracy import find_stray
from kernels.backend import Backend
from kernels.frozen_tokens.triton_launch import (
    FrozenSwish,
    TokenSequences,
    find_token_rows,
    launch_linear_swish,
    launch_place,
)
from kernels.layer_norm.op import layer_norm, swish_layer_norm
from kernels.layer_norm.reference import quantize_rows_reference
from kernels.layer_norm.triton_launch import launch_quantize
from kernels.linear.reference import linear_reference
from kernels.linear.triton_launch import launch_linear
from kernels.norm_gate.reference import norm_gate_reference
from kernels.norm_gate.triton_launch import launch_norm_gate, launch_norm_gate_backward
from kernels.position_time.op import add_position_time
from kernels.position_time.reference import time_bucket
from kernels.position_time.types import Anchor
from kernels.semi_local_attention import tile_table
from kernels.semi_local_attention.types import QueryRows
from kernels.stu.op import project_uvqk, stu_layer, stu_layer_rows
from kernels.stu.recompute import RECOMPUTABLE
from kernels.stu.types import Sequences, STUShape, STUWeights

LAYER = STUShape(
    num_heads=4,
    d_qk=128,
    d_v=128,
    norm_eps=1e-6,
    attn_alpha=128**-0.5,
    scaling_seq_len=64,
    window=256,
    full_rows=256,
    prefix=0,
)
CAUSAL = {"window": None, "full_rows": 0}


@dataclass(frozen=True)
class Case:
    """A layer and a batch."""

    shape: STUShape
    width: int = 512
    lengths: tuple[int, ...] = (700, 0, 333)
    num_targets: tuple[int, ...] = (30, 0, 333)
    p: float = 0.0
    dtype: torch.dtype = torch.bfloat16


def parity_cases() -> list[Case]:
    small = replace(LAYER, num_heads=2, d_qk=64, d_v=32, window=100, full_rows=50, prefix=2)
    odd = replace(small, d_qk=50, d_v=25)
    return [
        Case(LAYER, p=0.2),
        Case(replace(LAYER, recompute=RECOMPUTABLE), p=0.2),
        Case(replace(LAYER, silu_qkv=False, recompute=("uvqk",))),
        Case(replace(LAYER, concat_ua=True, recompute=("y", "normed_x")), p=0.1),
        Case(replace(small, silu_qkv=False, concat_ua=True), width=96, p=0.5),
        Case(replace(odd, recompute=RECOMPUTABLE), width=72),
        Case(replace(odd, concat_ua=True, **CAUSAL), width=50, p=0.1),
        Case(small, width=96, lengths=(1,), num_targets=(0,)),
        Case(replace(small, recompute=("uvqk",)), width=96, lengths=(65, 64), num_targets=(65, 64)),
        Case(replace(LAYER, recompute=RECOMPUTABLE), lengths=(4096, 1000), num_targets=(512, 1)),
        Case(replace(small, recompute=RECOMPUTABLE), width=96, dtype=torch.float16),
    ]


def make_layer(shape: STUShape, width: int, seed: int = 0) -> list[Tensor]:
    """Weights in float64, of values that bfloat16 holds."""
    draws = generator(seed)
    attended, projected = shape.uvqk_widths[0], sum(shape.uvqk_widths)
    gated = attended * (3 if shape.concat_ua else 1)
    sizes = [
        (width,),
        (width,),
        (projected, width),
        (projected,),
        (attended,),
        (attended,),
        (width, gated),
        (width,),
    ]
    weights = [
        torch.randn(size, generator=draws, device=DEVICE)
        * (size[-1] ** -0.5 if len(size) > 1 else 0.3)
        for size in sizes
    ]
    weights[0], weights[4] = weights[0] + 1, weights[4] + 1
    return [w.bfloat16().double() for w in weights]


def make_sequences(
    lengths: tuple[int, ...], num_targets: tuple[int, ...] | None = None
) -> Sequences:
    targets = (
        None if num_targets is None else torch.tensor(num_targets, dtype=torch.int32).to(DEVICE)
    )
    return Sequences(offsets_of(lengths), max(lengths), targets)


def run(
    case: Case, dtype: torch.dtype, backend: Backend, recompute: tuple[str, ...] | None = None
) -> list[Tensor]:
    """Output and all gradients."""
    shape = case.shape if recompute is None else replace(case.shape, recompute=recompute)
    rows = sum(case.lengths), case.width
    draws = generator(1)
    x, grad = (torch.randn(rows, generator=draws, device=DEVICE).bfloat16() for _ in range(2))
    leaves = [t.to(dtype).requires_grad_() for t in (x, *make_layer(shape, case.width))]
    sequences = make_sequences(case.lengths, case.num_targets)
    out = stu_layer(
        leaves[0], STUWeights(*leaves[1:]), shape, sequences, p=case.p, seed=77, backend=backend
    )
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def check_layer(case: Case) -> str | None:
    """What is wrong with the fused layer on a case: errors beyond twice those of PyTorch in the
    same type, two runs that differ, or a result that depends on what was kept."""
    truth, plain = run(case, torch.float64, "reference"), run(case, case.dtype, "reference")
    fast, again = run(case, case.dtype, "triton"), run(case, case.dtype, "triton")
    stray = find_stray(fast, plain, truth, num_terms=sum(case.lengths))
    if stray is not None:
        return stray
    if not all(torch.equal(a, b) for a, b in zip(fast, again, strict=True)):
        return "two runs differ"
    for recompute in ((), RECOMPUTABLE):
        other = run(case, case.dtype, "triton", recompute)
        if not all(torch.equal(a, b) for a, b in zip(fast, other, strict=True)):
            return f"recompute={recompute} changes the result"
    return None


def check_frozen(case: Case, mean: float) -> str | None:
    """A frozen layer, whose norm is folded into f1, of rows with a mean of `mean` deviations: all
    rows of the output, every third, and Q, K and V.
    """
    draws = generator(1)
    x = torch.randn(sum(case.lengths), case.width, generator=draws, device=DEVICE) + mean
    x, weights = x.bfloat16(), make_layer(case.shape, case.width)
    sequences = make_sequences(case.lengths, case.num_targets)
    index = torch.arange(0, len(x), 3, device=DEVICE)
    rows = QueryRows(index, torch.searchsorted(index, sequences.seq_offsets))

    def run(dtype: torch.dtype, backend: Backend) -> list[Tensor]:
        of = STUWeights(*(w.to(dtype) for w in weights))
        given: dict[str, Any] = {"backend": backend}
        with torch.no_grad():
            out = stu_layer(x.to(dtype), of, case.shape, sequences, **given)
            _, *qkv = project_uvqk(x.to(dtype), of, case.shape, **given)
            asked = out[index]
            if backend == "triton":
                asked = stu_layer_rows(x.to(dtype), of, case.shape, sequences, rows, **given)
        return [out, asked, *qkv]

    truth, plain = run(torch.float64, "reference"), run(case.dtype, "reference")
    fast, again = run(case.dtype, "triton"), run(case.dtype, "triton")
    if not all(torch.equal(a, b) for a, b in zip(fast, again, strict=True)):
        return "two runs differ"
    return find_stray(fast, plain, truth, num_terms=sum(case.lengths))


def check_fp8(width: int, rows: int) -> str | None:
    """Codes and scales equal PyTorch's; the product over them strays no further than PyTorch's in
    bfloat16.
    """
    x, w, bias, residual = product_inputs(rows, width)
    for tensor in (x, w):
        codes, scale = launch_quantize(tensor)
        expected, expected_scale = quantize_rows_reference(tensor)
        if not torch.equal(codes.view(torch.uint8), expected.view(torch.uint8)) or not torch.equal(
            scale, expected_scale
        ):
            return f"quantised rows differ from PyTorch's at [{len(tensor)}, {width}]"
    truth = linear_reference(
        x.double(), w.double(), bias.double(), residual=residual.double(), fp8=True
    )
    plain = linear_reference(x, w, bias, residual=residual, fp8=True).double()
    fast = fp8_product(x, w, bias, residual)().double()
    return find_stray([fast], [plain], [truth], num_terms=width)


def check_fused_fp8() -> str | None:
    """The FP8 layer computes what its emulation in PyTorch does: as near as two orders of rounding
    can be.
    """
    case = Case(replace(LAYER, fp8=True, recompute=RECOMPUTABLE), p=0.2)
    exact, emulated = (
        run(replace(case, shape=LAYER), torch.float64, "reference"),
        run(case, torch.float64, "reference"),
    )
    fast = run(case, torch.bfloat16, "triton")
    for i, (f, e, t) in enumerate(zip(fast, emulated, exact, strict=True)):
        to_emulated, of_fp8 = ((a.double() - b).norm() / t.norm() for a, b in ((f, e), (e, t)))
        if not to_emulated <= 0.5 * of_fp8 + 0.01:
            return (
                f"FP8 layer, result {i}: {to_emulated:.4f} from its emulation, which is "
                f"{of_fp8:.4f} from float64"
            )
    return None


def check_fp8_recompute(case: Case) -> str | None:
    """What a layer makes again in backward, without codes beside it, is what forward made with
    them.
    """
    kept = run(case, case.dtype, "triton", ())
    for recompute in (("y",), ("normed_x",), ("uvqk", "y"), RECOMPUTABLE):
        again = run(case, case.dtype, "triton", recompute)
        if not all(torch.equal(a, b) for a, b in zip(kept, again, strict=True)):
            return f"recompute={recompute} changes the result"
    return None


def check_gate(
    rows: int, width: int, p: float, dtype: torch.dtype, concat_ua: bool = False
) -> str | None:
    """Y, made twice, and all gradients, with float32 weights as in training."""
    options: dict[str, Any] = {"eps": 1e-6, "concat_ua": concat_ua, "p": p, "seed": 77}
    a, wide = (randn(rows, n, dtype=dtype, seed=n) for n in (width, 4 * width))
    weights, u = [randn(width, seed=seed) + (seed == 2) for seed in (2, 3)], wide[:, :width]
    grad = randn(rows, width * (3 if concat_ua else 1), dtype=dtype, seed=4)

    given = options | {"seed": torch.full((1,), options["seed"], device=DEVICE)}

    def fused() -> list[Tensor]:
        y, du = launch_norm_gate(a, u, *weights, **given)[0], torch.empty_like(wide)[:, :width]
        da, again, *sums = launch_norm_gate_backward(grad, a, u, *weights, du, **given, out=True)
        assert y is not None and again is not None
        return [y, again, da, du, *sums]

    def plain(dtype: torch.dtype, of_weights: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (a, u)]
        leaves += [x.to(of_weights, copy=True).requires_grad_() for x in weights]
        y = norm_gate_reference(*leaves, **options)
        da, du, *sums = torch.autograd.grad(y, leaves, grad.to(dtype))
        return [y.detach(), y.detach(), da, du, *sums, du.to(of_weights).sum(0)]

    fast, second = fused(), fused()
    if not torch.equal(fast[0], fast[1]):
        return "Y made again is another"
    if not all(torch.equal(x, y) for x, y in zip(fast, second, strict=True)):
        return "two runs differ"
    in_dtype, truth = plain(dtype, torch.float32), plain(torch.float64, torch.float64)
    return find_stray(fast, in_dtype, truth, num_terms=max(rows, width))


def product_inputs(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draws = generator()
    sizes = (rows, width), (width, width), (width,), (rows, width)
    x, w, bias, residual = (torch.randn(size, generator=draws, device=DEVICE) for size in sizes)
    return x.bfloat16(), (w * width**-0.5).bfloat16(), bias.bfloat16(), residual.bfloat16()


def fp8_product(x: Tensor, w: Tensor, bias: Tensor, residual: Tensor) -> Callable[[], Tensor]:
    """x wᵀ + bias + residual over x and w quantised once, outside of the call."""
    (codes, scale), (w_codes, w_scale) = launch_quantize(x), launch_quantize(w)
    options: dict[str, Any] = {
        "residual": residual,
        "scales": (scale, w_scale),
        "dtype": torch.bfloat16,
    }
    return lambda: launch_linear(codes, w_codes, bias, **options)[0]


def check_norm(kind: str, rows: int, width: int, dtype: torch.dtype) -> str | None:
    """LayerNorm, or the gate of its own input: outputs and gradients, rows of x apart from each
    other.
    """
    norm = {"plain": layer_norm, "gate": swish_layer_norm}[kind]
    wide = randn(rows, 2 * width, dtype=dtype, seed=1) * 2 + 0.3
    weights, grad = (
        [randn(width, seed=seed) + (seed == 2) for seed in (2, 3)],
        randn(rows, width, dtype=dtype, seed=4),
    )

    def run(dtype: torch.dtype, of_weights: torch.dtype, backend: Backend) -> list[Tensor]:
        leaves = [
            x.to(t, copy=True).requires_grad_()
            for x, t in ((wide, dtype), *((w, of_weights) for w in weights))
        ]
        with no_waiting(backend):
            out = norm(leaves[0][:, width:], *leaves[1:], eps=1e-5, backend=backend)
            return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    # Weights are float32 in the model, but PyTorch's norm wants them in x's type.
    fast, again = run(dtype, torch.float32, "triton"), run(dtype, torch.float32, "triton")
    if not all(torch.equal(a, b) for a, b in zip(fast, again, strict=True)):
        return "two runs differ"
    plain, truth = run(dtype, dtype, "torch"), run(torch.float64, torch.float64, "torch")
    return find_stray(fast, plain, truth, num_terms=max(rows, width))


# positions and gaps of so many tokens
PLACES: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    "spread": lambda n: (randint(30_000, n, seed=1), randint(2**40, n, seed=2) - 1),
    "short histories": lambda n: (
        torch.arange(n, device=DEVICE) % 20,
        randint(90_000, n, seed=2) - 1,
    ),
    "one row": lambda n: (torch.full((n,), 5, device=DEVICE), torch.full((n,), -1, device=DEVICE)),
    "edges of buckets": lambda n: (
        torch.arange(n, device=DEVICE),
        2 ** (torch.arange(n, device=DEVICE) % 40) - 1,
    ),
}


def check_position_time(
    places: str,
    tokens: int,
    width: int,
    tables: tuple[int, int],
    anchor: Anchor,
    dtype: torch.dtype,
) -> str | None:
    """Outputs and gradients; that bits repeat, the host does not wait, and rows without tokens have
    no gradient.
    """
    position, gap = PLACES[places](tokens)
    given = [randn(n, width, dtype=dtype, seed=n) for n in (tokens, *tables)]
    grad = randn(tokens, width, dtype=dtype, seed=7)

    def run(
        dtype: torch.dtype, of_tables: torch.dtype, backend: Backend
    ) -> tuple[list[Tensor], list[set[int]]]:
        leaves = [
            x.to(t, copy=True).requires_grad_()
            for x, t in zip(given, (dtype, *[of_tables] * 2), strict=True)
        ]
        with no_waiting(backend):
            out = add_position_time(*leaves, position, gap, anchor=anchor, backend=backend)
            dx, *sparse = torch.autograd.grad(out, leaves, grad.to(dtype))
        rows, values = zip(*((g._indices()[0], g._values()) for g in sparse), strict=True)
        dense = [
            torch.zeros_like(t).index_add_(0, r, v)
            for t, r, v in zip(leaves[1:], rows, values, strict=True)
        ]
        return [out.detach(), dx, *dense], [set(r.tolist()) for r in rows]

    truth, touched = run(torch.float64, torch.float64, "reference")
    plain, _ = run(dtype, torch.float32, "torch")
    (fast, named), (again, _) = (run(dtype, torch.float32, "triton") for _ in range(2))
    if named != touched:
        return (
            "gradients name other rows: "
            f"{[len(n ^ t) for n, t in zip(named, touched, strict=True)]} too many or few"
        )
    if not all(torch.equal(a, b) for a, b in zip(fast, again, strict=True)):
        return "two runs differ"
    return find_stray(fast, plain, truth, num_terms=max(1, tokens))


def check_linear_swish(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> str | None:
    """The linear map and the gate after it in one kernel, and in two."""
    given = [randn(rows, inputs), randn(outputs, inputs, seed=1) * inputs**-0.5]
    # rows with a mean
    given += [randn(outputs, seed=2) + 1, randn(outputs, seed=3) + 1, randn(outputs, seed=4)]
    given = [x.to(dtype) for x in given]

    def run(dtype: torch.dtype) -> Tensor:
        x, w, bias, *norm = (x.to(dtype) for x in given)
        return swish_layer_norm(F.linear(x, w, bias), *norm, backend="torch")

    frozen = FrozenSwish.of(*given[1:3], dtype)
    with no_waiting():
        fast = launch_linear_swish(given[0], frozen, *given[3:], 1e-5)
    return find_stray([fast], [run(dtype)], [run(torch.float64)], num_terms=max(inputs, outputs))


def check_placed_tokens(tokens: int, width: int, num_context: int, merged: bool) -> str | None:
    """Rows of three tables added to normalised tokens, each behind the context of its sequence."""
    lengths = [tokens // 3, 0, tokens // 2 - tokens // 3, tokens - tokens // 2]
    targets = [length // 4 for length in lengths]
    sequences = TokenSequences(
        offsets_of(lengths), torch.tensor(targets, dtype=torch.int32).to(DEVICE), num_context
    )
    num_actions, sizes = 1 if merged else 4, (300, 64)
    masks = randint(16, tokens).int(), randint(16, tokens, seed=1).int()
    position, gap = randint(1000, tokens, seed=2), randint(10**8, tokens, seed=3) - 1

    # where each token goes, its state and its rows, with plain PyTorch
    number = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).to(DEVICE)
    place = torch.arange(tokens, device=DEVICE) + num_context * (number + 1)
    ends = sequences.seq_offsets[1:] - sequences.num_targets
    is_target = torch.arange(tokens, device=DEVICE) >= ends[number]
    actions, known = masks
    if merged:
        actions, known = ((actions & known) != 0).int(), (known != 0).int()
    bits = torch.arange(num_actions, device=DEVICE)
    digits = torch.where((known[:, None] >> bits) & 1 > 0, (actions[:, None] >> bits) & 1, 2)
    state = (digits * 3**bits).sum(1).masked_fill(is_target, 3**num_actions)
    rows = position % sizes[0], time_bucket(gap, sizes[1]), state

    x = randn(tokens, width, seed=5)
    norm = randn(width, seed=6) + 1, randn(width, seed=7)
    counts = (*sizes, 3**num_actions + 1)
    tables = [randn(count, width, seed=8 + i) for i, count in enumerate(counts)]

    def run(dtype: torch.dtype) -> Tensor:
        weight, bias = (t.to(dtype) for t in norm)
        out = F.layer_norm(x.bfloat16().to(dtype), (width,), weight, bias, 1e-5)
        for table, row in zip(tables, rows, strict=True):
            out = out + table.to(dtype)[row]
        return out

    with no_waiting():
        found = find_token_rows(
            position, gap, masks, sequences, sizes, "event", num_actions=num_actions, merged=merged
        )
        options = x.bfloat16(), (*norm, 1e-5), tuple(tables), found
        placed = launch_place(*options, tokens + 4 * num_context)
    expected = torch.stack([*rows, place]).int()
    if not torch.equal(found, expected):
        return f"{int((found != expected).sum())} of {found.numel()} rows are others"
    if int(placed.isnan().any(1).sum()) != 4 * num_context:
        return "something was written to rows of the context"
    return find_stray([placed[place]], [run(torch.bfloat16)], [run(torch.float64)], num_terms=width)


# For loops with several steps under way: programs that have no step, fewer than that, as many, and
# more.
STAGED_ROWS = (5, 529, 1057, 1585, 5283, 12_345)


def token_checks() -> list[Check]:
    """The token encoder's kernels."""
    half, single = (torch.bfloat16, torch.float16), torch.float32
    checks: list[Check] = []
    for kind in ("plain", "gate"):
        sizes = [(4000, 512), (4000, 1024), (1, 16), (777, 72), (50, 2500), (0, 64)]
        sizes += [(rows, 512) for rows in STAGED_ROWS]
        checks += [(check_norm, kind, *size, torch.bfloat16) for size in sizes]
        checks += [(check_norm, kind, 777, 256, dtype) for dtype in (torch.float16, single)]
    for places in PLACES:
        for anchor in ("event", "query"):
            checks.append((check_position_time, places, 20_000, 512, (8192, 64), anchor, half[0]))
            checks.append((check_position_time, places, 3001, 72, (300, 2048), anchor, single))
    # fewer tokens than rows
    checks.append((check_position_time, "spread", 100, 64, (8192, 64), "event", half[0]))
    for rows, inputs in ((4000, 88), (1, 8), (777, 256), (129, 24)):
        checks += [(check_linear_swish, rows, inputs, 1024, dtype) for dtype in half]
    checks.append((check_linear_swish, 300, 40, 200, half[0]))
    checks += [(check_placed_tokens, 5000, 512, 1, False), (check_placed_tokens, 777, 72, 3, True)]
    # keys of 32 bits
    checks.append((check_position_time, "spread", 70_000, 32, (60_000, 64), "event", half[1]))
    return checks


def layer_checks() -> list[Check]:
    products: list[Check] = [
        (check_fp8, width, rows) for width in (512, 1024, 80) for rows in (1, 1000)
    ]
    half, single = (torch.bfloat16, torch.float16), torch.float32
    gates: list[Check] = [
        (check_gate, rows, 512, p, half[0]) for rows in STAGED_ROWS for p in (0.0, 0.2)
    ]
    gates += [
        (check_gate, *size, 0.2, half[0])
        for size in ((777, 72), (3001, 1024), (300, 2048), (50, 2500))
    ]
    gates += [(check_gate, 3001, 512, 0.2, half[0], True), (check_gate, 777, 256, 0.2, half[1])]
    gates += [(check_gate, *size, 0.2, single) for size in ((3001, 512), (300, 2048), (777, 50))]
    fp8 = Case(replace(LAYER, fp8=True), p=0.2)
    narrow = replace(
        LAYER, num_heads=2, d_qk=64, d_v=32, window=100, full_rows=50, prefix=2, fp8=True
    )
    eights = [
        fp8,
        replace(fp8, shape=replace(LAYER, concat_ua=True, fp8=True)),
        Case(narrow, width=96),
    ]
    codes: list[Check] = [(check_fp8_recompute, case) for case in eights]
    return [
        *((check_layer, case) for case in parity_cases()),
        *((check_frozen, case, mean) for case in parity_cases() for mean in (0.0, 5.0)),
        *products,
        (check_fused_fp8,),
        *codes,
        *gates,
    ]


def parity_checks() -> list[Check]:
    return [*token_checks(), *layer_checks()]


def smoke_checks() -> list[Check]:
    """A few tiny cases in float32.

    A program past the end of its list costs the interpreter as much as any other.
    """
    tile_table.SPLIT_PROGRAMS = 4
    tiny = replace(
        LAYER, num_heads=1, d_qk=16, d_v=16, window=4, full_rows=3, recompute=RECOMPUTABLE
    )
    return [
        (check_layer, Case(tiny, 16, (17, 0), (3, 0), 0.2, torch.float32)),
        (check_frozen, Case(tiny, 16, (17, 0), (3, 0), 0.0, torch.float32), 5.0),
        (check_gate, 19, 32, 0.2, torch.float32),
        (check_norm, "plain", 9, 24, torch.float32),
        (check_norm, "gate", 9, 24, torch.float32),
        (check_position_time, "spread", 30, 16, (8, 6), "event", torch.float32),
        (check_linear_swish, 9, 24, 40, torch.float32),
        (check_placed_tokens, 30, 16, 2, True),
    ]
