"""INT4 tables: the formula, the packing, the look-up of both backends, a model that uses them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kernels.int4_embedding.op import look_up, packed_words, quantize
from kernels.int4_embedding.reference import quantize_reference
from kernels.int4_embedding.triton_launch import look_up_triton
from pipeline.evaluate import evaluator
from pipeline.model.artifact import load_model
from pipeline.model.inference import quantize as quantize_module
from pipeline.model.inference.quantize import Int4Embedding, quantize_tables
from pipeline.model.ranker import RankingModel
from serve_app.history.published import PublishedSequences
from serve_app.ranking.ranker import Ranker
from tests.worlds.model import RATES, VOCAB, make_batch, make_config
from tests.worlds.tiny import publish_sequences, save_tiny_model, tiny_config


def some_table(num_rows: int, dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(dim)
    return (
        torch.randn(num_rows, dim, generator=generator) * torch.logspace(-3, 2, num_rows)[:, None]
        + 0.3
    )


def test_a_row_by_hand() -> None:
    codes, scale, bias = quantize_reference(
        torch.tensor([[-1.0, 14.0, 0.4, 6.6], [3.0, 3.0, 3.0, 3.0]])
    )
    assert codes.tolist() == [[0, 15, 1, 8], [0, 0, 0, 0]]
    assert (scale.tolist(), bias.tolist()) == ([[1.0], [0.0]], [[-1.0], [3.0]])
    packed = quantize(torch.tensor([[-1.0, 14.0, 0.4, 6.6]]))
    assert packed[0, 1].item() == 0x81F0
    assert packed[0, :1].view(torch.float16).tolist() == [1.0, -1.0]


@pytest.mark.parametrize("dim", [1, 8, 50, 128])
def test_look_up_equals_the_formula(dim: int) -> None:
    table = some_table(40, dim)
    packed = quantize(table)
    assert packed.shape == (40, packed_words(dim))
    codes, scale, bias = (x.double() for x in quantize_reference(table))
    truth = codes * scale + bias
    ids = torch.tensor([[3, 3, 0], [39, 7, 3]])
    for got in (
        look_up(packed, ids, dim=dim),
        look_up_triton(packed, ids.flatten(), dim, torch.float32).view(2, 3, dim),
    ):
        torch.testing.assert_close(got.double(), truth[ids], rtol=1e-6, atol=1e-6)
    assert ((truth - table).abs() <= 0.501 * scale + 1e-3 * bias.abs() + 1e-7).all()
    half = look_up(packed, ids.int(), dim=dim, dtype=torch.float16)
    assert torch.equal(
        look_up_triton(packed, ids.flatten().int(), dim, torch.float16).view(2, 3, dim), half
    )


def test_no_ids_and_no_rows() -> None:
    packed = quantize(torch.empty(0, 16))
    nothing = torch.empty(0, dtype=torch.int64)
    assert look_up(packed, nothing, dim=16).shape == (0, 16)
    assert look_up_triton(packed, nothing, 16, torch.float32).shape == (0, 16)


def test_numbers_beyond_float16_are_refused() -> None:
    for wrong in (1e6, float("nan")):
        with pytest.raises(ValueError, match="finite numbers below 65,504"):
            quantize(torch.tensor([[0.0, wrong]]))
    with pytest.raises(ValueError, match=r"int32 \[R, 3\] for rows of 16"):
        look_up(quantize(torch.ones(2, 8)), torch.tensor([0]), dim=16)


def test_rows_that_lose_more_than_four_bits_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 16)
    weight[2] = 100 + 0.01 * weight[2]  # float16 holds the bias in steps of .06
    weight[4] *= 1e-8
    weight[5] = 0
    with caplog.at_level("WARNING"):
        quantize_module.warn_of_coarse_rows("item_id", weight, Int4Embedding(weight))
    assert "INT4: 2 of 6 rows of item_id" in caplog.text


def test_a_model_with_int4_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_module, "WORTH_BYTES", 100)
    torch.manual_seed(0)
    model, batch = RankingModel(make_config(), VOCAB, RATES).eval(), make_batch([7, 3], [3, 2])
    tables = {
        name: table.weight.detach().clone()
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding)
    }
    exact = model(batch)
    sizes = quantize_tables(model)
    assert sizes.keys() == tables.keys()
    assert sizes["encoder.position"] == (32 * 16 * 4, 32 * (8 + 4))
    assert sizes["encoder.content.item.0"] == (5 * 2 * 4, 5 * 2 * 4)
    swapped = {name for name, table in model.named_modules() if isinstance(table, Int4Embedding)}
    assert swapped == {name for name, (before, after) in sizes.items() if after < before}
    assert "encoder.position" in swapped
    assert "encoder.content.item.0" not in swapped
    quantised = model(batch)
    assert not torch.equal(quantised, exact)
    with torch.no_grad():  # the same as a float model whose tables hold what the codes say
        dense = RankingModel(make_config(), VOCAB, RATES).eval()
        state = {k: v for k, v in model.state_dict().items() if not k.endswith(".packed")}
        for name, weight in tables.items():
            codes, scale, bias = quantize_reference(weight)
            state[f"{name}.weight"] = codes * scale + bias if name in swapped else weight
        dense.load_state_dict(state)
    torch.testing.assert_close(quantised, dense(batch))


def test_the_evaluation_and_the_server_use_them_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_module, "WORTH_BYTES", 100)
    for name in ("plot_calibration", "plot_roc"):
        monkeypatch.setattr(evaluator.plots, name, lambda *_: None)
    cfg = tiny_config(tmp_path / "runs")
    publish_sequences(cfg)
    folder = save_tiny_model(cfg, tmp_path / "model")
    store = PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, tmp_path / "cache")
    losses = []
    for on in (False, True):
        changed = replace(cfg, evaluate=replace(cfg.evaluate, int4_tables=on))
        name = "int4" if on else None
        found = evaluator.evaluate_model(changed, folder, ["val"], name)
        losses.append(found["val/ne/is_click"])
        ranker = Ranker(load_model(folder), store, 1, "tiny", replace(cfg.serve, int4_tables=on))
        assert any(isinstance(table, Int4Embedding) for table in ranker.model.modules()) == on
        ranker.warm_up()
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)
