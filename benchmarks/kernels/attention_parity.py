"""Parity of semi-local attention: the Triton backend against dense PyTorch, on a GPU or in Triton's
interpreter.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks.gpu import DEVICE, Check, generator, offsets_of
from benchmarks.kernels.accuracy import find_stray
from kernels.semi_local_attention import tile_table
from kernels.semi_local_attention.op import Backend, cached_attention, semi_local_attention
from kernels.semi_local_attention.reference import relative_bias, semi_local_mask
from kernels.semi_local_attention.types import RelativeBias

SEMI_LOCAL = {"window": 256, "full_rows": 256}
MANY_ROWS = 3000, 4097, 2050


@dataclass(frozen=True)
class Case:
    """A batch and a mask."""

    lengths: tuple[int, ...]
    num_targets: tuple[int, ...] | None = None
    mask: dict[str, int] = field(default_factory=dict)
    visible: str = ""  # each candidate its own visible length: "random", or "sorted" as in training
    heads: int = 4
    d_qk: int = 128
    d_v: int = 128
    bias: bool = False
    own_view: bool = False  # each candidate its own oldest key, each sequence its own full rows
    gap_ms: int = 7_200_000  # with a bias, events are up to so far apart
    asked_ms: int = 0  # and rows ask about times up to three times this before or after their own
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        shown = (
            f"{len(self.lengths)} sequences" if len(self.lengths) > 4 else str(list(self.lengths))
        )
        extra = f"{' visible ' + self.visible if self.visible else ''}"
        extra += " own view" if self.own_view else ""
        if self.bias:
            extra += f" bias, {self.gap_ms} ms apart, asked {self.asked_ms} ms off"
        return (
            f"{self.dtype} {shown} targets {self.num_targets} {self.mask} "
            f"{self.heads}x{self.d_qk}x{self.d_v}{extra}"
        )


@dataclass
class Batch:
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    offsets: Tensor
    options: dict
    bias: RelativeBias | None


def make_batch(case: Case, seed: int = 0) -> Batch:
    """Tensors in float64, of values that the case's type holds exactly."""
    draws = generator(seed)
    total, heads = sum(case.lengths), case.heads
    widths = case.d_qk, case.d_qk, case.d_v, case.d_v
    dtype = getattr(torch, case.dtype)
    tensors = [
        torch.randn(total, heads, d, generator=draws, device=DEVICE).to(dtype).double()
        for d in widths
    ]
    offsets = offsets_of(case.lengths)
    options = {
        **case.mask,
        "max_seq_len": max(case.lengths),
        "attn_alpha": case.d_qk**-0.5,
        "scaling_seq_len": 64,
    }
    if case.num_targets is not None:
        options["num_targets"] = torch.tensor(case.num_targets, dtype=torch.int32).to(DEVICE)
        if case.visible:
            host = torch.Generator().manual_seed(seed)
            pairs = zip(case.lengths, case.num_targets, strict=True)
            rows = [torch.randint(0, n - c + 1, (c,), generator=host) for n, c in pairs]
            rows = rows if case.visible == "random" else [row.sort().values for row in rows]
            visible = torch.cat(rows).to(torch.int32)
            options["target_visible"] = visible.to(DEVICE)
            if case.own_view:  # at times behind all that a candidate sees
                share = torch.rand(len(visible), generator=host)
                options["target_from"] = (share * (visible + 3)).to(torch.int32).to(DEVICE)
    if case.own_view:
        extra = torch.arange(len(case.lengths), dtype=torch.int32) * 37 % 100
        options["extra_full_rows"] = extra.to(DEVICE)
    bias = None
    if case.bias:
        tables = (
            torch.randn(n, generator=draws, device=DEVICE, dtype=torch.float64) for n in (500, 129)
        )
        times = torch.randint(0, case.gap_ms, (total,), generator=draws, device=DEVICE).cumsum(0)
        off = (torch.arange(total, device=DEVICE) % 7 - 3) * case.asked_ms
        bias = RelativeBias(*tables, times, times + off if case.asked_ms else None)
    return Batch(*tensors, offsets, options, bias)


