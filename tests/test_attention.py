"""Semi-local attention: the mask against its written examples, and every backend against the dense
float64 truth.
"""

import pytest
import torch

from kernels.semi_local_attention import torch_blocked
from kernels.semi_local_attention.op import cached_attention, semi_local_attention
from kernels.semi_local_attention.reference import semi_local_mask
from kernels.semi_local_attention.types import RelativeBias, time_bucket
from tests.support.accuracy import assert_as_accurate

CASES = {  # lengths, candidates of each, mask
    "one token": ([1], [0], {}),
    "causal with an empty sequence": ([63, 0, 130], None, {}),
    "window only": ([70, 129], None, {"window": 5}),
    "semi-local": ([257, 64], None, {"window": 40, "full_rows": 30}),
    "self only": ([66, 3], [0, 1], {"window": 0}),
    "full rows longer than the history": ([65, 140], [3, 0], {"window": 7, "full_rows": 100}),
    "prefix": ([200, 10, 129], [20, 2, 0], {"window": 20, "full_rows": 11, "prefix": 5}),
    "prefix of several tiles": ([220, 10], [9, 2], {"window": 3, "full_rows": 2, "prefix": 70}),
    "all candidates": ([65, 1, 7], [65, 1, 7], {"window": 4, "full_rows": 4}),
    "no sequence": ([], [], {"window": 4}),
    "only empty sequences": ([0, 0], [0, 0], {"window": 4}),
}


