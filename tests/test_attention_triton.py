"""The Triton kernels of semi-local attention without a GPU: numbers from the interpreter in float32
on tiny tiles, and from the compiler that they build for Hopper and Ampere, on the tensor cores,
within the machine's limits."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from benchmarks import gpu
from kernels import launch
from kernels.semi_local_attention import (
    tile_table,
    triton_bias_inputs,
    triton_kernels,
    triton_launch,
)
from kernels.semi_local_attention.op import cached_attention
from kernels.semi_local_attention.plan import ENTRY, TritonPlan
from kernels.semi_local_attention.tile_table import AttentionTile
from kernels.semi_local_attention.triton_autograd import (
    cached_attention_triton,
    semi_local_attention_triton,
)
from kernels.semi_local_attention.triton_tiles import KEY_PARTS, ROW_PARTS
from kernels.semi_local_attention.types import RelativeBias, time_bucket
from tests.test_attention import (
    make_inputs,
    run,
    some_bias,
    some_extra,
    some_oldest,
    some_visible,
)

CASES = {  # lengths, candidates, mask, visible lengths, bias, (d_qk, d_v)
    "causal, odd widths": ([23, 0, 30], None, {}, False, False, (25, 9)),
    "semi-local, full rows in parts": (
        [70, 9],
        None,
        {"window": 10, "full_rows": 8},
        False,
        False,
        (16, 16),
    ),
    "prefix in parts": (
        [50, 0, 19],
        [12, 0, 2],
        {"window": 3, "full_rows": 2, "prefix": 20},
        True,
        False,
        (8, 16),
    ),
    "all candidates": ([19, 1], [19, 1], {"window": 4, "full_rows": 4}, False, False, (16, 16)),
    "numbers near 2**31": (
        [20, 9],
        [3, 0],
        {"window": 2**31 - 1, "full_rows": 2**31 - 1, "prefix": 2**31 - 1},
        False,
        False,
        (16, 16),
    ),
    "bias": ([41, 7], [10, 2], {"window": 12, "full_rows": 5, "prefix": 2}, True, True, (16, 16)),
    "bias, causal": ([37], None, {}, False, True, (16, 16)),
    "from": ([0, 30, 45], [0, 1, 5], {"window": 5, "full_rows": 2}, "from", False, (8, 16)),
    "from, prefix in parts": (
        [44, 19],
        [18, 19],
        {"window": 3, "full_rows": 0, "prefix": 18},
        "from",
        False,
        (8, 16),
    ),
    "from, causal and biased": ([35, 7], [17, 2], {"prefix": 2}, "from", True, (16, 16)),
}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tile_table, "tile_sizes", lambda *_, **__: AttentionTile(16, 16, 4, 1))
    monkeypatch.setattr(tile_table, "SPLIT_PROGRAMS", 8)
    monkeypatch.setattr(tile_table, "SHORTEST_PART", 1)
    monkeypatch.setattr(tile_table, "SHORTEST_KEY_PART", 1)
    # new tensors start as NaN, so that what is not written shows
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run_triton(tensors, plan, bias):
    leaves = [x.float().requires_grad_() for x in tensors[:3]]
    if bias is not None:
        tables = [x.float().requires_grad_() for x in (bias.position_table, bias.time_table)]
        bias = RelativeBias(*tables, bias.event_time_T, bias.query_time_T)
        leaves += tables
    scale = {"attn_alpha": 0.5, "scaling_seq_len": 7}
    out = semi_local_attention_triton(*leaves[:3], plan, bias=bias, **scale)
    out.backward(tensors[3].float())
    return [out.detach(), *(x.grad for x in leaves)]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_equal_the_reference(name):
    lengths, counts, mask, has_visible, has_bias, (d_qk, d_v) = CASES[name]
    tensors, offsets, num_targets = make_inputs(
        lengths, counts, d_qk=d_qk, d_v=d_v, heads=1 if has_bias else 2
    )
    visible = some_visible(lengths, counts) if has_visible else None
    more = {}
    if has_visible == "from":
        more = {"target_from": some_oldest(visible), "extra_full_rows": some_extra(lengths)}
    bias = some_bias(sum(lengths)) if has_bias else None
    options = {**mask, **more, "num_targets": num_targets, "target_visible": visible}
    truth = run(tensors, offsets, backend="reference", bias=bias, **options)
    sizes = mask.get("window"), mask.get("full_rows", 0), mask.get("prefix", 0)
    plan = TritonPlan(offsets, num_targets, visible, sum(lengths), max(lengths), *sizes, **more)
    for got, expected in zip(run_triton(tensors, plan, bias), truth, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    most_parts = 1
    for (keys, *_), tiles in plan.lists.items():
        entries = tiles.tiles.view(-1, ENTRY)[: int(tiles.header[0])]
        assert len(entries) <= tiles.capacity
        assert not tiles.workspace.arrived.any()  # ready for the next launch
        parts = (KEY_PARTS if keys else ROW_PARTS).value
        most_parts = max(most_parts, int(entries[:, parts].max()))
    assert most_parts > 1 or "in parts" not in name


@pytest.mark.usefixtures("small_tiles")
def test_own_rows_of_a_tile_are_held_to_its_end(monkeypatch):
    """Where a program masks its own rows results stay the same to the last bit."""
    lengths, counts = [70, 9], [11, 2]
    tensors, offsets, num_targets = make_inputs(lengths, counts, heads=1)
    found = []
    for held in (False, True):
        tile = AttentionTile(16, 16, 4, 1, held=held)
        monkeypatch.setattr(tile_table, "tile_sizes", lambda *_, tile=tile, **__: tile)
        plan = TritonPlan(offsets, num_targets, None, sum(lengths), max(lengths), 10, 8, 3)
        found.append(run_triton(tensors, plan, None))
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.usefixtures("small_tiles")
def test_tiles_of_many_short_sequences_stay_whole(monkeypatch):
    """Results differ by the order of their sums alone."""
    lengths, counts = [70, 9, 40], [11, 2, 0]
    tensors, offsets, num_targets = make_inputs(lengths, counts)
    monkeypatch.setattr(tile_table, "SPLIT_PROGRAMS", 100)
    found, parts = [], []
    for many in (4, 3):
        monkeypatch.setattr(tile_table, "MANY_SEQUENCES", many)
        plan = TritonPlan(offsets, num_targets, None, sum(lengths), max(lengths), 10, 8, 3)
        found.append(run_triton(tensors, plan, None))
        (tiles,) = [tiles for (keys, *_), tiles in plan.lists.items() if not keys]
        entries = tiles.tiles.view(-1, ENTRY)[: int(tiles.header[0])]
        parts.append(int(entries[:, ROW_PARTS.value].max()))

    assert parts[0] > 1
    assert parts[1] == 1
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_largest_numbers_of_three_tensors(dtype):
    """Of strided rows, of any sign, and a NaN counts as the largest."""
    grad, dq = torch.randn(37, 3, 8).to(dtype), torch.randn(37, 3, 16).to(dtype)
    v = torch.randn(37, 5, 8).to(dtype)[:, 1:4]
    expected = torch.stack([x.float().abs().max() for x in (grad, v, dq)])
    assert torch.equal(triton_bias_inputs.find_largest(grad, v, dq), expected)

    v[30, 2, 7] = torch.nan
    dq[36, 2, 15] = -torch.inf
    largest = triton_bias_inputs.find_largest(grad, v, dq)
    assert largest[0] == expected[0]
    assert largest[1].isnan()
    assert largest[2] == torch.inf


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("d_qk", "d_v"), [(16, 16), (20, 9)])
def test_interpreted_descriptors(monkeypatch, d_qk, d_v):
    """The bulk copy engine's path, as on Hopper, of q, k, v that are slices of one tensor."""
    monkeypatch.setattr(triton_launch, "_is_hopper", lambda device: True)
    lengths, counts = [40, 9], [7, 0]
    tensors, offsets, num_targets = make_inputs(lengths, counts, d_qk=d_qk, d_v=d_v)
    mask = {"window": 6, "full_rows": 3, "num_targets": num_targets}
    truth = run(tensors, offsets, backend="reference", **mask)
    plan = TritonPlan(offsets, num_targets, None, sum(lengths), max(lengths), 6, 3, 0)
    together = torch.cat([x.flatten(1) for x in tensors[:3]], 1).float().requires_grad_()
    parts = together.split([2 * d_qk, 2 * d_qk, 2 * d_v], 1)
    q, k, v = (x.unflatten(1, (2, -1)) for x in parts)
    for _ in range(2):  # a plan serves several layers
        together.grad = None
        scale = {"attn_alpha": 0.5, "scaling_seq_len": 7}
        out = semi_local_attention_triton(q, k, v, plan, bias=None, **scale)
        out.backward(tensors[3].float(), retain_graph=True)
        torch.testing.assert_close(out.double(), truth[0], rtol=1e-5, atol=1e-5)
        expected = torch.cat([x.flatten(1) for x in truth[1:]], 1)
        torch.testing.assert_close(together.grad.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["candidates", "visible"])
