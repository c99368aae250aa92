"""What a launch costs on the host, without a GPU: Python and PyTorch's own work, with kernels that
do nothing.

    python -m benchmarks.training.launch_overhead

Tensors lie on the CPU, so their allocation and their small sums count as the CPU's, and the
driver's part of a launch is missing: for the difference that a change makes, not for a GPU's time.
Least and median of series of processor time."""

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.training.model import ULTRA, model_config, random_batch, vocabulary
from kernels import backend
from kernels.jagged import op as jagged
from kernels.jagged import triton_kernels as jagged_kernels
from kernels.layer_norm import triton_kernels as norm_kernels
from kernels.linear import triton_kernels as linear_kernels
from kernels.linear import triton_launch as linear
from kernels.norm_gate import triton_kernels as gate_kernels
from kernels.position_time import triton_kernels as place_kernels
from kernels.rowwise_adamw import op as rowwise_adamw
from kernels.rowwise_adamw import triton_kernels as adamw_kernels
from kernels.semi_local_attention import op as attention
from kernels.semi_local_attention import triton_kernels as attention_kernels
from kernels.semi_local_attention import triton_launch, triton_tiles
from kernels.stu import op as stu
from kernels.stu.recompute import RECOMPUTABLE
from kernels.stu.types import Sequences, STUShape, STUWeights
from pipeline.train.trainee import Trainee

KERNELS = (
    *(attention_kernels, triton_tiles, norm_kernels, gate_kernels, linear_kernels, place_kernels),
    *(adamw_kernels, jagged_kernels),
)
VIEWS = {  # calls that launch nothing on a GPU
    *(
        "view",
        "slice",
        "select",
        "t",
        "transpose",
        "expand",
        "unsqueeze",
        "squeeze",
        "as_strided",
        "alias",
        "permute",
    ),
    *(
        "split",
        "split_with_sizes",
        "unbind",
        "_unsafe_view",
        "unflatten",
        "detach",
        "_indices",
        "_values",
        "_nnz",
    ),
    *(
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "_sparse_coo_tensor_with_dims_and_tensors",
        "promote_types",
    ),
}


class Nothing:
    """In a kernel's place, compiled or not."""

    def __init__(self, name: str, arg_names: list[str], launches: Counter) -> None:
        self.name, self.arg_names, self.launches = name, arg_names, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., "Nothing"]:
        return self.run

    def run(self, *_: object, **__: object) -> "Nothing":
        self.launches[self.name] += 1
        return self


def without_kernels() -> Counter:
    """Every kernel does nothing, and counts; the host acts as before a Hopper GPU."""
    launches: Counter = Counter()
    for module in KERNELS:
        for name, kernel in list(vars(module).items()):
            if isinstance(kernel, triton.runtime.jit.JITFunction):
                setattr(module, name, Nothing(name, kernel.arg_names, launches))
    chosen = backend.choose_backend
    for op in (stu, jagged, rowwise_adamw):
        op.choose_backend = lambda name, x: "triton" if name == "auto" else chosen(name, x)
    backend.INTERPRETED = True
    triton_launch._is_hopper = lambda device: True
    linear._capability = lambda device: (9, 0)
    attention._check_lengths = lambda *_: None  # of CPUs alone
    return launches


def microseconds(
    call: Callable[[], object], calls: int = 30, series: int = 15
) -> tuple[float, float]:
    for _ in range(10):
        call()
    gc.disable()
    spent = []
    for _ in range(series):
        begin = time.process_time()
        for _ in range(calls):
            call()
        spent.append((time.process_time() - begin) / calls * 1e6)
    gc.enable()
    return min(spent), statistics.median(spent)


def calls_of_a_layer() -> dict[str, Callable[[], object]]:
    tokens, heads, width = 24, 4, 16
    half: dict[str, Any] = {"dtype": torch.bfloat16}
    q, k, v = (torch.randn(tokens, heads, width, **half, requires_grad=True) for _ in range(3))
    offsets, grad, few = (
        torch.tensor([0, 14, tokens]),
        torch.randn(tokens, heads, width, **half),
        torch.zeros(8),
    )
    mask = {"max_seq_len": 14, "window": 4, "full_rows": 3}
    scale = {"attn_alpha": 0.1, "scaling_seq_len": 64}
    shape = STUShape(
        num_heads=heads,
        d_qk=width,
        d_v=width,
        norm_eps=1e-6,
        window=4,
        full_rows=3,
        prefix=0,
        recompute=RECOMPUTABLE,
        **scale,
    )
    d, all_heads = 64, heads * width
    sizes = [
        (d,),
        (d,),
        (sum(shape.uvqk_widths), d),
        (sum(shape.uvqk_widths),),
        (all_heads,),
        (all_heads,),
        (d, all_heads),
        (d,),
    ]
    weights = STUWeights(*(torch.nn.Parameter(torch.randn(size, **half)) for size in sizes))
    x, rows = torch.randn(tokens, d, **half, requires_grad=True), Sequences(offsets, 14)

    def attend() -> torch.Tensor:
        return attention.semi_local_attention(q, k, v, offsets, **mask, **scale, backend="triton")

    def layer() -> torch.Tensor:
        return stu.stu_layer(x, weights, shape, rows, backend="triton")

    attended, out = attend(), layer()
    return {
        "an in-place add_ of 8 numbers": lambda: few.add_(1),
        "attention, no grad": attend,
        "attention": attend,
        "attention backward, 2 launches": lambda: torch.autograd.grad(
            attended, (q, k, v), grad, retain_graph=True
        ),
        "layer, no grad, 5 launches": layer,
        "layer, 5 launches": layer,
        "layer backward": lambda: torch.autograd.grad(
            out, [x, *weights], x.detach(), retain_graph=True
        ),
    }


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.calls[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def count_step(token_backend: str, launches: Counter) -> tuple[int, Counter]:
    """Launches of ours in a step of 12 layers, and PyTorch's calls that are no views."""
    settings = {
        **ULTRA,
        "dropout": 0.1,
        "recompute": list(RECOMPUTABLE),
        "token_backend": token_backend,
    }
    cfg = model_config(settings, layers=12, heads=4, width=16)
    batch = random_batch(cfg, events=256, length=128, candidates=8, seed=0)
    trainee = Trainee(cfg, vocabulary(cfg), "cpu", rank=0, world_size=1)
    for step in range(2):
        trainee.step(batch, step, 100)
    launches.clear()
    with Counting() as counting:
        trainee.step(batch, 2, 100)
    return sum(launches.values()), Counter(
        {n: c for n, c in counting.calls.items() if n not in VIEWS}
    )


def main() -> None:
    torch.set_num_threads(1)
    launches = without_kernels()
    print(f"{'µs a call':36}{'least':>8}{'median':>8}")
    for name, call in calls_of_a_layer().items():
        with torch.set_grad_enabled("no grad" not in name):
            least, median = microseconds(call)
        print(f"{name:36}{least:8.1f}{median:8.1f}")
    for token_backend in ("torch", "triton"):
        ours, others = count_step(token_backend, launches)
        shown = ", ".join(f"{name} {count}" for name, count in others.most_common(8))
        print(f"a step of 12 layers, token_backend {token_backend}: {ours} launches of ours,")
        print(f"    {others.total()} calls of PyTorch ({shown}, ...)")


if __name__ == "__main__":
    main()
