"""Losses of a next item on one GPU: time, memory and accuracy beside PyTorch and, of the sampled
one, a Triton cross entropy.

    python -m benchmarks.kernels.softmax --out benchmarks/runs/retrieval_softmax.json
    TRITON_INTERPRET=1 python -m benchmarks.kernels.softmax --smoke   # without a GPU: parity alone

`sampled`: each position against negatives of its own. `full`: against all items. A call is forward
and backward. Parity comes first, at small sizes; a form that is wrong there is not timed.
"""

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu import DEVICE, Timer, randint, randn, versions
from benchmarks.kernels.softmax_peers import IndexedLoss
from benchmarks.report import read_run, write_run
from kernels.backend import INTERPRETED, Backend
from kernels.full_softmax.op import log_partition
from kernels.full_softmax.torch_chunked import chunked_log_partition
from kernels.sampled_softmax.op import draw_negatives, sampled_softmax

SCALE = 20.0  # 1 / temperature
MOST_ERROR = 5e-3  # of a gradient, relative to its norm: TF32 with scores up to `SCALE`
NUM_POSITIONS, NUM_NEGATIVES, DIM = 65_536, 512, 64

# users, items, positives, negatives → the mean loss
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def sampled_by(backend: Backend) -> Loss:
    """The op's forms: `triton` is ours, `reference` plain PyTorch."""

    def loss(users: Tensor, items: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        return sampled_softmax(
            users, items, positives, negatives, temperature=1 / SCALE, backend=backend
        )

    return loss


def sampled_by_peer(users: Tensor, items: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    ids = torch.cat([positives[:, None].int(), negatives], dim=1)
    user, item = F.normalize(users, dim=1) * SCALE, F.normalize(items, dim=1)
    return IndexedLoss.apply(user, item, ids).mean()


def sampled_by_peer_in_half(
    users: Tensor, items: Tensor, positives: Tensor, negatives: Tensor
) -> Tensor:
    """The peer with what ours reads where TF32 is allowed: vectors in float16."""
    ids = torch.cat([positives[:, None].int(), negatives], dim=1)
    user, item = F.normalize(users, dim=1) * SCALE, F.normalize(items, dim=1)
    return IndexedLoss.apply(user.half(), item.half(), ids).mean()


def full_by(partition: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """Against all items, by a function of the log of the summed exponentials."""

    def loss(users: Tensor, items: Tensor, positives: Tensor, _: Tensor) -> Tensor:
        user, item = F.normalize(users, dim=1) * SCALE, F.normalize(items, dim=1)
        score = (user * item[positives]).sum(1)
        return (partition(user, item) - score).mean()

    return loss


def full_by_triton(users: Tensor, items: Tensor) -> Tensor:
    return log_partition(users, items, tf32=True, backend="triton")


def full_by_pytorch(users: Tensor, items: Tensor, positives: Tensor, _: Tensor) -> Tensor:
    user, item = F.normalize(users, dim=1) * SCALE, F.normalize(items, dim=1)
    return F.cross_entropy(user @ item.T, positives)


# by the loss: a form's name → the form, and the precision of PyTorch's float32 products
FORMS: dict[str, dict[str, tuple[Loss, str]]] = {
    "sampled": {
        "ours": (sampled_by("triton"), "highest"),
        "ours, TF32": (sampled_by("triton"), "high"),
        "PyTorch": (sampled_by("reference"), "highest"),
        "Triton cross entropy": (sampled_by_peer, "highest"),
        "Triton cross entropy, float16": (sampled_by_peer_in_half, "highest"),
    },
    "full": {
        "ours, TF32": (full_by(full_by_triton), "high"),
        "chunked PyTorch": (full_by(chunked_log_partition), "highest"),
        "chunked PyTorch, TF32": (full_by(chunked_log_partition), "high"),
        "PyTorch": (full_by_pytorch, "highest"),
        "PyTorch, TF32": (full_by_pytorch, "high"),
    },
}
FEWER_BITS = ", TF32", ", float16"  # ends of the names of forms that leave some out


def make_inputs(
    num_positions: int, num_items: int, num_negatives: int, dim: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Users and items, which take gradients; positives; negatives."""
    leaves = [randn(num_positions, dim), randn(num_items, dim, seed=1)]
    positives = randint(num_items, num_positions)
    torch.manual_seed(0)
    negatives = draw_negatives(num_items, num_positions, num_negatives, device=DEVICE)
    return [x.to(dtype).requires_grad_() for x in leaves], positives, negatives


def gradients(
    form: Loss, leaves: list[Tensor], positives: Tensor, negatives: Tensor
) -> list[Tensor]:
    loss = form(*leaves, positives, negatives)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def measure_error(kind: str, name: str, dtype: torch.dtype) -> float:
    """The largest relative error of the loss and of the two gradients, by their norms, against
    float64.
    """
    sizes = (30, 70, 20, 24) if INTERPRETED else (3_000, 5_000, 100, DIM)
    leaves, positives, negatives = make_inputs(*sizes, dtype)
    form, precision = FORMS[kind][name]
    torch.set_float32_matmul_precision(precision)
    found = gradients(form, leaves, positives, negatives)

    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = {"sampled": sampled_by("reference"), "full": full_by_pytorch}[kind]
    truth = gradients(exact, wide, positives, negatives)
    errors = []
    for got, expected in zip(found, truth, strict=True):
        errors.append(((got.double() - expected).norm() / expected.norm()).item())
    return max(errors)


def measure_form(timer: Timer, kind: str, name: str, num_items: int, dtype: torch.dtype) -> dict:
    form, precision = FORMS[kind][name]
    leaves, positives, negatives = make_inputs(NUM_POSITIONS, num_items, NUM_NEGATIVES, DIM, dtype)
    torch.set_float32_matmul_precision(precision)

    def call() -> list[Tensor]:
        return gradients(form, leaves, positives, negatives)

    call()  # compiles
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    peak = torch.cuda.max_memory_allocated() - before
    return {"ms": timer(call, repeats=5), "peak_gb": peak / 1e9}


def measure(out: Path | None, losses: Sequence[str]) -> dict:
    """All forms of these losses, one after another; what is measured is written at once, beside
    what `out` has of the others.
    """
    found: dict = read_run(out) if out is not None and out.exists() else {}
    found["machine"] = versions()
    cases = [
        ("sampled", 100_000, torch.float32),
        ("sampled", 100_000, torch.bfloat16),
        ("full", 100_000, torch.float32),
    ]
    for kind, num_items, dtype in cases:
        if kind not in losses:
            continue
        case = f"{kind}, {str(dtype).removeprefix('torch.')}"
        for name in FORMS[kind]:
            if dtype != torch.float32 and name.endswith(FEWER_BITS):
                continue  # it has no more bits to begin with
            error = measure_error(kind, name, dtype)
            numbers: dict = {"error": error, "items": num_items}
            most = MOST_ERROR if dtype == torch.float32 else 10 * MOST_ERROR
            if error <= most:
                numbers |= measure_form(Timer(), kind, name, num_items, dtype)
            else:
                print(f"WRONG {case}, {name}: error {error:.1e}", flush=True)
            found.setdefault(case, {})[name] = numbers
            print(case, name, json.dumps(numbers), flush=True)
            if out is not None:
                write_run(out, found)
            gc.collect()
            torch.cuda.empty_cache()
    return found


def smoke() -> None:
    """Parity of all forms at tiny sizes, for a machine without a GPU."""
    for kind, forms in FORMS.items():
        for name in forms:
            error = measure_error(kind, name, torch.float32)
            print(f"{kind}, {name}: error {error:.1e}", flush=True)
            assert error <= MOST_ERROR, (kind, name, error)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="file of the figures")
    parser.add_argument("--losses", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--smoke", action="store_true", help="tiny calls, in Triton's interpreter")
    options = parser.parse_args()
    if options.smoke:
        smoke()
    else:
        measure(options.out, options.losses)


if __name__ == "__main__":
    main()