def make_inputs(lengths, num_targets, *, d_qk=16, d_v=16, heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    widths = d_qk, d_qk, d_v, d_v
    tensors = [
        torch.randn(total, heads, d, generator=generator, dtype=torch.float64) for d in widths
    ]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return (
        tensors,
        offsets,
        None if num_targets is None else torch.tensor(num_targets, dtype=torch.int32),
    )


def some_visible(lengths, num_targets, seed=0):
    """A visible length for each candidate, in no order, the two ends included."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(0, n - c + 1, (c,), generator=generator)
        for n, c in zip(lengths, num_targets, strict=True)
    ]
    return torch.cat(rows).to(torch.int32)


def some_oldest(visible, seed=0):
    """The first position that each candidate sees beside the prefix, some behind all it sees."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(len(visible), generator=generator)
    return (share * (visible + 3)).to(torch.int32)


def some_extra(lengths):
    return torch.arange(len(lengths), dtype=torch.int32) % 3 * 7


def some_bias(total, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tables = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (50, 20))
    time = torch.randint(0, 5_000_000, (total,), generator=generator).cumsum(0)
    return RelativeBias(*tables, time, time + 700_000)


def test_kept_scores_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward with the scores that forward kept, and with scores that it makes again."""
    tensors, offsets, num_targets = make_inputs([70, 20, 5], [9, 3, 0])
    found = []
    for most in (2**22, 0):
        monkeypatch.setattr(torch_blocked, "KEPT_SCORES", most)
        q, k, v = (x.float().requires_grad_() for x in tensors[:3])
        out = semi_local_attention(
            q, k, v, offsets.clone(), max_seq_len=70, num_targets=num_targets, window=11,
            full_rows=4, prefix=3, bias=None, attn_alpha=0.3, scaling_seq_len=8, backend="torch",
        )  # fmt: skip
        out.backward(tensors[3].float())
        found.append((q.grad, k.grad, v.grad))
    for kept, again in zip(*found, strict=True):
        assert kept is not None and torch.equal(kept, again)


def run(tensors, offsets, *, dtype=torch.float64, backend, bias=None, **options):
    """Output and the gradients of q, k, v and the bias tables, in float64."""
    *inputs, grad = (x.to(dtype) for x in tensors)
    leaves = [x.requires_grad_() for x in (y.detach().clone() for y in inputs)]
    if bias is not None:
        tables = [
            t.to(torch.promote_types(dtype, torch.float32)).requires_grad_() for t in _tables(bias)
        ]
        bias = RelativeBias(*tables, bias.event_time_T, bias.query_time_T)
        leaves += tables
    longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
    options = {"max_seq_len": longest, "attn_alpha": 0.5, "scaling_seq_len": 7, **options}
    out = semi_local_attention(*leaves[:3], offsets, bias=bias, backend=backend, **options)
    out.backward(grad)
    return [out.detach().double(), *(x.grad.double() for x in leaves)]


def _tables(bias):
    return bias.position_table.detach().clone(), bias.time_table.detach().clone()


def draw(rows):
    return ["".join("1" if kept else "." for kept in row) for row in rows.tolist()]


def test_mask_examples():
    assert draw(semi_local_mask(6, 0, 2, 2)) == [
        "1.....",
        "11....",
        "111...",
        ".111..",
        "11111.",
        "111111",
    ]
    expected = [
        "1.......",
        "11......",
        "111.....",
        "1.11....",
        "1..11...",
        "111111..",
        "1111111.",
        "111111.1",
    ]
    assert draw(semi_local_mask(8, 2, 1, 1, prefix=1)) == expected
    visible = torch.tensor([0, 4])
    assert draw(semi_local_mask(8, 2, 1, 1, 1, visible))[6:] == ["......1.", "1111...1"]
    oldest = torch.tensor([0, 3])
    assert draw(semi_local_mask(8, 2, 1, 1, 1, visible, oldest))[6:] == ["......1.", "1..1...1"]


def test_time_buckets_are_logarithmic():
    difference = torch.tensor([0, -1, 1, 2, -3, 4, 3600, 2**30])
    assert time_bucket(difference, 129).tolist() == [0, 0, 0, 2, 3, 4, 27, 69]
    assert time_bucket(difference, 20).tolist() == [0, 0, 0, 2, 3, 4, 19, 19]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("extra", ["plain", "visible", "bias", "visible and bias", "visible from"])
def test_blocked_equals_reference(name, extra):
    lengths, counts, mask = CASES[name]
    counts = counts if counts is not None else [0] * len(lengths) if "visible" in extra else None
    tensors, offsets, num_targets = make_inputs(lengths, counts, d_qk=8, d_v=5)
    options = {**mask, "num_targets": num_targets}
    if "visible" in extra and counts:
        options["target_visible"] = some_visible(lengths, counts)
    if "from" in extra and counts:
        options["target_from"] = some_oldest(options["target_visible"])
        options["extra_full_rows"] = some_extra(lengths)
    if "bias" in extra:
        options["bias"] = some_bias(sum(lengths))
    if not lengths:
        out = semi_local_attention(
            *tensors[:3], offsets, max_seq_len=0, attn_alpha=1, scaling_seq_len=1
        )
        assert out.shape == (0, 2, 5)
        return
    for got, truth in zip(
        run(tensors, offsets, backend="torch", **options),
        run(tensors, offsets, backend="reference", **options),
        strict=True,
    ):
        torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocked_precision(dtype):
    lengths, counts = [63, 0, 130, 257], [3, 0, 60, 0]
    tensors, offsets, num_targets = make_inputs(lengths, counts, d_qk=25, d_v=50)
    tensors = [x.to(dtype).double() for x in tensors]  # the truth is of these very numbers
    options = {"num_targets": num_targets, "window": 20, "full_rows": 10, "prefix": 2}
    results = [
        run(tensors, offsets, dtype=t, backend=b, **options)
        for t, b in [(dtype, "torch"), (dtype, "reference"), (torch.float64, "reference")]
    ]
    assert_as_accurate(*results, num_terms=max(lengths))


def test_output_type():
    (q, k, v, _), offsets, _ = make_inputs([30], None)
    options = {"max_seq_len": 30, "attn_alpha": 1.0, "scaling_seq_len": 4}
    halves = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    for backend in ("torch", "reference"):
        assert (
            semi_local_attention(*halves, offsets, backend=backend, **options).dtype
            == torch.bfloat16
        )
        wide = semi_local_attention(
            *halves, offsets, backend=backend, out_dtype=torch.float32, **options
        )
        assert wide.dtype == torch.float32
        assert torch.autograd.grad(wide.sum(), halves[0])[0].dtype == torch.bfloat16


def test_blocked_is_deterministic():
    tensors, offsets, num_targets = make_inputs([300, 64, 190], [100, 0, 40])
    options = {"num_targets": num_targets, "window": 30, "full_rows": 20, "bias": some_bias(554)}
    first, second = (
        run(tensors, offsets, dtype=torch.float32, backend="torch", **options) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_candidates_do_not_depend_on_each_other():
    tensors, offsets, num_targets = make_inputs([40], [9])
    q, k, v, _ = tensors
    options = {
        "attn_alpha": 1.0,
        "scaling_seq_len": 4,
        "max_seq_len": 40,
        "window": 3,
        "full_rows": 2,
    }
    together = semi_local_attention(q, k, v, offsets, num_targets=num_targets, **options)
    for i in range(31, 40):
        rows = [*range(31), i]
        alone = semi_local_attention(
            q[rows],
            k[rows],
            v[rows],
            torch.tensor([0, 32]),
            num_targets=torch.tensor([1]),
            **options,
        )
        torch.testing.assert_close(alone[-1], together[i])


def test_a_plan_serves_all_layers_and_notices_changes(monkeypatch):
    import kernels.semi_local_attention.op as op

    built = []
    plan_tiles = op.plan_tiles
    monkeypatch.setattr(op, "plan_tiles", lambda *args: built.append(args) or plan_tiles(*args))
    (q, k, v, _), offsets, num_targets = make_inputs([20, 30], [2, 3])
    assert num_targets is not None
    options = {
        "num_targets": num_targets,
        "attn_alpha": 1.0,
        "scaling_seq_len": 4,
        "max_seq_len": 40,
    }
    first = semi_local_attention(q, k, v, offsets, window=2, **options)
    assert torch.equal(semi_local_attention(q, k, v, offsets, window=2, **options), first)
    assert len(built) == 1
    semi_local_attention(q, k, v, offsets, window=3, **options)
    assert len(built) == 2
    num_targets[0] = 4
    truth = semi_local_attention(q, k, v, offsets, window=2, backend="reference", **options)
    torch.testing.assert_close(semi_local_attention(q, k, v, offsets, window=2, **options), truth)


def test_a_plan_goes_with_its_batch():
    import kernels.semi_local_attention.op as op

    before = len(op._plans)
    (q, k, v, _), offsets, num_targets = make_inputs([20, 30], [2, 3])
    options = {
        "num_targets": num_targets,
        "attn_alpha": 1.0,
        "scaling_seq_len": 4,
        "max_seq_len": 40,
    }
    with torch.inference_mode():
        semi_local_attention(q, k, v, offsets.clone(), window=2, **options)
    out = semi_local_attention(q.requires_grad_(), k, v, offsets, window=2, **options)
    assert len(op._plans) == before + 1
    del offsets
    assert len(op._plans) == before
    out.sum().backward()  # which has the plan it needs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_offsets": torch.tensor([0, 20, 51])}, "seq_offsets must go from 0 to T=50"),
        ({"seq_offsets": torch.tensor([0, 20, 50], dtype=torch.int32)}, "int64"),
        ({"max_seq_len": 29}, "a sequence has 30 tokens"),
        ({"num_targets": torch.tensor([2])}, r"num_targets must be \[2\]"),
        ({"num_targets": torch.tensor([2, 31])}, r"0\.\.length"),
        ({"target_visible": torch.tensor([3])}, r"target_visible must be \[5\]"),
        ({"window": -1}, "window"),
        ({"full_rows": -1}, "full_rows"),
        ({"scaling_seq_len": 0}, "scaling_seq_len"),
        ({"backend": "triton"}, "CUDA"),
        ({"backend": "flash"}, "backend"),
    ],
)
def test_wrong_arguments_are_named(monkeypatch, change, message):
    monkeypatch.setattr("kernels.backend.INTERPRETED", False)
    (q, k, v, _), offsets, num_targets = make_inputs([20, 30], [2, 3])
    options = {"seq_offsets": offsets, "max_seq_len": 30, "num_targets": num_targets, **change}
    with pytest.raises(ValueError, match=message):
        semi_local_attention(
            q, k, v, options.pop("seq_offsets"), attn_alpha=1.0, **{"scaling_seq_len": 4, **options}
        )


@pytest.mark.parametrize("kind", ["candidates", "candidates with visible lengths"])
def test_cached_equals_the_whole_sequence(kind):
    """Rows over a cache get what the same rows get inside the sequence."""
    lengths, counts = [50, 1, 33], [20, 1, 0]
    (q, k, v, _), offsets, num_targets = make_inputs(lengths, counts)
    rows = torch.cat(
        [torch.arange(n - c, n) + o for n, c, o in zip(lengths, counts, offsets, strict=False)]
    )
    kept = torch.ones(sum(lengths), dtype=torch.bool)
    kept[rows] = False
    row_offsets, cache_offsets = (torch.tensor([0, *n]).cumsum(0) for n in (counts, [30, 0, 33]))
    visible = some_visible(lengths, counts) if "visible" in kind else None
    scale = {"attn_alpha": 0.5, "scaling_seq_len": 7}
    of_candidates = {"num_targets": num_targets, "target_visible": visible}
    whole = semi_local_attention(
        q, k, v, offsets, max_seq_len=50, window=3, **of_candidates, **scale
    )[rows]
    for backend in ("reference", "torch"):
        cached = cached_attention(
            *(q[rows], k[rows], v[rows], row_offsets, k[kept], v[kept], cache_offsets),
            visible=visible,
            backend=backend,
            **scale,
        )
        torch.testing.assert_close(cached, whole)


def test_cached_names_what_does_not_fit():
    q, k = torch.zeros(3, 2, 8), torch.zeros(5, 2, 8)
    offsets = torch.tensor([0, 3]), torch.tensor([0, 5])
    with pytest.raises(ValueError, match="own_k must be"):
        cached_attention(
            q, q[:2], q, offsets[0], k, k, offsets[1], attn_alpha=1.0, scaling_seq_len=1
        )
    with pytest.raises(ValueError, match="one per row"):
        cached_attention(
            *(q, q, q, offsets[0], k, k, offsets[1]),
            visible=torch.zeros(2, dtype=torch.int32),
            attn_alpha=1.0,
            scaling_seq_len=1,
        )
