"""The model against its definition: what a candidate sees, truncation by hand, backends, sizes of
things.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.position_time.reference import time_bucket
from kernels.semi_local_attention.reference import semi_local_mask
from pipeline.config import UserError
from pipeline.model.artifact import load_model, save_model
from pipeline.model.encoders.transducer import truncate_history
from pipeline.model.encoders.ultra_hstu import UltraHSTU
from pipeline.model.flops import kept_pairs
from pipeline.model.ranker import RankingModel
from pipeline.model.tokens import ActionEncoder, Tokens, target_mask
from pipeline.model.work import count_work, head_flops
from tests.worlds.model import (
    RATES,
    VOCAB,
    assert_candidates_are_blind,
    dense_layer,
    make_batch,
    make_config,
    make_maps,
    make_model,
    tokens_at,
)


def test_heads_start_at_the_base_rates() -> None:
    cfg = make_config()
    torch.manual_seed(0)
    scores = (
        RankingModel(cfg, VOCAB, RATES).eval()(make_batch([5], [200])).sigmoid().mean(0).tolist()
    )
    assert scores[0] == pytest.approx(0.4, abs=0.1)
    assert scores[1] == pytest.approx(0.02, abs=0.02)


@pytest.mark.parametrize("towers", [False, True])
@torch.no_grad()
def test_logits_are_float32_under_autocast(towers: bool) -> None:
    model = make_model(make_config(task_towers=towers)).float()
    x_CE = torch.randn(1000, model.heads[0].in_features)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.heads(x_CE)
    assert logits.dtype == torch.float32
    # rounded to bfloat16, 1,000 logits near each other would be some hundred different numbers
    assert len(logits[:, 0].unique()) > 950


def test_a_tower_is_of_its_task_alone() -> None:
    model, batch = make_model(make_config(task_towers=True)), make_batch([5, 3], [2, 3])
    hidden = model.heads[0]
    assert isinstance(hidden, torch.nn.Linear)
    before = model(batch)
    x_CE = torch.randn(5, hidden.in_features, dtype=torch.float64)
    of_click, of_like = (
        torch.nn.functional.silu(x_CE @ hidden.weight[rows].T + hidden.bias[rows]) @ weight + bias
        for rows, weight, bias in zip(
            (slice(0, 8), slice(8, 16)), model.heads[3].weight, model.heads[3].bias, strict=True
        )
    )
    torch.testing.assert_close(model.heads(x_CE), torch.stack([of_click, of_like], dim=1))
    with torch.no_grad():
        hidden.weight[8:] += 1
    after = model(batch)
    assert torch.equal(after[:, 0], before[:, 0]) and (after[:, 1] != before[:, 1]).all()


def test_candidates_are_blind_to_each_other() -> None:
    assert_candidates_are_blind(make_model(make_config()))


def test_no_sequence_sees_another() -> None:
    model, batch = make_model(make_config()), make_batch([7, 3], [3, 2])
    second = tokens_at(
        batch,
        torch.arange(10, 15),
        seq_offsets=torch.tensor([0, 5]),
        num_targets=torch.tensor([2], dtype=torch.int32),
        user_codes=batch.user_codes[1:],
        max_seq_len=5,
    )
    torch.testing.assert_close(model(second), model(batch)[3:])


def test_a_candidate_scores_the_same_in_both_layouts() -> None:
    """One pass with target_visible equals one sequence per request, where no full row and no
    truncation differs.
    """
    cfg = make_config(attention={"window": 2, "full_rows": 0, "scaling_seq_len": 16})
    model, batch = make_model(cfg), make_batch([9], [3])
    visible = [2, 0, 6]
    one_pass = model(replace(batch, target_visible=torch.tensor(visible, dtype=torch.int32)))
    for i, seen in enumerate(visible):
        request = tokens_at(
            batch,
            torch.tensor([*range(seen), 9 + i]),
            seq_offsets=torch.tensor([0, seen + 1]),
            num_targets=torch.tensor([1], dtype=torch.int32),
            max_seq_len=seen + 1,
        )
        torch.testing.assert_close(model(request)[0], one_pass[i])


@pytest.mark.parametrize("truncate_after_layer", [None, 1])
def test_no_candidate_sees_a_later_event(truncate_after_layer: int | None) -> None:
    cfg = make_config(truncate_after_layer=truncate_after_layer, truncate_to=4)
    model, batch = make_model(cfg), make_batch([9], [3])
    batch = replace(batch, target_visible=torch.tensor([2, 5, 9], dtype=torch.int32))
    later = replace(
        batch, action_mask=batch.action_mask.clone(), item_codes=batch.item_codes.clone()
    )
    later.action_mask[5] ^= 1
    later.known_mask[5] |= 1
    later.item_codes[5, 0] = (later.item_codes[5, 0] + 1) % 30
    before, after = model(batch), model(later)
    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2], after[2])


def test_truncation_by_hand() -> None:
    """Two sequences [c | uih | candidates] of one context token, the newest two events kept."""
    names = ["c", "a1", "a2", "a3", "a4", "x", "y", "c", "b1", "z"]
    tokens = Tokens(
        x_TE=torch.arange(10.0)[:, None],
        seq_offsets=torch.tensor([0, 7, 10]),
        num_targets=torch.tensor([2, 1], dtype=torch.int32),
        # x sees c a1; y sees c a1 a2 a3 a4; z sees c b1
        target_visible=torch.tensor([2, 5, 2], dtype=torch.int32),
        max_seq_len=7,
    )
    cut = truncate_history(tokens, num_context=1, keep_events=2)
    assert [names[int(i)] for i in cut.x_TE[:, 0]] == ["c", "a3", "a4", "x", "y", "c", "b1", "z"]
    assert cut.seq_offsets.tolist() == [0, 5, 8]
    assert cut.target_visible is not None
    assert cut.target_visible.tolist() == [1, 3, 2]  # x is left with c, y with c a3 a4
    assert cut.max_seq_len == 7  # a bound: 8 as a power of two, 7 before


def test_truncated_model_equals_dense_computation() -> None:
    """Layer by layer with the dense mask, the second layer on context, the newest 3 events and the
    candidates.
    """
    cfg = make_config(truncate_after_layer=1, truncate_to=3)
    model, batch = make_model(cfg), make_batch([8], [2])
    tokens = model.encoder(batch)
    kept = torch.tensor([0, 1, 7, 8, 9, 10, 11])  # 2 context, 8 events, 2 candidates
    x = tokens.x_TE
    assert isinstance(model.transducer, UltraHSTU)
    for depth, layer in enumerate(model.transducer.layers):
        x = x[kept] if depth == 1 else x
        x = dense_layer(layer, x)
    expected = model.heads(model.transducer.norm_out(x[-2:]))
    torch.testing.assert_close(model(batch), expected.float())


@pytest.mark.parametrize(
    "switches", [{"silu_qkv": False}, {"concat_ua": True}, {"silu_qkv": False, "concat_ua": True}]
)
def test_variants_of_a_layer_equal_their_dense_computation(switches: dict[str, bool]) -> None:
    model, batch = make_model(make_config(**switches)), make_batch([8], [2])
    x = model.encoder(batch).x_TE
    assert isinstance(model.transducer, UltraHSTU)
    for layer in model.transducer.layers:
        x = dense_layer(layer, x)
    torch.testing.assert_close(model(batch), model.heads(model.transducer.norm_out(x[-2:])).float())


def test_variants_of_a_layer_change_nothing_else() -> None:
    plain, linear_qkv, wide = (
        RankingModel(make_config(**switch), VOCAB, RATES).state_dict()
        for switch in ({}, {"silu_qkv": False}, {"concat_ua": True})
    )
    shapes = {name: tuple(weight.shape) for name, weight in plain.items()}
    assert {name: tuple(weight.shape) for name, weight in linear_qkv.items()} == shapes
    changed = {name for name, weight in wide.items() if tuple(weight.shape) != shapes[name]}
    assert wide.keys() == plain.keys()
    assert changed == {"transducer.layers.0.out.weight", "transducer.layers.1.out.weight"}
    assert wide["transducer.layers.0.out.weight"].shape == (16, 3 * 16)


def test_blocked_attention_equals_the_reference_in_outputs_and_gradients() -> None:
    results = {}
    batch = make_batch([70, 0, 9], [3, 2, 1])
    for backend in ("torch", "reference"):
        model = make_model(
            make_config(attention_backend=backend, truncate_after_layer=1, truncate_to=6)
        )
        logits = model(batch)
        logits.square().sum().backward()
        grads = {
            name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None
        }
        results[backend] = logits, grads
    (logits, grads), (expected, expected_grads) = results["torch"], results["reference"]
    torch.testing.assert_close(logits, expected)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-5, msg=name)


def test_action_rows() -> None:
    """Set, known and absent, unknown: the row, nothing, the unknown row, whatever the bit says."""
    encoder = ActionEncoder(num_actions=3, dim=2, d_model=4)
    encoder.mlp = torch.nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    rows = encoder(
        torch.tensor([0b101], dtype=torch.int32), torch.tensor([0b011], dtype=torch.int32)
    )
    expected = torch.cat([encoder.set_rows[0], torch.zeros(2), encoder.unknown_rows[2]])
    assert torch.equal(rows[0], expected)


def test_a_candidate_carries_no_action() -> None:
    model, batch = make_model(make_config()), make_batch([4], [2])
    marked = replace(
        batch, action_mask=batch.action_mask.clone(), known_mask=batch.known_mask.clone()
    )
    marked.action_mask[-2:], marked.known_mask[-2:] = 7, 7
    assert torch.equal(model(marked), model(batch))


def test_a_learned_candidate_action_is_added_to_candidates_alone() -> None:
    batch = make_batch([4, 2], [2, 1])
    torch.manual_seed(0)
    plain = RankingModel(make_config(), VOCAB, RATES).eval()
    torch.manual_seed(0)
    learned = RankingModel(make_config(candidate_action="learned"), VOCAB, RATES).eval()
    assert learned.state_dict().keys() - plain.state_dict().keys() == {"encoder.candidate_action"}
    # it starts at zero, every other weight as without it
    assert torch.equal(learned(batch), plain(batch))
    constant = learned.encoder.candidate_action
    assert constant is not None
    with torch.no_grad():
        constant.copy_(torch.arange(16.0))
    added = learned.encoder(batch).x_TE - plain.encoder(batch).x_TE
    # 2 context tokens each
    is_candidate = torch.tensor([0] * 6 + [1] * 2 + [0] * 4 + [1], dtype=torch.bool)
    torch.testing.assert_close(added, is_candidate[:, None] * torch.arange(16.0))
    learned(batch).sum().backward()
    assert constant.grad is not None
    assert constant.grad.abs().max() > 0


def test_training_reads_a_share_of_the_item_ids_as_unknown() -> None:
    cfg = make_config()
    cfg = replace(cfg, features=replace(cfg.features, item_id_dropout=0.4))
    model, batch = make_model(cfg), make_batch([300, 0, 200], [60, 40, 0])
    batch = replace(batch, item_codes=batch.item_codes.clamp(min=1))
    seen: list[torch.Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].item_codes))
    torch.manual_seed(0)
    plain = model(batch)
    assert torch.equal(seen.pop(), batch.item_codes), "a served id is read as it is"
    model.train()(batch)
    (read,) = seen
    dropped = read[:, 0] == 0
    assert torch.equal(read[~dropped], batch.item_codes[~dropped]) and torch.equal(
        read[:, 1:], batch.item_codes[:, 1:]
    )
    is_target = target_mask(batch.seq_offsets, batch.num_targets, batch.num_tokens)
    for rows in (is_target, ~is_target):
        assert 0.25 < dropped[rows].double().mean() < 0.55
    unknown = model.eval()(replace(batch, item_codes=read))  # as an item that training never saw
    assert (unknown - plain).abs().max() > 1e-3


def test_time_buckets() -> None:
    gaps = torch.tensor([-1, 0, 1, 1000, 86_400_000, 2**40])
    buckets = time_bucket(gaps, 64)
    assert buckets[0] == 0
    assert buckets[1] == 1
    assert buckets[-1] == 63
    assert buckets.diff().min() > 0


@pytest.mark.parametrize(
    ("window", "full_rows", "prefix"), [(None, 0, 0), (0, 0, 0), (2, 3, 2), (1, 0, 3), (3, 9, 1)]
)
def test_kept_pairs_are_those_of_the_mask(window: int | None, full_rows: int, prefix: int) -> None:
    lengths, targets = [9, 4, 1, 12], [2, 4, 0, 1]
    expected = sum(
        int(semi_local_mask(n, t, window, full_rows, prefix).sum())
        for n, t in zip(lengths, targets, strict=True)
    )
    offsets = torch.tensor([0, 9, 13, 14, 26])
    assert kept_pairs(offsets, torch.tensor(targets), None, window, full_rows, prefix) == expected


def test_work_of_a_batch_by_hand() -> None:
    """One user of 2 context tokens, 6 events, 1 candidate; window 0, no full rows; 3 events left in
    layer two.
    """
    attention = {"window": 0, "full_rows": 0, "scaling_seq_len": 16}
    cfg = make_config(attention=attention, truncate_after_layer=1, truncate_to=3)
    work = count_work(make_batch([6], [1]), cfg)
    assert (work.tokens, work.truncated_tokens, work.candidates) == (9, 3, 1)
    # context 1 + 2, each event the prefix and itself, the candidate all and itself
    first, second = 3 + 6 * 3 + 9, 3 + 3 * 3 + 6
    assert work.kept_pairs == first + second
    assert work.masked_pair_share == pytest.approx(1 - (first + second) / (2 * 45))


def test_work_of_fused_layers_by_hand() -> None:
    """The same batch on a GPU in half precision: layer one makes the 2 context tokens, 3 events and
    the candidate that layer two reads, and K and V of the other 3 events, which see 3 keys each.
    """
    attention = {"window": 0, "full_rows": 0, "scaling_seq_len": 16}
    cfg = make_config(attention=attention, truncate_after_layer=1, truncate_to=3)
    on_gpu = replace(cfg, train=replace(cfg.train, use_gpu=True, precision="bf16"))
    saved = count_work(make_batch([6], [1]), cfg).flops
    saved -= count_work(make_batch([6], [1]), on_gpu).flops

    # width 16, 2 heads of 8
    queries, output, pair = 2 * 16 * 32, 2 * 16 * 16, 2 * 2 * (8 + 8)
    assert saved == 3 * (queries + output + 3 * pair)


def test_a_wide_output_layer_costs_three_times_the_narrow_one() -> None:
    """Of 2 heads of 8, width 16: 9 tokens in the first layer, the candidate alone in the last."""
    narrow, wide = (
        count_work(make_batch([6], [1]), make_config(concat_ua=on)) for on in (False, True)
    )
    assert wide.flops - narrow.flops == 2 * (9 + 1) * (2 * 16) * 16


def test_towers_cost_a_hidden_layer_for_each_task() -> None:
    found = []
    for own in (False, True):
        cfg = make_config(task_towers=own)
        found.append(head_flops(cfg.features, cfg.model, len(cfg.tasks), 3))

    shared, towers = found
    assert shared == 2 * 3 * (16 * 8 + 8 * 2)  # d 16, hidden 8, 2 tasks, 3 candidates
    assert towers == 2 * 3 * (16 * 8 * 2 + 8 * 2)


def test_artifact_keeps_scores_and_refuses_damage(tmp_path, monkeypatch) -> None:
    cfg = make_config()
    model, batch = make_model(cfg).float(), make_batch([5, 2], [2, 1])
    maps = make_maps()
    save_model(tmp_path / "model", model, cfg, maps, {"steps": 3})
    loaded = load_model(tmp_path / "model")
    assert torch.equal(loaded.model(batch), model(batch))
    assert (loaded.cfg, loaded.extra) == (cfg, {"steps": 3})
    assert np.array_equal(loaded.maps.item_codes, maps.item_codes)
    save_model(tmp_path / "model", model, cfg, maps, {"steps": 4})  # takes the place of the first
    assert load_model(tmp_path / "model").extra == {"steps": 4}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"corrupted: model\.safetensors"):
        load_model(tmp_path / "model")
    (tmp_path / "model" / "artifact.json").unlink()
    with pytest.raises(UserError, match="half-written"):
        load_model(tmp_path / "model")
    with pytest.raises(UserError, match="no model at"):
        load_model(tmp_path / "nothing")
