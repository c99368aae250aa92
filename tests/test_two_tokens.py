"""The plain HSTU of two tokens an event that benchmarks/quality/two_tokens.py trains."""

import pytest
import torch

from benchmarks.quality import two_tokens
from benchmarks.quality.two_tokens import ASKED, ROWS, VARIANTS, Layer, Sight, Variant, train


def test_what_candidates_of_two_tokens_an_event_see() -> None:
    sight = Sight.of(2, "cpu")
    length = 2 * ROWS
    assert sight.mask[:length, :length].equal(torch.ones(length, length).tril().bool())
    assert not sight.mask[:length, length:].any()

    # the first and the last that are asked: all before the first row of their phase, in two tokens
    first_phase, last_phase = ROWS - ASKED, ROWS - two_tokens.TASTES.phase_rows
    for row, begin in ((length, first_phase), (length + ASKED - 1, last_phase)):
        seen = [*range(2 * begin), row]
        assert sight.mask[row].nonzero().flatten().tolist() == seen
        assert sight.distance[row, 2 * begin - 1] == 1, "it stands right behind what it sees"


def test_a_bias_of_the_token_before_and_scores_of_0_carry_it_over() -> None:
    """The copy of a first layer is within the form: A of a token is V of the one before."""
    layer = Layer(Variant(bias=True, previous=8.0))
    with torch.no_grad():
        assert layer.bias is not None
        layer.bias.copy_(torch.where(torch.arange(len(layer.bias)) == 1, 8.0, 0.0))
        layer.uvqk.weight[2 * 64 :] = 0.0
        layer.uvqk.bias[2 * 64 :] = 0.0
        layer.out.weight.copy_(torch.eye(64))
        layer.out.bias.zero_()

    sight = Sight.of(2, "cpu")
    x = torch.randn(1, len(sight.mask), 64)
    u, v, *_ = layer.uvqk(layer.norm_in(x)).chunk(4, -1)
    made = layer(x, sight) - x
    carried = torch.nn.functional.silu(torch.tensor(8.0)) / 16 * v[:, : 2 * ROWS - 1]
    gate = torch.nn.functional.silu(u)[:, 1 : 2 * ROWS]
    expected = layer.norm_attn(carried) * gate
    torch.testing.assert_close(made[:, 1 : 2 * ROWS], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_trains(name: str) -> None:
    trained = train(VARIANTS[name], seconds=1e9, steps=2, scale=256)
    ((steps, reached),) = trained["curve"]
    assert steps == 2
    assert 0.2 < reached < trained["best"]
    assert trained["best"] > 0.75