def test_interpreted_cached_attention(kind):
    rows, cache = torch.tensor([0, 20, 20, 25, 26]), torch.tensor([0, 50, 60, 60, 75])
    generator = torch.Generator().manual_seed(0)
    q, own_k, own_v = (torch.randn(26, 2, 8, generator=generator) for _ in range(3))
    k, v = (torch.randn(75, 2, 8, generator=generator) for _ in range(2))
    visible = torch.randint(0, 16, (26,), generator=generator).int() if kind == "visible" else None
    scale = {"attn_alpha": 0.5, "scaling_seq_len": 3}
    wide = [x.double() for x in (q, own_k, own_v)], [x.double() for x in (k, v)]
    truth = cached_attention(
        *wide[0],
        rows,
        *wide[1],
        cache,
        visible=visible,
        backend="reference",
        **scale,
    )
    plan = TritonPlan(cache, rows, visible, 26, 75, None, 0, 0, cached=True)
    got = cached_attention_triton(q, own_k, own_v, k, v, plan, **scale)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
def test_a_plan_goes_when_nothing_holds_it():
    """Its device memory must not wait for Python's collector: no reference may lead back to it."""
    tensors, offsets, num_targets = make_inputs([40, 9], [7, 0])
    plan = TritonPlan(offsets, num_targets, None, 49, 40, 6, 3, 0)
    gone = weakref.ref(plan)
    gc.disable()
    try:
        run_triton(tensors, plan, None)
        del plan
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("widths", "on_hopper", "elsewhere"),
    [
        ((50, 25), (64, 64), (64, 32)),
        ((25, 50), (64, 64), (32, 64)),
        ((128, 16), (128, 64), (128, 16)),
        ((64, 128), (64, 128), (64, 128)),
        ((20, 9), (32, 32), (32, 16)),
    ],
)
def test_narrow_heads_of_one_kernel_have_one_width(monkeypatch, widths, on_hopper, elsewhere):
    """Two layouts of rows in shared memory, as of 64 and 32 numbers, came out of ptxas wrong."""
    tensors, offsets, _ = make_inputs([40, 9], None, d_qk=widths[0], d_v=widths[1])
    operands = tuple(x.bfloat16() for x in tensors[:3])
    for hopper, expected in ((True, on_hopper), (False, elsewhere)):
        monkeypatch.setattr(triton_launch, "_is_hopper", lambda device, hopper=hopper: hopper)
        plan = TritonPlan(offsets, None, None, 49, 40, 6, 3, 0)
        problem, fit = triton_launch.find_problem(operands, plan, 0.5, 7)
        assert (problem.d_qk, problem.d_v) == expected
        assert [x.shape[2] for x in fit] == [expected[0], expected[0], expected[1]]
        assert not any(x[..., width:].any() for x, width in zip(fit[::2], widths, strict=True))


