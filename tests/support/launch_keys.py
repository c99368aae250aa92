"""What Triton would compile over random batches, without a GPU and without launching: prints, as
JSON, the number of forms of each kernel after some batches and after all. Not under
TRITON_INTERPRET.

    python tests/support/launch_keys.py 200 2000
"""

import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

sys.path.insert(0, str(Path(__file__).parents[2]))

from kernels.full_softmax import triton_launch as full_softmax
from kernels.int4_embedding.triton_launch import look_up_triton
from kernels.jagged import triton_launch as jagged
from kernels.layer_norm import triton_launch as layer_norm
from kernels.linear.triton_launch import launch_linear
from kernels.norm_gate import triton_launch as norm_gate
from kernels.position_time import triton_launch as position_time
from kernels.rowwise_adamw.triton_launch import rowwise_adamw_triton
from kernels.rowwise_adamw.types import Hyper
from kernels.sampled_softmax import half_launch
from kernels.sampled_softmax import triton_launch as sampled_softmax
from kernels.semi_local_attention import triton_launch as attention
from kernels.semi_local_attention.plan import TritonPlan
from kernels.semi_local_attention.triton_autograd import (
    cached_attention_triton,
    semi_local_attention_triton,
)
from kernels.semi_local_attention.types import RelativeBias

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
WIDTH, HEADS = 128, 2
binders: dict[Any, Any] = {}
forms: dict[str, set] = defaultdict(set)


def note_form(self: jit.JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """In the place of a launch: the key under which Triton would look for its code."""
    if self not in binders:
        binders[self] = jit.create_function_from_signature(self.signature, self.params, BACKEND)
    _, specialisation, chosen = binders[self](
        *args, debug=False, instrumentation_mode="", **options
    )
    forms[self.fn.__name__].add((tuple(specialisation), str(chosen)))


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype)


def attend(draw: random.Random, rows: int, sequences: int, longest: int) -> None:
    """Forward and backward of the model's layers and of a baseline; cached attention."""
    offsets, targets = empty(sequences + 1, dtype=torch.int64), empty(sequences, dtype=torch.int32)
    visible = empty(rows, dtype=torch.int32)
    q, k, v = (empty(rows, HEADS, WIDTH).requires_grad_() for _ in range(3))
    scale = {"attn_alpha": 0.1, "scaling_seq_len": 64}

    for mask in ((256, 256, 2), (None, 0, 0)):
        plan = TritonPlan(offsets, targets, visible, rows, longest, *mask)
        out = semi_local_attention_triton(q, k, v, plan, bias=None, **scale)
        out.backward(empty(*out.shape))

    num_new = draw.randint(1, 600)
    new = [empty(num_new, HEADS, WIDTH) for _ in range(3)]
    plan = TritonPlan(offsets, offsets, None, num_new, rows, None, 0, 0, cached=True)
    cached_attention_triton(*new, k.detach(), v.detach(), plan, **scale)


def attend_with_bias(rows: int, sequences: int, longest: int) -> None:
    """The same of a baseline with a relative bias."""
    offsets, targets = empty(sequences + 1, dtype=torch.int64), empty(sequences, dtype=torch.int32)
    q, k, v = (empty(rows, HEADS, WIDTH).requires_grad_() for _ in range(3))
    tables = (empty(n, dtype=torch.float32).requires_grad_() for n in (100, 129))
    bias = RelativeBias(*tables, empty(rows, dtype=torch.int64))
    plan = TritonPlan(offsets, targets, None, rows, longest, None, 0, 0)
    scale = {"attn_alpha": 0.1, "scaling_seq_len": 64}
    out = semi_local_attention_triton(q, k, v, plan, bias=bias, **scale)
    out.backward(empty(*out.shape))


