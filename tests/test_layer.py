"""The kernels of the STU layer without a GPU: numbers from the interpreter in float32 on tiny
tiles, and from the compiler that they build for Hopper and Ampere within the machine's limits. FP8
as a CPU emulates it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.layer_norm.reference import quantize_rows_reference, through_fp8
from kernels.layer_norm.triton_launch import launch_layer_norm, launch_quantize
from kernels.linear import triton_launch as linear
from kernels.linear.reference import linear_reference
from kernels.linear.triton_launch import LinearTile, launch_linear
from kernels.linear.weights import cast_weight, folded_linear
from kernels.norm_gate.reference import dropout_mask, norm_gate_reference
from kernels.norm_gate.triton_launch import launch_norm_gate
from kernels.semi_local_attention import tile_table
from kernels.semi_local_attention.op import cached_attention
from kernels.semi_local_attention.types import QueryRows
from kernels.stu import op
from kernels.stu.op import stu_layer
from kernels.stu.recompute import RECOMPUTABLE
from kernels.stu.row_launch import _put_rows
from kernels.stu.types import Sequences, STUShape, STUWeights
from tests.support.accuracy import assert_as_accurate

SMALL = STUShape(
    num_heads=2,
    d_qk=8,
    d_v=16,
    norm_eps=1e-6,
    attn_alpha=0.5,
    scaling_seq_len=4,
    window=4,
    full_rows=3,
    prefix=1,
)
TILE = LinearTile(16, 32, 16, 4, 1, parts=2, per_sm=1, tma_out=True)
CASES = {  # shape, dropout
    "nothing kept, odd widths": (replace(SMALL, recompute=RECOMPUTABLE), 0.0),
    "all kept": (SMALL, 0.0),
    "wide, dropout": (replace(SMALL, d_qk=16, concat_ua=True, recompute=("uvqk",)), 0.3),
    "linear q, k, v of odd widths": (replace(SMALL, d_v=12, silu_qkv=False, recompute=("y",)), 0.3),
    "wide, linear, causal": (
        replace(SMALL, concat_ua=True, silu_qkv=False, window=None, recompute=("normed_x",)),
        0.3,
    ),
}


@pytest.fixture
def interpreted(monkeypatch):
    """Small tiles."""
    monkeypatch.setattr(
        tile_table, "tile_sizes", lambda *_, **__: tile_table.AttentionTile(16, 16, 4, 1)
    )
    monkeypatch.setattr(tile_table, "SPLIT_PROGRAMS", 4)  # fewer for the interpreter
    monkeypatch.setattr(linear, "tile_size", lambda **_: TILE)
    # new tensors start as NaN, so that what is not written shows
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_layer(shape: STUShape, width: int = 20) -> tuple[Tensor, list[Tensor], Tensor]:
    """x, weights and a gradient in float64, of values that float32 holds."""
    torch.manual_seed(0)
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
    weights = [torch.randn(size) * (size[-1] ** -0.5 if len(size) > 1 else 0.3) for size in sizes]
    weights[0], weights[4] = weights[0] + 1, weights[4] + 1
    x, grad = torch.randn(32, width), torch.randn(32, width)
    return x.double(), [w.double() for w in weights], grad.double()


SEQUENCES = Sequences(torch.tensor([0, 23, 23, 32]), 23, torch.tensor([3, 0, 9], dtype=torch.int32))


def run(
    shape: STUShape, p: float, dtype: torch.dtype, backend: Backend = "reference"
) -> list[Tensor]:
    """Output and all gradients."""
    x, weights, grad = make_layer(shape)
    leaves = [t.to(dtype).requires_grad_() for t in (x.clone(), *(w.clone() for w in weights))]

    def layer() -> Tensor:
        return op.stu_layer(
            leaves[0], STUWeights(*leaves[1:]), shape, SEQUENCES, p=p, seed=77, backend=backend
        )

    out = layer()
    with torch.no_grad():  # inference goes another way
        assert torch.equal(layer(), out)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", CASES)
def test_interpreted_layer_equals_the_reference_in_outputs_and_gradients(name):
    shape, p = CASES[name]
    truth, plain = run(shape, p, torch.float64), run(shape, p, torch.float32)
    fast = run(shape, p, torch.float32, backend="triton")
    assert_as_accurate(fast, plain, truth, num_terms=32)  # rows of the batch


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", CASES)
def test_interpreted_frozen_layer_equals_the_reference(name):
    """Its norm is folded into f1. Rows with a mean, which the folded weights must not see."""
    shape, _ = CASES[name]
    x, weights, _ = make_layer(shape)
    x = (x + 5).float().double()
    index = torch.tensor([20, 22, 30])
    rows = QueryRows(index, torch.searchsorted(index, SEQUENCES.seq_offsets))

    def run(dtype: torch.dtype, backend: Backend) -> list[Tensor]:
        of = STUWeights(*(w.to(dtype) for w in weights))
        with torch.no_grad():
            out = op.stu_layer(x.to(dtype), of, shape, SEQUENCES, backend=backend)
            asked = out[index]
            if backend == "triton":
                given = x.to(dtype), of, shape, SEQUENCES, rows
                asked = op.stu_layer_rows(*given, backend=backend)
            _, *qkv = op.project_uvqk(x.to(dtype), of, shape, backend=backend)
        return [out, asked, *qkv]

    truth, plain = run(torch.float64, "reference"), run(torch.float32, "reference")
    assert_as_accurate(run(torch.float32, "triton"), plain, truth, num_terms=32)


def test_a_folded_norm_leaves_out_the_mean_of_rows():
    """In bfloat16, beside normalised rows that are rounded: means of 0 and of 30 deviations."""
    torch.manual_seed(0)
    x, w = torch.randn(100, 512), torch.randn(200, 512) * 512**-0.5
    bias, gain, offset = torch.randn(200), torch.randn(512), torch.randn(512)
    folded = folded_linear(w, bias, gain, offset, torch.bfloat16)
    assert folded is not None
    assert folded.weight.double().sum(1).abs().max() < 1e-6
    ulps = folded.weight.double().abs() * 2**-7 + 1e-6
    centred = (w * gain).double() - (w * gain).double().mean(1, keepdim=True)
    assert ((folded.weight.double() - centred).abs() <= 8 * ulps).all()

    for mean in (0, 30):
        rounded = (x + mean).bfloat16().double()
        scale = 1 / (rounded.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
        found = (rounded @ folded.weight.double().T) * scale + folded.bias

        def normed(of: Tensor) -> Tensor:
            return torch.nn.functional.layer_norm(of, (512,), gain.to(of), offset.to(of), 1e-6)

        truth = normed(rounded) @ w.double().T + bias
        plain = normed(rounded).bfloat16().double() @ w.bfloat16().double().T + bias
        assert (found - truth).norm() < 1.2 * (plain - truth).norm()


def test_norms_of_trained_weights_are_not_folded():
    """A map of weights that change would have to be made at each call."""
    w, vectors = torch.randn(8, 4), [torch.randn(8), torch.randn(4), torch.randn(4)]
    first = folded_linear(w, *vectors, torch.float32)
    assert folded_linear(w, *vectors, torch.float32) is first
    vectors[2].add_(1)  # the norm's bias
    changed = folded_linear(w, *vectors, torch.float32)
    assert first is not None and changed is not None
    torch.testing.assert_close(changed.bias - first.bias, w.sum(1))
    for trained in (w, *vectors):
        trained.requires_grad_()
        assert folded_linear(w, *vectors, torch.float32) is None
        trained.requires_grad_(False)


def test_a_in_float32_keeps_what_its_mean_would_hide():
    """Rows that see 100 keys and more of values above 0: A's mean is far above its spread, of which
    rounding to bfloat16 takes the last bits before Norm(A) takes the mean away.
    """
    torch.manual_seed(0)
    rows = Sequences(torch.tensor([0, 200]), 200)
    shape = replace(SMALL, window=None)
    heads = 200, shape.num_heads
    q, k, v = (torch.rand(*heads, d).bfloat16() for d in (shape.d_qk, shape.d_qk, shape.d_v))

    def normed(a: Tensor) -> Tensor:
        a = a.flatten(1).double()[100:]
        return torch.nn.functional.layer_norm(a, a.shape[1:], eps=1e-9)

    truth = op.attend_rows(q.double(), k.double(), v.double(), shape, rows, backend="reference")
    rounded = op.attend_rows(q, k, v, shape, rows)
    whole = op.attend_rows(q, k, v, replace(shape, norm_a_fp32=True), rows)
    assert (rounded.dtype, whole.dtype) == (torch.bfloat16, torch.float32)
    error = [(normed(a) - normed(truth)).pow(2).mean().sqrt() for a in (rounded, whole)]
    assert error[1] < error[0] / 8

    # the last row over the others kept: a server's way to the same
    own = q[-1:], k[-1:], v[-1:]
    offsets = torch.tensor([0, 1]), torch.tensor([0, 199])
    scale = {"attn_alpha": shape.attn_alpha, "scaling_seq_len": shape.scaling_seq_len}
    cached = cached_attention(
        *own, offsets[0], k[:-1], v[:-1], offsets[1], out_dtype=torch.float32, **scale
    )
    assert cached.dtype == torch.float32
    assert torch.allclose(cached, whole[-1:], rtol=1e-5)


@pytest.mark.usefixtures("interpreted")
def test_interpreted_layer_in_half_precision_reads_a_in_float32():
    """float16, since the interpreter's bfloat16 is none."""
    shape = replace(SMALL, norm_a_fp32=True, recompute=RECOMPUTABLE)
    truth = run(shape, 0.0, torch.float64)
    plain, fast = (run(shape, 0.0, torch.float16, kind) for kind in ("reference", "triton"))
    assert_as_accurate(fast, plain, truth, num_terms=32)