def test_tiles_of_long_sequences_are_cut_into_fewer_parts():
    programs = tile_table.split_programs
    assert programs(40) == programs(8192) > programs(8193) == programs(2**20)


def test_every_argument_of_a_kernel_is_named_once():
    """For each kernel, with and without a bias; a launch without its output is refused."""
    tensors, offsets, num_targets = make_inputs([40, 9], [7, 0])
    operands = tuple(x.float() for x in tensors)
    for tables in (None, (5, 4)):
        plan = TritonPlan(offsets, num_targets, None, 49, 40, 6, 3, 0)
        problem, fit = triton_launch.find_problem(operands[:3], plan, 0.5, 7, tables)
        prepared = problem.prepare(plan, "forward", fit)
        assert list(prepared.places) == triton_kernels.forward.arg_names
        with pytest.raises(AssertionError, match="out"):
            prepared.launch(fit)
        # a second layer of the same shape finds all of it
        assert triton_launch.find_problem(operands[:3], plan, 0.5, 7, tables)[0] is problem
        assert problem.prepare(plan, "forward", fit) is prepared


class CountedKernel:
    """In a kernel's place, compiled or not: counts what is compiled and what is launched."""

    arg_names: ClassVar = ["x", "num_rows", "width", "BLOCK"]

    def __init__(self):
        self.compiled, self.launched = 0, []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.compiled += bool(options)  # only Triton's own dispatch takes them
            self.launched.append((grid, arguments))
            return self

        return run


def test_launches_of_one_form_share_what_was_compiled(monkeypatch):
    monkeypatch.setattr(launch, "_compiled", {})
    kernel, x = CountedKernel(), torch.zeros(64)

    def call(x, num_rows, width):
        options = {"device": x.device, "num_warps": 4}
        launch.launch(kernel, 2, (x,), (num_rows,), (width,), (16,), **options)

    call(x, 5, 64)
    call(x, 7, 64)  # the number of rows varies
    assert kernel.compiled == 1
    assert kernel.launched[-1] == ((2, 1, 1), (x, 7, 64, 16))
    call(x, 7, 32)
    call(x[1:], 7, 32)  # no multiple of 16 bytes
    assert kernel.compiled == 3
    with pytest.raises(AssertionError, match="3 arguments"):
        launch.launch(kernel, 1, (x,), (5,), (64,), (), device=x.device, num_warps=4)


