"""Parity of the kernels of tables and jagged rows, on a GPU or in Triton's interpreter."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu import DEVICE, Check, no_waiting, offsets_of, randint, randn
from benchmarks.kernels.accuracy import find_stray
from kernels.backend import Backend
from kernels.full_softmax.op import log_partition
from kernels.int4_embedding.op import look_up, quantize
from kernels.int4_embedding.reference import quantize_reference
from kernels.jagged.op import concatenate_sequences, split_sequences, truncate_tail
from kernels.rowwise_adamw.op import rowwise_adamw
from kernels.rowwise_adamw.types import Hyper
from kernels.sampled_softmax.op import draw_negatives, sampled_softmax

# relative to a result's norm: a product keeps 10 bits, and scores of 20 magnify that
MOST_TF32_ERROR = 5e-3


def check_jagged(
    lengths: tuple[list[int], list[int]], width: int, dtype: torch.dtype
) -> str | None:
    left_offsets, right_offsets = map(offsets_of, lengths)
    left, right = (randn(sum(n), width, dtype=dtype).requires_grad_() for n in lengths)
    whole_grad = randn(len(left) + len(right), width, dtype=dtype, seed=1)
    tail = randint(70, len(lengths[0])).int()
    kept = sum(torch.minimum(torch.tensor(lengths[0]), tail.cpu() + 2).tolist())
    results = []
    backends: tuple[Backend, ...] = "triton", "torch"
    for backend in backends:
        with no_waiting(backend):
            whole = concatenate_sequences(left, left_offsets, right, right_offsets, backend=backend)
            parts = split_sequences(
                whole, left_offsets, right_offsets, num_left=len(left), backend=backend
            )
            short, offsets = truncate_tail(
                left, left_offsets, tail, num_context=2, num_rows=kept, backend=backend
            )
            grads = torch.autograd.grad(whole, (left, right), whole_grad, retain_graph=True)
            back = torch.autograd.grad(short, left, whole_grad[: len(short)])
        results.append([whole, *parts, short, offsets, *grads, *back])
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return None if same else "rows differ from plain PyTorch's"


def check_int4(num_rows: int, dim: int, dtype: torch.dtype) -> str | None:
    table = randn(num_rows, dim) * torch.logspace(-3, 2, num_rows, device=DEVICE)[:, None] + 0.3
    packed, ids = quantize(table.cpu()).to(DEVICE), randint(num_rows, 701, 3)[:, 1]
    codes, scale, bias = (x.double() for x in quantize_reference(table.cpu()))
    truth = (codes * scale + bias).to(DEVICE)[ids]
    fast, plain = (
        look_up(packed, ids, dim=dim, dtype=dtype, backend=backend)
        for backend in ("triton", "torch")
    )
    return find_stray([fast], [plain], [truth])


IDS: dict[str, Callable[[], Tensor]] = {
    "distinct": lambda: torch.randperm(5000, device=DEVICE)[:3001],
    "repeats": lambda: randint(700, 5000),
    "16 rows": lambda: randint(16, 20_000),
    "one row": lambda: torch.full((70_001,), 3, device=DEVICE),
    "nothing": lambda: torch.empty(0, dtype=torch.int64, device=DEVICE),
    "few": lambda: randint(20, 40),
}


def check_adamw_agrees(dim: int, runs: int = 100) -> str | None:
    """The same rows in every one of many runs, runs of ids that cross chunks among them: threads
    must not race.
    """
    ids, hyper = randint(100, 8192), Hyper(1, 0.01, (0.9, 0.999), 1e-8, 0.01)
    weight, grads = randn(100, dim), randn(len(ids), dim, seed=1)

    def step() -> list[Tensor]:
        state = weight.clone(), torch.zeros_like(weight), torch.zeros(100, device=DEVICE)
        rowwise_adamw(*state, ids, grads, hyper, backend="triton")
        return list(state)

    first = step()
    wrong = sum(
        not all(torch.equal(a, b) for a, b in zip(first, step(), strict=True)) for _ in range(runs)
    )
    return f"{wrong} of {runs} runs differ" if wrong else None


def check_adamw(kind: str, num_rows: int, dim: int, momentum: bool) -> str | None:
    ids = IDS[kind]()
    hyper = Hyper(3, 0.01, (0.9 if momentum else 0.0, 0.999), 1e-8, 0.01)
    weight, grads, scale = (
        randn(num_rows, dim),
        randn(len(ids), dim, seed=1),
        torch.tensor(3.7, device=DEVICE),
    )
    m, v = randn(num_rows, dim, seed=2) if momentum else None, randn(num_rows, seed=3).abs()

    def step(dtype: torch.dtype, backend: Backend) -> list[Tensor]:
        state = [None if x is None else x.to(dtype, copy=True) for x in (weight, m, v)]
        with no_waiting(backend):
            rowwise_adamw(
                *state, ids, grads.to(dtype), hyper, grad_scale=scale.to(dtype), backend=backend
            )
        return [x for x in state if x is not None]

    fast, again = step(torch.float32, "triton"), step(torch.float32, "triton")
    if not all(torch.equal(a, b) for a, b in zip(fast, again, strict=True)):
        return "two runs differ"
    plain, truth = step(torch.float32, "torch"), step(torch.float64, "torch")
    longest_run = max(1, len(ids))
    return find_stray(fast, plain, truth, num_terms=longest_run)


def check_bfloat16_rows() -> str | None:
    """Equal to plain PyTorch but where a difference in the last bit of float32 turned the chance of
    a rounding.
    """
    rows = randn(5000, 128, dtype=torch.bfloat16)
    ids, grads, hyper = (
        randint(5000, 3000),
        randn(3000, 128, seed=1),
        Hyper(3, 0.01, (0.9, 0.999), 1e-8, 0.01),
    )
    tables = []
    backends: tuple[Backend, ...] = "triton", "torch"
    for backend in backends:
        weight, m, v = (
            rows.clone(),
            torch.zeros(5000, 128, device=DEVICE),
            torch.zeros(5000, device=DEVICE),
        )
        rowwise_adamw(weight, m, v, ids, grads, hyper, backend=backend)
        tables.append(weight)
    share = (tables[0] != tables[1]).float().mean().item()
    return f"{share:.1%} of the numbers differ" if share > 1e-3 else None


def check_host_moments(
    num_rows: int, dim: int, dtype: torch.dtype, num_ids: int = 700
) -> str | None:
    """Moments in pinned memory of the host end like those on the device, bit for bit, and so do the
    rows.
    """
    ids, grads = randint(num_rows, num_ids, seed=4), randn(num_ids, dim, seed=1)
    ended = []
    for pinned in (False, DEVICE == "cuda"):
        place = {"pin_memory": True} if pinned else {"device": DEVICE}
        weight = randn(num_rows, dim, dtype=dtype)
        m, v = torch.zeros(num_rows, dim, **place), torch.zeros(num_rows, **place)
        for step in range(1, 4):
            hyper = Hyper(step, 0.01, (0.9, 0.999), 1e-8, 0.01)
            with no_waiting("triton"):
                rowwise_adamw(weight, m, v, ids, grads, hyper, first_row=3, backend="triton")
        ended.append([weight.cpu(), m.cpu(), v.cpu()])  # the first of them waits for the kernels
    same = all(torch.equal(a, b) for a, b in zip(*ended, strict=True))
    return None if same else "differs from moments on the device"


def check_softmax(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> str | None:
    num_positions, num_items, num_negatives, dim = sizes
    users, items = (
        randn(num_positions, dim, dtype=dtype),
        randn(num_items, dim, dtype=dtype, seed=1),
    )
    positives = randint(num_items, num_positions)
    negatives = draw_negatives(num_items, num_positions, num_negatives, device=DEVICE)
    weights = randn(num_positions, seed=2).abs()
    weights[1:2] = 0

    def run(dtype: torch.dtype, backend: Backend) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (users, items)]
        with no_waiting(backend):
            loss = sampled_softmax(*leaves, positives, negatives, weights=weights, backend=backend)
            grads = torch.autograd.grad(loss, leaves)
        return [loss.detach(), *grads]

    fast, again = run(dtype, "triton"), run(dtype, "triton")
    if not all(torch.equal(a, b) for a, b in zip(fast, again, strict=True)):
        return "two runs differ"
    # A loss is a difference of scores of up to 1 / 0.05, whose last bit shows where the loss is
    # exactly 0.
    plain, truth = run(dtype, "reference"), run(torch.float64, "reference")
    uses_of_an_item = num_positions * (num_negatives + 1)
    return find_stray(fast, plain, truth, num_terms=uses_of_an_item, floor=2**-23 / 0.05)


def check_softmax_in_half(sizes: tuple[int, int, int, int], rated: bool) -> str | None:
    """Vectors in float32 where TF32 is allowed: two runs alike, and the distance from float64."""
    num_positions, num_items, num_negatives, dim = sizes
    users, items = randn(num_positions, dim), randn(num_items, dim, seed=1)
    positives = randint(num_items, num_positions)
    negatives = draw_negatives(num_items, num_positions, num_negatives, device=DEVICE)
    rates = randn(num_items, seed=3) if rated else None

    def run(dtype: torch.dtype, backend: Backend) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (users, items)]
        with no_waiting(backend):
            loss = sampled_softmax(
                *leaves, positives, negatives, log_rates=rates, tf32=True, backend=backend
            )
            grads = torch.autograd.grad(loss, leaves)
        return [loss.detach(), *grads]

    return compare_runs(run)


def compare_runs(run: Callable[[torch.dtype, Backend], list[Tensor]]) -> str | None:
    """What is wrong with the kernels' results, or None: two runs that differ, or results far from
    those of the reference in float64.
    """
    fast, again = run(torch.float32, "triton"), run(torch.float32, "triton")
    if not all(torch.equal(a, b) for a, b in zip(fast, again, strict=True)):
        return "two runs differ"
    return too_far(fast, run(torch.float64, "reference"))


def too_far(fast: list[Tensor], truth: list[Tensor]) -> str | None:
    """The first result that is farther from float64 than products in TF32 explain, or None."""
    for i, (got, expected) in enumerate(zip(fast, truth, strict=True)):
        error = ((got.double() - expected).norm() / expected.norm().clamp(min=1e-3)).item()
        if not error <= MOST_TF32_ERROR:
            return f"output {i}: error {error:.1e}, allowed {MOST_TF32_ERROR:.1e}"
    return None


def check_full_softmax(sizes: tuple[int, int, int]) -> str | None:
    """The mean loss against all items, of unit vectors with scores up to 20 as in training, and its
    gradients: two runs alike, and TF32's distance from float64.
    """
    num_positions, num_items, dim = sizes
    users, items = randn(num_positions, dim), randn(num_items, dim, seed=1)
    positives = randint(num_items, num_positions)

    def run(dtype: torch.dtype, backend: Backend) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (users, items)]
        user, item = (torch.nn.functional.normalize(x, dim=1) for x in leaves)
        user = user * 20
        with no_waiting(backend):
            total = log_partition(user, item, tf32=True, backend=backend)
            loss = (total - (user * item[positives]).sum(1)).mean()
            grads = torch.autograd.grad(loss, leaves)
        return [loss.detach(), *grads]

    return compare_runs(run)


def parity_checks() -> list[Check]:
    checks: list[Check] = []
    many = [3, 0, 1, 200, 64] * 50
    for lengths in (([1], [1]), ([63, 0, 130], [0, 0, 70]), ([0, 0], [0, 3]), (many, many[::-1])):
        for width, dtype in ((1, torch.float32), (50, torch.bfloat16), (512, torch.bfloat16)):
            checks.append((check_jagged, lengths, width, dtype))
    for dim in (1, 32, 50, 128):
        for dtype in (torch.float32, torch.bfloat16):
            checks.append((check_int4, 1000, dim, dtype))
    for kind in ("distinct", "repeats", "16 rows", "one row", "nothing"):
        checks += [(check_adamw, kind, 5000, dim, True) for dim in (1, 50, 128)]
        checks.append((check_adamw, kind, 5000, 128, False))
    checks += [(check_adamw_agrees, dim) for dim in (8, 16, 32, 64, 128, 256)]
    checks.append((check_bfloat16_rows,))
    checks += [(check_host_moments, 5000, 128, dtype) for dtype in (torch.float32, torch.bfloat16)]
    for sizes in (
        (1, 1, 1, 1),
        (63, 5, 20, 50),
        (257, 1000, 128, 64),
        (1000, 40_000, 512, 64),
        (300, 77, 33, 256),
    ):
        checks += [(check_softmax, sizes, dtype) for dtype in (torch.float32, torch.bfloat16)]
    # the first has keys of many parts, the last two have two items to a key, and keys of 32 bits
    for sizes in (
        (1000, 7, 512, 64),
        (63, 5, 20, 50),
        (257, 1000, 128, 64),
        (300, 77, 33, 256),
        (1000, 100_001, 512, 64),
        (1000, 140_000, 512, 64),
    ):
        checks += [(check_softmax_in_half, sizes, rated) for rated in (False, True)]
    for sizes in ((1, 1, 1), (63, 5, 50), (257, 1000, 64), (1000, 40_000, 64), (300, 77, 200)):
        checks.append((check_full_softmax, sizes))
    checks.append((check_full_softmax, (300, 77, 512)))
    return checks


def smoke_checks() -> list[Check]:
    """A few tiny cases in float32."""
    return [
        (check_jagged, ([5, 0, 9], [0, 3, 1]), 8, torch.float32),
        (check_int4, 20, 16, torch.float32),
        (check_adamw, "few", 30, 16, True),
        (check_host_moments, 30, 16, torch.bfloat16, 50),
        (check_softmax, (5, 9, 4, 8), torch.float32),
        (check_softmax_in_half, (5, 9, 4, 8), True),
        (check_full_softmax, (5, 9, 8)),
    ]