@pytest.mark.usefixtures("interpreted")
def test_what_is_made_again_changes_no_bit():
    kept = run(SMALL, 0.3, torch.float32, backend="triton")
    again = run(replace(SMALL, recompute=RECOMPUTABLE), 0.3, torch.float32, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.parametrize(
    ("tile", "silu_from"), [(LinearTile(16, 32, 16, 4, 1), 13), (TILE, 13), (TILE, 32)]
)
def test_interpreted_linear(monkeypatch, rows, tile, silu_from):
    """By pointers, and by descriptors as on Hopper."""
    x, w, bias, residual = (
        torch.randn(rows, 24),
        torch.randn(56, 24),
        torch.randn(56),
        torch.randn(rows, 56),
    )
    (codes, scale), (w_codes, w_scale) = quantize_rows_reference(x), quantize_rows_reference(w)
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(linear, "_capability", lambda _, found=capability: found)
        out, slope = launch_linear(x, w, bias, silu_from=silu_from, keep_slope=True, tile=tile)
        torch.testing.assert_close(out, linear_reference(x, w, bias, silu_from=silu_from))
        assert slope is not None
        before = linear_reference(x, w, bias)[:, silu_from:].requires_grad_()
        (expected,) = torch.autograd.grad(torch.nn.functional.silu(before).sum(), before)
        torch.testing.assert_close(slope, expected)
        out, _ = launch_linear(x, w, bias, residual=residual, tile=tile)
        torch.testing.assert_close(out, linear_reference(x, w, bias, residual=residual))
        out, _ = launch_linear(x, w, bias, silu_from=silu_from, scales=(scale, None), tile=tile)
        scaled = linear_reference(x * scale[:, None], w, bias, silu_from=silu_from)
        torch.testing.assert_close(out, scaled)
        out, _ = launch_linear(
            codes, w_codes, bias, scales=(scale, w_scale), dtype=torch.float32, tile=tile
        )
        expected = (codes.float() * scale[:, None]) @ (w_codes.float() * w_scale[:, None]).T + bias
        torch.testing.assert_close(out, expected)


def assert_quantized(codes: Tensor | None, scale: Tensor | None, truth: Tensor) -> None:
    """The interpreter loses the carry where rounding moves a number to the next power of two: 2 %
    of random ones.
    """
    assert codes is not None and scale is not None
    expected, expected_scale = quantize_rows_reference(truth)
    torch.testing.assert_close(scale, expected_scale)
    assert (codes.float() == expected.float()).float().mean() > 0.95


def test_interpreted_norms_quantize():
    torch.manual_seed(0)
    x, u, w, bias = torch.randn(37, 24) * 3, torch.randn(37, 24), torch.randn(24), torch.randn(24)
    x[5] = 0
    assert_quantized(*launch_quantize(x), x)
    normed, codes, scale = launch_layer_norm(x, w, bias, 1e-6, torch.float32, fp8=True)
    expected = torch.nn.functional.layer_norm(x, (24,), w, bias, 1e-6)
    torch.testing.assert_close(normed, expected)
    assert_quantized(codes, scale, expected)
    for concat in (False, True):
        options = {"eps": 1e-6, "concat_ua": concat, "p": 0.25, "seed": 5}
        expected = norm_gate_reference(x, u, w, bias, **options)
        given = options | {"seed": torch.tensor([5])}
        gated, codes, scale = launch_norm_gate(x, u, w, bias, **given, fp8=True)
        torch.testing.assert_close(gated, expected)
        assert_quantized(codes, scale, expected)


def test_dropout_masks_are_even_and_independent():
    masks = [
        dropout_mask(seed, 2000, 64, 0.25, torch.device("cpu")).float()
        for seed in (0, 1, 2**31 - 1)
    ]
    for mask in masks:
        assert abs(mask.mean() - 0.75) < 0.004
        assert (mask.mean(0) - 0.75).abs().max() < 0.05
        together = torch.corrcoef(mask.T) - torch.eye(64)
        assert together.abs().max() < 0.1
        assert (
            abs(torch.corrcoef(torch.stack([mask[1:].flatten(), mask[:-1].flatten()]))[0, 1]) < 0.01
        )
    assert torch.corrcoef(torch.stack([m.flatten() for m in masks])).triu(1).abs().max() < 0.01


def test_fp8_rounds_forward_and_not_backward():
    torch.manual_seed(0)
    x, w, bias, grad = torch.randn(9, 40), torch.randn(30, 40), torch.randn(30), torch.randn(9, 30)
    x[3] = 0
    leaves = [t.clone().requires_grad_() for t in (x, w, bias)]
    out = linear_reference(*leaves, fp8=True)
    torch.testing.assert_close(out, through_fp8(x) @ through_fp8(w).T + bias)
    error = (out - linear_reference(x, w, bias)).norm() / out.norm()
    assert 0.01 < error < 0.05  # three bits of mantissa
    grads = torch.autograd.grad(out, leaves, grad)
    for got, expected in zip(grads, (grad @ w, grad.T @ x, grad.sum(0)), strict=True):
        torch.testing.assert_close(got, expected)


def test_fp8_trains_under_autocast():
    x, weights, grad = make_layer(replace(SMALL, fp8=True))
    leaves = [t.float().requires_grad_() for t in (x, *weights)]
    with torch.autocast("cpu", torch.bfloat16):
        out = stu_layer(
            leaves[0], STUWeights(*leaves[1:]), replace(SMALL, fp8=True), SEQUENCES, p=0.1
        )
    grads = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads)