def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", entered.append)
    with launch.on_device(torch.device("cuda", 0)), launch.on_device(torch.device("cpu")):
        assert not entered
    launch.on_device(torch.device("cuda", 1))
    assert entered == [torch.device("cuda", 1)]


def test_plans_of_two_batches_share_what_was_compiled(monkeypatch):
    kernel = CountedKernel()
    kernel.arg_names = triton_kernels.forward.arg_names
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(triton_kernels, "forward", kernel)
    monkeypatch.setattr(triton_launch, "_is_hopper", lambda device: True)
    tensors, offsets, _ = make_inputs([40, 9], None)
    operands = tuple(x.float() for x in tensors[:3])
    for _ in range(2):
        plan = TritonPlan(offsets, None, None, 49, 40, 6, 3, 0)
        problem, fit = triton_launch.find_problem(operands, plan, 0.5, 7)
        for _ in range(2):
            triton_launch.launch_forward(plan, problem, fit)
    assert (kernel.compiled, len(kernel.launched)) == (1, 4)


def test_a_timing_is_a_median_with_its_interval():
    times = [5.0, 4.0, 1.0, 3.0, 2.0, 9.0, 7.0, 8.0, 6.0, 10.0]
    assert gpu._timing(times) == gpu.Timing(median=6.0, low=2.0, high=10.0)


def test_what_compiled_code_depends_on():
    form, x = launch.specialised_form, torch.zeros(64)
    assert form(7) == form(9)
    assert len({form(1), form(7), form(16), form(2**31)}) == 4
    assert form(x[1:]) != form(x)
    assert form(0.5) == form(7.0)
    with pytest.raises(AssertionError, match="SPLIT"):
        launch.constants_of(CountedKernel(), {"BLOCK": 4, "SPLIT": True})


def test_time_buckets_are_looked_up_without_a_logarithm():
    """Around every bucket's first second and every cell's, in both directions of time."""
    steps = triton_bias_inputs.time_steps(torch.device("cpu")).long()
    starts = (torch.arange(72, dtype=torch.float64) * 0.301).exp().ceil().long()
    cells = (torch.arange(508, 632, dtype=torch.int32) << 21).view(torch.float32).long()
    near = torch.cat([starts, cells])[:, None] + torch.arange(-70, 71)
    seconds = torch.cat([near.flatten(), torch.arange(5000)]).clamp(0, 2**31 - 1).to(torch.int32)
    seconds = torch.cat([seconds, -seconds])
    cell = (seconds.float().view(torch.int32) >> 21) & (triton_bias_inputs.CELLS - 1)
    step, both = steps[cell].unbind(1)
    assert torch.equal(
        torch.where(seconds >= step, both >> 16, both & 0xFFFF), time_bucket(seconds, 129)
    )


@pytest.fixture(scope="module")
def builds():
    """Kernels compiled in a process that does not interpret them: name → what the compiler says."""
    script = Path(__file__).parent / "support" / "compile_attention.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_hopper_builds_use_its_tensor_cores_and_copy_engine(builds):
    found = {name: build for name, build in builds.items() if name.startswith("sm_90")}
    assert len(found) >= 8
    for name, build in found.items():
        assert build["wgmma"] > 0, name
        assert build["bulk_copies"] > 0, name
        assert build["waits"] < build["wgmma"] / 2, f"{name}: its products wait for each other"
        assert build["layouts"] == 1, f"{name}: of two layouts ptxas makes wrong addresses"
        assert build["shared"] <= 227 * 1024, name
        if build["held"]:
            assert build["held_products"] == build["products"], (
                f"{name}: own rows are read from shared memory"
            )
        if build["most_registers"] is not None:
            assert build["registers"] <= 65_536 // (3 * 128), name
            assert build["shared"] <= 75 * 1024, (
                f"{name}: three programs must fit on a multiprocessor"
            )
        if "128" in name and build["warps"] == 4:
            assert build["shared"] <= 113 * 1024, (
                f"{name}: two programs must fit on a multiprocessor"
            )
            assert build["stack"] <= 96, f"{name}: spills"


def test_ampere_builds_use_its_tensor_cores(builds):
    found = {name: build for name, build in builds.items() if name.startswith("sm_80")}
    assert len(found) >= 3
    for name, build in found.items():
        assert build["mma"] > 0, name
        assert build["shared"] <= 163 * 1024, name
        assert build["stack"] <= 96, f"{name}: spills"