def run(batch: Batch, dtype: torch.dtype, backend: Backend) -> list[Tensor]:
    """Output and all gradients, in float64."""
    leaves = [x.to(dtype).requires_grad_() for x in (batch.q, batch.k, batch.v)]
    bias = batch.bias
    if bias is not None:
        wide = torch.promote_types(dtype, torch.float32)
        tables = [x.to(wide).requires_grad_() for x in (bias.position_table, bias.time_table)]
        bias = RelativeBias(*tables, bias.event_time_T, bias.query_time_T)
        leaves += tables
    out = semi_local_attention(
        *leaves[:3], batch.offsets, bias=bias, backend=backend, **batch.options
    )
    grads = torch.autograd.grad(out, leaves, batch.grad.to(dtype))
    return [x.detach().double() for x in (out, *grads)]


def parity_cases() -> list[Case]:
    """Lengths that break tiles, every kind of mask, every width and type, and real sizes."""
    semi, prefixed = {"window": 100, "full_rows": 50}, {"window": 100, "full_rows": 50, "prefix": 3}
    cases = [
        Case((1,)),
        Case((63, 0, 130)),
        Case((257, 64), (0, 64), {"window": 40, "full_rows": 30}, heads=2),
        Case((1000, 77, 512), None, SEMI_LOCAL, heads=2),
        Case((1000, 77, 512), (100, 7, 0), semi, heads=2),
        Case((1000, 77, 512), (100, 7, 0), prefixed, "random", heads=2),
        Case(
            (3000, 200), (300, 0), {"window": 0, "full_rows": 70, "prefix": 70}, "random", heads=2
        ),
        Case((2500, 300), (500, 3), heads=2),
        Case((1030,) * 3, heads=2),
        Case((200,) * 20, (50,) * 20, {"window": 64, "prefix": 2}, "sorted", heads=2),
        Case((3584 + 512, 4096), (512, 512), SEMI_LOCAL, heads=2),
        Case((16384 + 512,), (512,), SEMI_LOCAL, heads=1),
        Case((9000,), None, heads=1),
        # long parts of tiles, of the prefix's keys too
        Case((9000, 300), (100, 0), prefixed, heads=1),
        # as many rows as a kernel of their own for BAND tiles wants
        Case(MANY_ROWS, (100, 0, 2050), SEMI_LOCAL),
        Case(MANY_ROWS, (100, 0, 7), prefixed, "random"),
        Case(MANY_ROWS, None, {"window": 100, "prefix": 70}),
        Case(MANY_ROWS, None, {"window": 0}, dtype="float16"),
    ]
    some = [((700, 77), (70, 7), prefixed, "random"), ((1100, 63), None, {}, "")]
    widths = [(64, 64), (32, 32), (16, 16), (256, 256), (64, 128), (128, 64)]
    widths += [(50, 25), (25, 50), (128, 20), (20, 9)]  # padded, to one width where narrow
    for d_qk, d_v in widths:
        cases += [Case(*x, heads=2, d_qk=d_qk, d_v=d_v) for x in some]
    for dtype in ("float16", "float32"):
        cases += [Case(*x, heads=2, d_qk=d, d_v=d, dtype=dtype) for x in some for d in (128, 50)]
    cases += [Case(*x, heads=2, d_qk=64, d_v=64, bias=True) for x in some]
    cases += [Case((2500, 300), (500, 3), semi, heads=2, d_qk=50, d_v=50, bias=True)]
    cases += [Case(*x, heads=2, bias=True) for x in some]
    days = replace(
        Case((1100, 63), (100, 3), heads=2, d_qk=64, d_v=64, bias=True), asked_ms=3_000_000
    )
    cases += [
        days,
        replace(days, gap_ms=16 * 86_400_000, asked_ms=2**36),
        replace(days, gap_ms=500, asked_ms=0),
    ]
    return cases + own_view_cases()


def own_view_cases() -> list[Case]:
    """A lower bound for each candidate beside the upper one, and full rows by sequence."""
    semi, prefixed = {"window": 100, "full_rows": 50}, {"window": 100, "full_rows": 50, "prefix": 3}
    cases = [
        Case((1000, 77, 512), (100, 7, 0), semi, "random", heads=2),
        Case((1000, 77, 512), (100, 77, 512), prefixed, "random", heads=2),
        Case((3000, 200), (300, 0), {"window": 0, "full_rows": 7, "prefix": 70}, "random", heads=2),
        Case((2500, 300), (500, 3), {"prefix": 2}, "sorted", heads=2),
        Case((200,) * 20, (50,) * 20, {"window": 64, "prefix": 2}, "sorted", heads=2),
        Case((16384 + 512,), (512,), SEMI_LOCAL, "sorted", heads=1),
        Case((2500, 300), (500, 3), prefixed, "random", heads=2, d_qk=50, d_v=50, bias=True),
    ]
    cases += [replace(cases[1], d_qk=d, d_v=d) for d in (32, 64, 256)]
    cases += [replace(cases[1], dtype=dtype) for dtype in ("float16", "float32")]
    return [replace(case, own_view=True) for case in cases]