def test_fp8_scales_each_row():
    """A row a thousand times as large as its neighbour keeps its neighbour's digits."""
    x = torch.randn(2, 64) * torch.tensor([[1.0], [1000.0]])
    assert ((through_fp8(x) - x).norm(dim=1) / x.norm(dim=1)).max() < 0.04


def test_forms_of_frozen_weights_are_kept_until_they_change():
    layer = torch.nn.Linear(8, 8)
    layer(torch.randn(4, 8)).sum().backward()
    before = cast_weight(layer.weight, torch.bfloat16)
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()
    assert not torch.equal(cast_weight(layer.weight, torch.bfloat16), before)
    layer.requires_grad_(False)
    first = cast_weight(layer.weight, torch.bfloat16)
    assert cast_weight(layer.weight, torch.bfloat16) is first
    layer.load_state_dict({name: w + 1 for name, w in layer.state_dict().items()})
    assert torch.equal(cast_weight(layer.weight, torch.bfloat16), layer.weight.bfloat16())
    assert not torch.equal(layer.weight.bfloat16(), first)


def test_weights_that_outlive_their_module_go_in_silence():
    """Python ends: names of modules are None before what a form is made of goes."""
    script = """
import torch
from kernels.linear import weights

weight, bias = torch.randn(2, 2), torch.randn(2)
weights.frozen_form(weight, "sum", lambda: weight.sum() + bias.sum(), (bias,))
weights.cast_weight(bias, torch.bfloat16)
del bias
for name in list(vars(weights)):
    setattr(weights, name, None)
"""
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_layer_names_the_weight_that_does_not_fit():
    x, weights, _ = make_layer(SMALL)
    weights[2] = weights[2][1:]
    with pytest.raises(ValueError, match=r"uvqk_weight must be \(96, 20\), got \(95, 20\)"):
        stu_layer(x, STUWeights(*weights), SMALL, SEQUENCES)


