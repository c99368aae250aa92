"""The last layer makes only the rows that are read; what is read is as if it had made all."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.semi_local_attention import tile_table
from kernels.stu import op as stu
from pipeline.model.encoders import fuxi, hstu, lares, transducer, transformer
from pipeline.model.encoders.encoder import last_rows
from pipeline.model.encoders.stu import STU
from pipeline.model.inference.cached_scoring import encode_history
from tests.worlds.model import make_batch, make_config, make_model

PLAIN = {"attention": {"window": None, "full_rows": 0, "scaling_seq_len": 16}}
CASES = {
    "ultra_hstu": {"num_layers": 2},
    "truncation": {"num_layers": 3, "truncate_after_layer": 2, "truncate_to": 4},
    "one layer": {"num_layers": 1, "silu_qkv": False, "concat_ua": True},
    "hstu": {"encoder": "hstu", **PLAIN},
    "hstu_merged": {"encoder": "hstu_merged", **PLAIN},
    "relative bias": {"encoder": "hstu_merged", "relative_bias": True, **PLAIN},
    "transformer": {"encoder": "transformer", **PLAIN},
    "sasrec": {"encoder": "sasrec", **PLAIN},
    "fuxi_alpha": {"encoder": "fuxi_alpha", **PLAIN},
    "fuxi_beta": {"encoder": "fuxi_beta", **PLAIN},
    "lares": {"encoder": "lares", "loop": {"layer": "stu"}, **PLAIN},
    "lares, transformer": {"encoder": "lares", "loop": {"layer": "transformer"}, **PLAIN},
}


def make_every_row(*_: object, **__: object) -> None:
    """In the place of `last_rows`."""


def encode(name: str, *, retrieval: bool) -> tuple[list[Tensor], list[Tensor]]:
    """What is read, and the gradients of a sum over it."""
    model = make_model(make_config(**CASES[name]))
    batch = make_batch([9, 0, 70, 3], [2, 1, 0, 4])
    if retrieval:
        counts = torch.tensor([2, 0, 3, 0], dtype=torch.int32)
        visible = torch.tensor([4, 9, 1, 30, 70], dtype=torch.int32)
        batch = replace(batch, num_next=counts, next_visible=visible)

    encoded = model.encode(batch, last_history=retrieval)
    read = [encoded.candidate_rows]
    for rows in (encoded.last_history_row, encoded.next_rows):
        read += [] if rows is None else [rows]
    assert len(read) == (3 if retrieval else 1)

    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for rows in read:
        weights = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
        total = total + (rows * weights).sum()
    parameters = [p for path, p in model.named_parameters() if path.startswith("transducer.")]
    return read, list(torch.autograd.grad(total, parameters))


@pytest.mark.parametrize("retrieval", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_what_is_read_and_its_gradients_are_those_of_all_rows(
    name: str, retrieval: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, grads = encode(name, retrieval=retrieval)
    for module in (transducer, hstu, transformer, fuxi, lares):
        monkeypatch.setattr(module, "last_rows", make_every_row)
    expected, expected_grads = encode(name, retrieval=retrieval)
    tolerance = 1e-5 if name == "fuxi_beta" else 1e-9  # its powers of time are float32
    for one, other in zip(found + grads, expected + expected_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_only_rows_that_are_read_pass_the_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model(make_config(num_layers=2)), make_batch([9, 0, 70], [2, 1, 0])
    forward, sizes = STU.forward, []

    def count_rows(layer: STU, tokens, **options) -> Tensor:
        rows = forward(layer, tokens, **options)
        sizes.append(len(rows))
        return rows

    monkeypatch.setattr(STU, "forward", count_rows)
    model.encode(batch)
    assert sizes == [82 + 3 * model.encoder.num_context, 3]


def test_rows_by_hand() -> None:
    """Context c, history h, candidates x: read are x, the newest h, and the h before a next item.

    tokens    c h h h x x | c x | c h h
    read            ^ ^ ^     ^     ^ ^
    """
    model = make_model(make_config())
    batch = make_batch([3, 0, 2], [2, 1, 0])
    counts, visible = torch.tensor([0, 0, 1]).int(), torch.tensor([1]).int()
    tokens = model.encoder(replace(batch, num_next=counts, next_visible=visible))

    n = model.encoder.num_context
    second, third = 5 + n, 6 + 2 * n  # where the sequences begin
    rows = last_rows(tokens, n, last_history=True)
    assert rows is not None
    expected = [n + 2, n + 3, n + 4, second + n, third + n, third + n + 1]
    assert rows.index.tolist() == expected
    assert rows.offsets.tolist() == [0, 3, 4, 6]

    rows = last_rows(tokens, n, last_history=False)
    assert rows is not None
    assert rows.index.tolist() == [n + 3, n + 4, second + n, third + n]


FUSED = {
    "truncation": {
        "num_layers": 2,
        "truncate_after_layer": 1,
        "truncate_to": 12,
        "attention": {"window": 3, "full_rows": 5, "scaling_seq_len": 16},
    },
    "linear, made again": {
        "num_layers": 1,
        "silu_qkv": False,
        "concat_ua": True,
        "recompute": ["uvqk", "y"],
    },
    "hstu_merged": {"encoder": "hstu_merged", "num_layers": 1, **PLAIN},
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_kernels_make_the_rows_that_are_read(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and gradients as where the kernels make every row; what no kernel writes is NaN."""
    monkeypatch.setattr(tile_table, "SPLIT_PROGRAMS", 1)  # fewer for the interpreter
    model = make_model(make_config(attention_backend="triton", num_heads=1, **FUSED[name])).float()
    batch = make_batch([5, 0, 22], [1, 1, 1])
    made: list[int] = []
    makes_rows, layer_rows = STU.makes_rows, stu.stu_layer_rows

    def count_rows(*arguments: object, **options: object) -> Tensor:
        rows = layer_rows(*arguments, **options)
        made.append(len(rows))
        return rows

    monkeypatch.setattr(stu, "stu_layer_rows", count_rows)
    torch.use_deterministic_algorithms(True)
    found = []
    try:
        for choice in (makes_rows, lambda *_, **__: False):
            monkeypatch.setattr(STU, "makes_rows", choice)
            model.zero_grad()
            logits = model(batch)
            logits.square().sum().backward()
            parameters = model.named_parameters()
            grads = {n: p.grad.to_dense() for n, p in parameters if p.grad is not None}
            found.append(grads | {"logits": logits.detach()})
        monkeypatch.setattr(STU, "makes_rows", makes_rows)
        with torch.no_grad():
            assert torch.equal(model(batch), found[0]["logits"])
    finally:
        torch.use_deterministic_algorithms(False)

    for path, expected in found[1].items():
        error = (found[0][path] - expected).abs().max()
        assert error <= 1e-4 * expected.abs().max() + 1e-6, path
    # 2 context tokens of each sequence, its newest 12 events and its candidates; then candidates
    kept = [2 * 3 + 5 + 0 + 12 + 3] if name == "truncation" else []
    assert made == [*kept, 3] * 2


def test_a_history_is_encoded_as_where_the_kernels_make_every_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layer one makes K and V of all rows, and the rest of those that layer two reads."""
    monkeypatch.setattr(tile_table, "SPLIT_PROGRAMS", 1)
    model = make_model(make_config(attention_backend="triton", **FUSED["truncation"])).float()
    history = make_batch([5, 30], [0, 0])
    with torch.no_grad():
        found = encode_history(model, history)
        monkeypatch.setattr(STU, "makes_rows", lambda *_, **__: False)
        expected = encode_history(model, history)
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(one.offsets, other.offsets)
        torch.testing.assert_close(one.k_THD, other.k_THD, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.v_THV, other.v_THV, rtol=1e-4, atol=1e-5)