def sizes_of_bias_terms(batch: Batch) -> list[Tensor]:
    """For each number of the two bias tables, the sum of |terms| of its gradient, in float64.

    A term is one product g * v of the gradient of a score, at one pair of rows and one head:

        d_table[b] = sum over pairs in bucket b, heads and v of  g * v * silu'(score) / L
    """
    assert batch.bias is not None
    bias = batch.bias
    tables = [x.detach().requires_grad_() for x in (bias.position_table, bias.time_table)]
    bias = RelativeBias(*tables, bias.event_time_T, bias.query_time_T)
    options = batch.options
    sums = [torch.zeros_like(table) for table in tables]

    offsets = batch.offsets.tolist()
    counts, visible = options.get("num_targets"), options.get("target_visible")
    oldest, extra = options.get("target_from"), options.get("extra_full_rows")
    counts = [0] * (len(offsets) - 1) if counts is None else counts.tolist()
    extra = [0] * len(counts) if extra is None else extra.tolist()
    first_candidate = 0
    for i, (begin, end, count) in enumerate(zip(offsets[:-1], offsets[1:], counts, strict=True)):
        rows, candidates = slice(begin, end), slice(first_candidate, first_candidate + count)
        seen = None if visible is None else visible[candidates]
        first = None if oldest is None else oldest[candidates]
        first_candidate += count

        # the slope of SiLU at every score
        added = relative_bias(bias, rows, count, seen)
        score = torch.einsum("qhd,khd->hqk", batch.q[rows], batch.k[rows]) * options["attn_alpha"]
        score = (score + added.detach()).requires_grad_()
        (slope,) = torch.autograd.grad(torch.nn.functional.silu(score).sum(), score)

        # the sizes of the products that meet there
        sizes = torch.einsum("qhv,khv->hqk", batch.grad[rows].abs(), batch.v[rows].abs())
        full_rows = options.get("full_rows", 0) + extra[i]
        mask_sizes = options.get("window"), full_rows, options.get("prefix", 0)
        mask = semi_local_mask(end - begin, count, *mask_sizes, seen, first).to(DEVICE)
        sizes = (sizes * slope.abs() * mask).sum(0) / options["scaling_seq_len"]

        of_sequence = torch.autograd.grad(added, tables, sizes)
        sums = [total + part for total, part in zip(sums, of_sequence, strict=True)]
    return sums


def judge(
    case: Case, batch: Batch, fast: list[Tensor], plain: list[Tensor], truth: list[Tensor]
) -> str | None:
    """`find_stray` of an output and its gradients; sums over pairs have a bound of their own."""
    longest = max(case.lengths)
    stray = find_stray(fast[:4], plain[:4], truth[:4], num_terms=longest)
    if stray is not None or batch.bias is None:
        return stray

    num_terms = sum(case.lengths) * longest * case.heads * case.d_v
    sizes = dict(enumerate(sizes_of_bias_terms(batch)))
    stray = find_stray(fast[4:], plain[4:], truth[4:], num_terms=num_terms, sums_of_sizes=sizes)
    return None if stray is None else f"gradients of the bias tables, {stray}"


def check_parity(case: Case) -> str | None:
    """The first fault of the Triton backend on a case: results that stray, or runs that differ."""
    batch, dtype = make_batch(case), getattr(torch, case.dtype)
    truth = run(batch, torch.float64, "torch" if max(case.lengths) > 8192 else "reference")
    plain = run(batch, dtype, "reference")
    fast, again = run(batch, dtype, "triton"), run(batch, dtype, "triton")
    stray = judge(case, batch, fast, plain, truth)
    if stray is not None:
        return stray
    if not all(torch.equal(a, b) for a, b in zip(fast, again, strict=True)):
        return "two runs differ"
    return None


