"""The rule that judges kernels: rounding passes on every processor, and an error of one per cent or
a tile left out does not."""

import pytest
import torch

from benchmarks.kernels import attention_parity, layer_parity
from benchmarks.kernels.accuracy import find_stray, rounding_allowance
from kernels.semi_local_attention import tile_table
from kernels.semi_local_attention.plan import TritonPlan

BIASED = attention_parity.Case(
    (21, 0, 9), (3, 0, 9), heads=1, d_qk=16, d_v=16, bias=True, dtype="float32"
)
PLAIN = attention_parity.Case(
    (21, 0, 9), (3, 0, 9), {"window": 4, "full_rows": 3}, "random", 1, 16, 16, dtype="float32"
)
RESULTS = ["output", "dq", "dk", "dv", "position table", "time table"]


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    tile = tile_table.AttentionTile(16, 16, 4, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_table, "tile_sizes", lambda *_, **__: tile)
        patch.setattr(tile_table, "SPLIT_PROGRAMS", 4)  # fewer for the interpreter
        yield


@pytest.fixture(scope="module")
def results(small_tiles):
    """The batch, and what plain PyTorch and float64 make of it."""
    batch = attention_parity.make_batch(BIASED)
    plain = attention_parity.run(batch, torch.float32, "reference")
    truth = attention_parity.run(batch, torch.float64, "reference")
    return batch, plain, truth


@pytest.fixture(scope="module")
def made(results):
    """What the kernels make of it."""
    batch, _, _ = results
    return attention_parity.run(batch, torch.float32, "triton")


@pytest.fixture
def fast(made):
    """The same, to be spoilt."""
    return [x.clone() for x in made]


def judge(results, fast, plain=None):
    batch, in_float32, truth = results
    return attention_parity.judge(BIASED, batch, fast, plain or in_float32, truth)


def test_a_kernel_as_it_should_be_passes(results, fast):
    _, _, truth = results
    assert judge(results, fast) is None
    # even where plain PyTorch is exact by luck: the allowance does not lean on its error
    assert judge(results, fast, plain=truth) is None


@pytest.mark.parametrize("name", RESULTS)
def test_one_per_cent_is_too_much(results, fast, name):
    fast[RESULTS.index(name)] *= 1.01
    assert judge(results, fast) is not None


@pytest.mark.parametrize("name", RESULTS[4:])
def test_one_per_cent_of_one_entry_is_too_much(results, fast, name):
    table = fast[RESULTS.index(name)]
    largest = table.abs().argmax()
    table[largest] *= 1.01
    assert judge(results, fast) is not None


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("case", [PLAIN, BIASED])
def test_a_tile_left_out_is_found(monkeypatch, case, keys):
    """The last tile of rows, or of keys, is not computed; what it would have written reads 0."""
    batch = attention_parity.make_batch(case)
    plain = attention_parity.run(batch, torch.float32, "reference")
    truth = attention_parity.run(batch, torch.float64, "reference")
    assert attention_parity.judge(case, batch, plain, plain, truth) is None

    tile_list = TritonPlan.tile_list

    def without_the_last(plan, of_keys, tile, heads):
        made = tile_list(plan, of_keys, tile, heads)
        if of_keys == keys:
            made.header[0] -= 1
        return made

    monkeypatch.setattr(TritonPlan, "tile_list", without_the_last)
    batch = attention_parity.make_batch(case)  # a plan of its own
    monkeypatch.setattr(torch, "empty", torch.zeros)
    fast = attention_parity.run(batch, torch.float32, "triton")
    stray = attention_parity.judge(case, batch, fast, plain, truth)
    assert stray is not None
    assert stray.startswith("output")

    # the sums of the bias tables alone show it too, where only rows are missing
    if case.bias and not keys:
        untouched = [*truth[:4], *fast[4:]]
        found = attention_parity.judge(case, batch, untouched, plain, truth)
        assert found is not None and found.startswith("gradients of the bias tables")


def test_a_layer_off_by_one_per_cent_is_found():
    case = next(check[1] for check in layer_parity.smoke_checks() if len(check) == 2)
    truth = layer_parity.run(case, torch.float64, "reference")
    plain = layer_parity.run(case, torch.float32, "reference")
    terms = sum(case.lengths)
    assert find_stray(plain, plain, truth, num_terms=terms) is None
    for i in range(len(plain)):
        wrong = [x * 1.01 if j == i else x for j, x in enumerate(plain)]
        assert find_stray(wrong, plain, truth, num_terms=terms) is not None, i


def test_the_allowance_holds_what_rounding_does():
    """Sums of a thousand float32 terms of random sign, by a tree: never beyond the bound."""
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(500, 1024, generator=generator)
    error = (terms.sum(1).double() - terms.double().sum(1)).abs()
    allowed = rounding_allowance(1024, terms.double().abs().sum(1))
    assert (error <= allowed).all()


def test_nan_and_nothing():
    truth = [torch.ones(3, dtype=torch.float64)]
    assert find_stray([torch.tensor([1.0, torch.nan, 1.0])], truth, truth) is not None
    nothing = [torch.empty(0)]
    assert find_stray(nothing, nothing, nothing) is None