@pytest.fixture(scope="module")
def builds():
    """Kernels compiled in a process that does not interpret them: name → what the compiler says."""
    script = Path(__file__).parent / "support" / "compile_layer.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_builds_use_tensor_cores_and_do_not_spill(builds):
    assert len(builds) >= 10
    for name, build in builds.items():
        if "linear" in name:
            hopper = name.startswith("sm_90")
            assert build["wgmma" if hopper else "mma"] > 0, name
            assert (build["bulk_copies"] > 0) == hopper, name
            assert build["shared"] <= (227 if hopper else 163) * 1024, name
        assert build["stack"] <= 256, f"{name}: spills"
        if name.endswith(("backward 512", "weights 512")):
            assert build["stack"] == 0, f"{name}: spills"
            assert build["shared"] <= 28 * 1024, f"{name}: 8 programs must fit on a multiprocessor"
        assert build["atomics"] == 0, f"{name}: sums would depend on timing"
        if name.endswith("sum_runs"):
            assert build["mma"] > 0, name


@pytest.mark.parametrize("kind", ["layer_norm forward", "norm_gate"])
def test_rows_made_again_are_added_in_the_same_order(builds, kind):
    """With codes beside them or without, in forward or again in backward: else recompute would
    change bits.
    """
    found = {name: build["row_sums"] for name, build in builds.items() if kind in name}
    assert len(found) >= 3
    assert len({layout for layouts in found.values() for layout in layouts}) == 1, found


@pytest.mark.parametrize("width", [8, 6])
@pytest.mark.parametrize("begin", [0, 4, 1])
def test_rows_are_put_to_their_places_whatever_their_width(width: int, begin: int) -> None:
    """As words of 8 bytes where they lie on such, as the 16 bits that they are elsewhere."""
    rows = torch.randn(3, 16, dtype=torch.bfloat16)[:, begin : begin + width]
    out = torch.zeros(9, width, dtype=torch.bfloat16)
    index = torch.tensor([7, 0, 4])
    expected = out.index_copy(0, index, rows)
    _put_rows(out, index, rows)
    assert torch.equal(out, expected)