def other_layers(draw: random.Random, rows: int, sequences: int) -> None:
    """Norms, gate and products of a layer, and what goes before the layers."""
    x, weight = empty(rows, WIDTH), empty(WIDTH, dtype=torch.float32)
    layer_norm.launch_layer_norm(x, weight, weight, 1e-6, x.dtype)
    layer_norm.launch_layer_norm_backward(x, x, x, weight, 1e-6)
    launch_linear(x, empty(4 * WIDTH, WIDTH), empty(4 * WIDTH), silu_from=WIDTH, keep_slope=True)
    launch_linear(x, empty(WIDTH, WIDTH), weight, residual=x)
    scale = layer_norm.launch_row_scales(x, 1e-6)
    launch_linear(x, empty(4 * WIDTH, WIDTH), empty(4 * WIDTH), scales=(scale, None))

    options = {"eps": 1e-6, "concat_ua": False, "p": 0.1, "seed": empty(1, dtype=torch.int64)}
    norm_gate.launch_norm_gate(x, x, weight, weight, **options)
    du = empty(rows, WIDTH)
    norm_gate.launch_norm_gate_backward(x, x, x, weight, weight, du, out=True, **options)

    position, gap = (torch.zeros(rows, dtype=torch.int64) for _ in range(2))
    tables = empty(512, WIDTH, dtype=torch.float32), empty(64, WIDTH, dtype=torch.float32)
    found = position_time.find_rows(position, gap, None, (512, 64), "event")
    position_time.launch_add(x, tables, found)
    found.keys.zero_()
    position_time.launch_table_gradients(x, found)

    offsets = empty(sequences + 1, dtype=torch.int64)
    jagged.Concatenate.apply(empty(2 * sequences, WIDTH), x, offsets, offsets)
    kept = draw.randint(1, rows)
    jagged.TruncateTail.apply(x, offsets, offsets, 2, kept)


def tables(draw: random.Random, rows: int) -> None:
    """Look-ups, the optimizer's rows, the softmax over drawn items and over all."""
    ids = torch.zeros(rows, dtype=torch.int64)
    look_up_triton(empty(1000, 17, dtype=torch.int32), ids, WIDTH, torch.bfloat16)

    weight = empty(1000, WIDTH, dtype=torch.float32)
    hyper = Hyper(
        lr=draw.random(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, step=draw.randint(1, 9999)
    )
    scale, moment = torch.ones(()), empty(1000, dtype=torch.float32)
    rowwise_adamw_triton(weight, weight, moment, ids, empty(rows, WIDTH), scale, hyper)

    users = empty(rows, WIDTH)
    negatives = torch.zeros(rows, draw.randint(1, 20), dtype=torch.int64)
    loss, lse, _ = sampled_softmax.forward(users, weight, ids, negatives, 0.05)
    share = torch.ones(rows)
    sampled_softmax.item_gradients(
        users, weight, ids, negatives, loss.zero_(), lse.zero_(), share, 0.05
    )
    # their number is compiled in: a run has one
    negatives = torch.zeros(rows, 8, dtype=torch.int64)
    loss, lse, _ = half_launch.forward(users, weight, ids, negatives, 0.05)
    half_launch.item_gradients(
        users, weight, ids, negatives, loss.zero_(), lse.zero_(), share, 0.05
    )

    wide = empty(rows, WIDTH, dtype=torch.float32)
    halves = full_softmax.half_rows(wide), full_softmax.half_rows(weight)
    sizes = len(weight), WIDTH
    lse, _ = full_softmax.log_partition(*halves, rows, *sizes, with_mean=True)
    full_softmax.item_gradients(*halves, lse, lse, *sizes)


def main() -> None:
    torch.set_num_threads(1)
    jit.JITFunction.run = note_form  # type: ignore[method-assign]
    attention._is_hopper = lambda device: True  # type: ignore[assignment]
    counts = [int(count) for count in sys.argv[1:]]
    draw = random.Random(0)

    found = []
    for number in range(counts[-1]):
        # both length classes of the tile table, and sizes that are 1 or a multiple of 16, early
        sequences = (1, 16, 7)[number] if number < 3 else draw.randint(1, 64)
        longest = (700, 2000)[number % 2] if number < 8 else draw.randint(1, 2000)
        rows = draw.randint(longest, max(longest, min(sequences * longest, 3000)))
        attend(draw, rows, sequences, longest)
        if number < 8 or number % 8 == 0:  # some of the batches: these kernels have few forms
            attend_with_bias(rows, sequences, longest)
            other_layers(draw, rows, sequences)
            tables(draw, min(rows, 300))
        if number + 1 in counts:
            found.append({name: len(of_kernel) for name, of_kernel in sorted(forms.items())})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