def check_contained(case: Case, bad: float) -> str | None:
    """A number that is not finite, in the rows of every second sequence, reaches no other one."""
    batch, dtype = make_batch(case), getattr(torch, case.dtype)
    clean = run(batch, dtype, "triton")

    users = torch.arange(len(case.lengths), device=DEVICE)
    lengths = torch.tensor(case.lengths, device=DEVICE)
    is_broken = users.repeat_interleave(lengths) % 2 == 1
    for name in ("q", "k", "v", "grad"):
        getattr(batch, name)[is_broken, :, 0] = bad
    spoilt = run(batch, dtype, "triton")

    names = "out", "dq", "dk", "dv"
    for name, got, expected in zip(names, spoilt[:4], clean[:4], strict=True):
        if not torch.equal(got[~is_broken], expected[~is_broken]):
            return f"{bad} of one user reaches {name} of others"
        if got[is_broken].isfinite().all():
            return f"{bad} shows nowhere in {name}"
    return None


def check_big_numbers() -> str | None:
    """A window, full rows and a prefix that pass 2**31 with a place added: plain causal."""
    big = 2**31 - 1
    case = Case((300, 70), (9, 0), {"window": big, "full_rows": big, "prefix": big}, heads=2)
    return check_parity(case)


def check_cached(
    dtype: torch.dtype = torch.bfloat16,
    cached: tuple[int, ...] = (3000, 0, 500),
    rows: tuple[int, ...] = (200, 3, 70),
    heads: int = 4,
    width: int = 128,
) -> str | None:
    for seen in (False, True):
        args, visible = cached_inputs(cached, rows, dtype, heads, width, with_visible=seen)
        options = {"visible": visible, "attn_alpha": 0.1, "scaling_seq_len": 64}
        wide = [x.double() if x.is_floating_point() else x for x in args]
        truth = cached_attention(*wide, backend="reference", **options)
        plain = cached_attention(*args, backend="reference", **options).double()
        fast = cached_attention(*args, backend="triton", **options).double()
        stray = find_stray([fast], [plain], [truth], num_terms=max(cached) + max(rows))
        if stray is not None:
            return f"visible {seen}: {stray}"
    return None


def cached_inputs(
    cached: tuple[int, ...], rows: tuple[int, ...], dtype, heads=4, width=128, with_visible=False
):
    draws = generator()

    def draw(count: int) -> Tensor:
        return torch.randn(count, heads, width, generator=draws, device=DEVICE).to(dtype)

    row_offsets, cache_offsets = (offsets_of(n) for n in (rows, cached))
    c, t = sum(rows), sum(cached)
    visible = (
        torch.cat([torch.randint(0, n + 1, (m,)) for n, m in zip(cached, rows, strict=True)])
        .int()
        .to(DEVICE)
    )
    args = draw(c), draw(c), draw(c), row_offsets, draw(t), draw(t), cache_offsets
    return args, visible if with_visible else None


def parity_checks() -> list[Check]:
    contained = [
        Case((300, 70, 1, 200, 129, 64, 5), None, SEMI_LOCAL, heads=2),
        Case((300, 70, 1, 200, 129), (9, 3, 1, 0, 129), {"window": 40, "prefix": 3}, "sorted"),
        Case((700, 90, 1300), (64, 3, 70), {}, "random", d_qk=64, d_v=64),
        Case((70, 30, 90), (7, 3, 0), {"window": 9, "full_rows": 5}, heads=1, dtype="float32"),
        Case((*MANY_ROWS, 5, 70), None, {"window": 100, "prefix": 70}),
    ]
    return [
        *((check_parity, case) for case in parity_cases()),
        (check_cached,),
        *((check_contained, case, bad) for case in contained for bad in (math.nan, math.inf)),
        (check_big_numbers,),
    ]


def smoke_checks() -> list[Check]:
    """A few tiny cases in float32.

    A program past the end of its list costs the interpreter as much as any other.
    """
    tile_table.SPLIT_PROGRAMS = 4
    tiny = Case(
        (21, 0, 9),
        (3, 0, 9),
        {"window": 4, "full_rows": 3, "prefix": 1},
        "random",
        1,
        16,
        16,
        dtype="float32",
    )
    biased = replace(tiny, mask={}, visible="", bias=True)
    days = replace(biased, gap_ms=16 * 86_400_000, asked_ms=2**36)
    own = replace(tiny, own_view=True)
    # sequences shorter than the prefix
    short = Case((5, 9, 3, 40), None, {"window": 1, "prefix": 8}, "", 1, 16, 16, dtype="float32")
    return [
        *((check_parity, case) for case in (tiny, biased, days, own)),
        (check_cached, torch.float32, (20, 0, 7), (5, 1, 2), 1, 16),
        (check_contained, replace(tiny, lengths=(9, 7, 12), num_targets=(2, 1, 0)), math.nan),
        (check_contained, short, math.nan),
    ]
