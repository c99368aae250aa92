"""Baseline encoders: what a candidate sees, each against its definition on one sequence, their work
by hand.
"""

import math
import typing
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.batches.collate import SequenceBatch
from pipeline.config import ConfigError, ModelConfig, RunConfig
from pipeline.model.encoders import ENCODERS, check_model
from pipeline.model.encoders.hstu import HSTU, asked_times, token_times
from pipeline.model.ranker import RankingModel
from pipeline.model.tokens import Tokens, target_mask
from pipeline.model.work import count_work
from pipeline.train import loop
from tests.worlds.model import (
    RATES,
    VOCAB,
    make_batch,
    make_config,
    make_maps,
    make_model,
    tokens_at,
)
from tests.worlds.training import Loader, train_config

CAUSAL = {"window": None, "scaling_seq_len": 16}
BASELINES = {
    "hstu": {"encoder": "hstu"},
    "hstu with bias": {"encoder": "hstu", "relative_bias": True},
    "hstu_merged": {"encoder": "hstu_merged"},
    "hstu_merged with bias": {"encoder": "hstu_merged", "relative_bias": True},
    "transformer": {"encoder": "transformer"},
    "sasrec": {"encoder": "sasrec"},
    "din": {"encoder": "din"},
    "fuxi_alpha": {"encoder": "fuxi_alpha"},
    "fuxi_beta": {"encoder": "fuxi_beta"},
    "lares": {"encoder": "lares", "num_layers": 1, "loop": {"pre_layers": 1, "steps": 2}},
    "lares of blocks": {
        "encoder": "lares",
        "loop": {"layer": "transformer", "join": "gate", "steps": 1},
    },
}
each_baseline = pytest.mark.parametrize("settings", BASELINES.values(), ids=BASELINES)


def baseline_config(settings: dict) -> RunConfig:
    return make_config(**({"attention": CAUSAL, "ffn_dim": 12} | settings))


def asked_at_once(batch: SequenceBatch) -> SequenceBatch:
    """Each sequence's candidates as one request, at the time of its newest event."""
    is_target = target_mask(batch.seq_offsets, batch.num_targets, batch.num_tokens)
    return replace(batch, gap_ms=batch.gap_ms.masked_fill(is_target, 0))


@each_baseline
def test_candidates_see_their_own_history_and_not_each_other(settings: dict) -> None:
    model = make_model(baseline_config(settings))
    batch = asked_at_once(make_batch([7, 3, 0], [3, 2, 1]))
    whole = model(batch)
    alone = tokens_at(
        batch,
        torch.tensor([0, 1, 2, 3, 4, 5, 6, 8]),
        seq_offsets=torch.tensor([0, 8]),
        num_targets=torch.tensor([1], dtype=torch.int32),
        user_codes=batch.user_codes[:1],
        max_seq_len=8,
    )
    torch.testing.assert_close(model(alone), whole[[1]])
    acted = batch.action_mask.clone()
    acted[0] ^= 1  # the oldest event of the first user
    known = batch.known_mask.index_fill(0, torch.tensor([0]), 7)
    other = model(replace(batch, action_mask=acted, known_mask=known))
    assert (other[:3] - model(replace(batch, known_mask=known))[:3]).abs().min() > 1e-6
    assert torch.equal(other[3:], whole[3:])


@each_baseline
def test_both_layouts_score_the_same(settings: dict) -> None:
    """A candidate that sees only a part of the pass: as if that part were the whole history."""
    model, batch = make_model(baseline_config(settings)), make_batch([9, 2], [3, 1])
    visible = [2, 0, 6, 1]
    # requests at the times of the events that follow
    batch.gap_ms[9:12] = batch.gap_ms[[2, 0, 6]]
    one_pass = model(replace(batch, target_visible=torch.tensor(visible, dtype=torch.int32)))
    for i, seen in enumerate(visible[:3]):
        request = tokens_at(
            batch,
            torch.tensor([*range(seen), 9 + i]),
            seq_offsets=torch.tensor([0, seen + 1]),
            num_targets=torch.tensor([1], dtype=torch.int32),
            user_codes=batch.user_codes[:1],
            max_seq_len=seen + 1,
        )
        torch.testing.assert_close(model(request), one_pass[[i]])


@each_baseline
def test_the_trainer_reaches_every_parameter(settings: dict) -> None:
    cfg = train_config(epochs=1)
    small = replace(baseline_config(settings), train=cfg.train, seed=3)
    before = RankingModel(small, VOCAB, RATES)
    torch.manual_seed(small.seed)
    before = RankingModel(small, VOCAB, RATES).state_dict()
    after = loop.train(small, make_maps(), Loader(), "data").state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


CHANNELS = {
    "clicks": {"actions": ["is_click"], "attention": CAUSAL, "num_layers": 1},
    "newest": {"max_len": 3, "num_layers": 1},
}
ENCODED = {
    **BASELINES,
    "ultra_hstu": {"attention": {"window": 2, "full_rows": 2, "scaling_seq_len": 16}},
    "ultra_hstu truncated": {"truncate_after_layer": 1, "truncate_to": 2},
    "ultra_hstu of two tokens": {"merge": False},
    "ultra_hstu of channels": {"channels": CHANNELS},
}


@pytest.mark.parametrize("settings", ENCODED.values(), ids=ENCODED)
def test_the_newest_history_row_is_that_of_the_history_alone(settings: dict) -> None:
    """With candidates behind it or without them; zeros for a user without history."""
    model = make_model(baseline_config(settings))
    batch = asked_at_once(make_batch([7, 0, 4], [3, 2, 0]))
    acted = torch.full_like(batch.action_mask, 7)
    batch = replace(batch, action_mask=acted, known_mask=acted)
    histories = tokens_at(
        batch,
        torch.tensor([*range(7), *range(12, 16)]),
        seq_offsets=torch.tensor([0, 7, 7, 11]),
        num_targets=torch.zeros(3, dtype=torch.int32),
        max_seq_len=7,
    )

    together, alone = (
        model.transducer(model.encoder(part), part, last_history=True)
        for part in (batch, histories)
    )
    unasked = model.transducer(model.encoder(batch), batch)
    assert unasked.last_history_row is None
    torch.testing.assert_close(unasked.candidate_rows, together.candidate_rows)

    if settings.get("encoder") == "din":  # its history rows depend on no other: there is none
        assert together.last_history_row is None
        return
    rows = together.last_history_row
    assert rows.shape == (3, model.transducer.width)
    torch.testing.assert_close(rows, alone.last_history_row)
    assert torch.equal(rows[1], torch.zeros_like(rows[1]))
    assert rows[0].abs().max() > 0.1
    assert rows[2].abs().max() > 0.1


def test_the_newest_history_row_by_hand() -> None:
    """Of STU layers it is the last norm of the token before the candidates."""
    model, batch = make_model(baseline_config({"encoder": "hstu_merged"})), make_batch([4], [1])
    tokens = model.encoder(batch)
    x = tokens.x_TE
    for layer in model.transducer.layers:
        x = layer(replace(tokens, x_TE=x))
    encoded = model.transducer(tokens, batch, last_history=True)
    # 2 context rows, 4 events
    torch.testing.assert_close(encoded.last_history_row, model.transducer.norm_out(x[[5]]))


def test_the_configuration_names_the_encoders_that_there_are() -> None:
    hints = typing.get_type_hints(ModelConfig)
    assert set(typing.get_args(hints["encoder"])) == ENCODERS.keys()


def test_hstu_reads_an_item_and_then_its_action() -> None:
    cfg = baseline_config({"encoder": "hstu"})
    model, batch = make_model(cfg), make_batch([2, 1], [1, 2])
    tokens = model.encoder(
        replace(batch, target_visible=torch.tensor([1, 0, 1], dtype=torch.int32))
    )
    encoder = model.encoder
    items, actions = (
        encoder.add_position_and_time(part(batch), batch)
        for part in (encoder.item_rows, encoder.action_rows)
    )
    context = encoder.context(batch.user_codes)  # pyright: ignore[reportOptionalCall]
    first = [*context[0], items[0], actions[0], items[1], actions[1], items[2]]
    second = [*context[1], items[3], actions[3], items[4], items[5]]
    torch.testing.assert_close(tokens.x_TE, torch.stack(first + second))
    assert tokens.seq_offsets.tolist() == [0, 7, 13]
    assert tokens.target_visible is not None
    assert tokens.target_visible.tolist() == [4, 2, 4]  # 2 context tokens, then 2 tokens an event
    assert tokens.max_seq_len >= 7
    assert tokens.lengths_on_host().tolist() == [[7, 6], [1, 2]]


def test_times_of_tokens_are_summed_gaps() -> None:
    """History gaps none, 5, 7, none, 9 ms; candidates after two, no and all rows, 100, none and 3
    ms later.
    """
    batch = replace(
        make_batch([5], [3]),
        gap_ms=torch.tensor([-1, 5, 7, -1, 9, 100, -1, 3]),
        target_visible=torch.tensor([2, 0, 5], dtype=torch.int32),
    )
    merged = [0, 5, 12, 12, 21, 105, 0, 24]
    assert token_times(batch, 2, False).tolist() == [0, 0, *merged]
    assert token_times(batch, 1, True).tolist() == [
        0,
        0,
        0,
        5,
        5,
        12,
        12,
        12,
        12,
        21,
        21,
        105,
        0,
        24,
    ]
    # older rows left out
    cut = replace(batch, gap_ms=batch.gap_ms.index_fill(0, torch.tensor([0]), 1000))
    assert token_times(cut, 2, False).tolist() == [0, 0, *merged]


def test_rows_ask_about_the_time_of_the_next_event() -> None:
    tokens = Tokens(
        x_TE=torch.zeros(11, 1),
        seq_offsets=torch.tensor([0, 6, 8, 11]),
        num_targets=torch.tensor([2, 0, 1], dtype=torch.int32),
        target_visible=None,
        max_seq_len=6,
    )
    #      c  h0 h1 h2  x   y | h0 h1 | c h0 x
    time = [0, 0, 5, 12, 12, 30, 0, 9, 0, 0, 4]
    asked = [0, 5, 12, 30, 12, 30, 9, 9, 0, 4, 4]
    assert asked_times(tokens, torch.tensor(time)).tolist() == asked


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("encoder", ["hstu", "hstu_merged"])
def test_hstu_by_its_definition(encoder: str, biased: bool) -> None:
    """Logits and gradients of a pass, whose candidates see parts of the history, against a loop
    over pairs of tokens: arXiv:2402.17152, eq. 1-3.
    """
    model = make_model(baseline_config({"encoder": encoder, "relative_bias": biased}))
    visible = torch.tensor([1, 0, 4, 2], dtype=torch.int32)
    batch = replace(make_batch([4, 2], [3, 1]), target_visible=visible)
    first = plain_hstu(model, batch, 0, 4, [1, 0, 4], num_tokens=1 + (encoder == "hstu"))
    second = plain_hstu(model, batch, 7, 2, [2], num_tokens=1 + (encoder == "hstu"))
    expected = model.score_rows(torch.cat([first, second]), batch)
    found = model(batch)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)

    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    parameters = list(model.parameters())
    gradients = [
        torch.autograd.grad((logits * weight).sum(), parameters) for logits in (found, expected)
    ]
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.to_dense(), plain.to_dense(), rtol=1e-5, atol=1e-6)


def plain_hstu(
    model: RankingModel,
    batch: SequenceBatch,
    begin: int,
    num_history: int,
    visible: list[int],
    num_tokens: int,
) -> torch.Tensor:
    """Candidates' rows of the sequence that begins at row `begin`, of 2 context tokens and
    `num_tokens` an event.
    """
    encoder, silu = model.encoder, torch.nn.functional.silu
    rows = range(begin, begin + num_history + len(visible))
    item = encoder.add_position_and_time(encoder.item_rows(batch), batch)
    action = encoder.action_rows(batch)
    tokens = list(encoder.context(batch.user_codes)[int(begin > 0)])  # pyright: ignore[reportOptionalCall]
    for row in rows:
        is_candidate = row >= begin + num_history
        if num_tokens == 1:
            tokens.append(item[row] + action[row])
        else:
            tokens.append(item[row])
            if not is_candidate:
                tokens.append(encoder.add_position_and_time(action, batch)[row])

    # positions seen, and the place from which distances count
    length = 2 + num_tokens * num_history
    seen = [[*range(row + 1)] for row in range(length)]
    place = list(range(length))
    for number, count in enumerate(visible):
        seen.append([*range(2 + num_tokens * count), length + number])
        place.append(2 + num_tokens * count)

    x = torch.stack(tokens)
    all_tokens = encoder(batch)
    time_T = token_times(batch, 2, interleaved=num_tokens == 2)
    asked_T = asked_times(all_tokens, time_T)
    where = slice(0, len(x)) if begin == 0 else slice(len(time_T) - len(x), None)
    time, asked = time_T[where].tolist(), asked_T[where].tolist()

    assert isinstance(model.transducer, HSTU)
    for depth, layer in enumerate(model.transducer.layers):
        uvqk = silu(layer.uvqk(layer.norm_in(x)))  # pyright: ignore
        u, q, k, v = uvqk.split(16, dim=1)
        made = []
        for i in range(len(x)):
            heads = [torch.zeros(8).double(), torch.zeros(8).double()]
            for j in seen[i]:
                bias = torch.zeros(()).double()
                if len(model.transducer.bias):
                    tables = model.transducer.bias[depth]
                    apart = abs(asked[i] // 1000 - time[j] // 1000)
                    bucket = min(int(math.log(max(apart, 1)) / 0.301), 128)
                    bias = tables["position"][min(max(place[i] - place[j], 0), 31)]  # pyright: ignore
                    bias = bias + tables["time"][bucket]  # pyright: ignore
                for head, part in enumerate((slice(0, 8), slice(8, 16))):
                    score = q[i, part] @ k[j, part] / 8 + bias
                    heads[head] = heads[head] + silu(score) / 16 * v[j, part]
            made.append(torch.cat(heads))
        x = x + layer.out(layer.norm_attn(torch.stack(made)) * u)  # pyright: ignore
    return model.transducer.norm_out(x[length:])


def test_a_retrieval_model_asks_about_each_row_s_own_time() -> None:
    cfg = baseline_config({"encoder": "hstu_merged", "relative_bias": True})
    batch = make_batch([4], [1])
    later = replace(batch, gap_ms=batch.gap_ms.index_fill(0, torch.tensor([4]), 10**9))

    def newest_row(cfg: RunConfig, batch: SequenceBatch) -> torch.Tensor:
        return make_model(cfg).encode(batch, last_history=True).last_history_row

    assert not torch.equal(newest_row(cfg, batch), newest_row(cfg, later))
    retrieval = replace(cfg.retrieval, enabled=True, positives=("is_like",))
    cfg = replace(cfg, retrieval=retrieval)
    assert torch.equal(newest_row(cfg, batch), newest_row(cfg, later))


def test_the_bias_starts_each_layer_with_tables_of_its_own() -> None:
    model = make_model(baseline_config({"encoder": "hstu", "relative_bias": True}))
    assert isinstance(model.transducer, HSTU)
    batch = make_batch([4], [1])
    before = model(batch)
    for layer in range(2):
        table = model.transducer.bias[layer]["time"]
        with torch.no_grad():
            table += 1.0
        after = model(batch)
        assert (after - before).abs().max() > 1e-6
        before = after


def one_sequence(cfg: RunConfig) -> tuple[RankingModel, torch.Tensor, torch.Tensor]:
    """A model, its tokens of 2 context rows, 4 events and 1 candidate, and what it makes of the
    candidate.
    """
    model, batch = make_model(cfg), make_batch([4], [1])
    tokens = model.encoder(batch)
    return model, tokens.x_TE, model.transducer(tokens, batch).candidate_rows[0]


def softmax_attention(
    layer: torch.nn.Module, query: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """Plain causal attention of one sequence, head by head."""
    q, k, v = layer.query(query), layer.key(keys), layer.value(keys)
    hidden = torch.ones(len(q), len(q)).triu(1).bool()
    heads = [
        ((a @ b.T) * 8**-0.5).masked_fill(hidden, float("-inf")).softmax(-1) @ c
        for a, b, c in zip(q.split(8, 1), k.split(8, 1), v.split(8, 1), strict=True)
    ]
    return layer.out(torch.cat(heads, dim=1))


def test_transformer_by_its_definition() -> None:
    model, x, out = one_sequence(baseline_config({"encoder": "transformer", "num_layers": 1}))
    (layer,) = model.transducer.layers
    normed = layer.norm_attn(x)
    x = x + softmax_attention(layer.attention, normed, normed)
    x = x + layer.ffn(layer.norm_ffn(x))
    torch.testing.assert_close(model.transducer.norm_out(x[-1]), out)


def test_sasrec_by_its_definition() -> None:
    model, x, out = one_sequence(baseline_config({"encoder": "sasrec", "num_layers": 1}))
    (layer,) = model.transducer.layers
    query = torch.nn.functional.layer_norm(x, (16,), eps=1e-8)
    x = torch.nn.functional.layer_norm(
        query + softmax_attention(layer.attention, query, x), (16,), eps=1e-8
    )
    x = x + layer.ffn(x)
    torch.testing.assert_close(model.transducer.norm_out(x[-1]), out)


@pytest.mark.parametrize("encoder", ["fuxi_alpha", "fuxi_beta"])
def test_fuxi_by_its_definition(encoder: str) -> None:
    """A loop over pairs of rows; the time of a row is that of `token_times`."""
    cfg = baseline_config({"encoder": encoder, "num_layers": 1})
    model, x, out = one_sequence(cfg)
    (layer,) = model.transducer.layers
    batch, silu = make_batch([4], [1]), torch.nn.functional.silu
    time = token_times(batch, 2, interleaved=False).tolist()
    u, v, *qk = silu(layer.uvqk(rms_norm(x))).split(layer.widths, dim=1)

    rows = []
    for i in range(len(x)):
        position, elapsed, latent = (torch.zeros(16).double() for _ in range(3))
        for j in range(i + 1):
            gap = time[i] - time[j]
            position += layer.position[i - j] * v[j]
            if encoder == "fuxi_beta":
                elapsed += layer.time[0] * (gap + 1) ** -layer.time[1] * v[j]
                continue
            bucket = min(int(math.log(max(gap, 1)) / 0.301), 128)
            elapsed += layer.time[bucket] * v[j]
            heads = [
                silu(a @ b) / 16
                for a, b in zip(*(y.split(8) for y in (qk[0][i], qk[1][j])), strict=True)
            ]
            latent += torch.cat([heads[0] * v[j][:8], heads[1] * v[j][8:]])
        rows.append(torch.cat([latent, position, elapsed][encoder == "fuxi_beta" :]))

    z = layer.out(u * rms_norm(torch.stack(rows))) + x
    normed = rms_norm(z)
    z = z + layer.ffn_out(silu(layer.ffn_in(normed)) * layer.ffn_gate(normed))
    torch.testing.assert_close(model.transducer.norm_out(z[-1]), out, rtol=1e-5, atol=1e-6)


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()


def test_lares_by_its_definition() -> None:
    loop = {"layer": "transformer", "pre_layers": 1, "steps": 3}
    model, x, out = one_sequence(
        baseline_config({"encoder": "lares", "num_layers": 1, "loop": loop})
    )

    def block(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        normed = layer.norm_attn(x)
        x = x + softmax_attention(layer.attention, normed, normed)
        return x + layer.ffn(layer.norm_ffn(x))

    lares = model.transducer
    h = block(lares.pre[0], x)
    state = torch.zeros_like(h)
    for _ in range(3):
        joined = lares.join.both(torch.cat([state, h], dim=1))
        state = block(lares.core[0], lares.norm_step(joined))
    torch.testing.assert_close(lares.norm_out(state[-1]), out)


def test_din_by_its_definition() -> None:
    model, x, out = one_sequence(baseline_config({"encoder": "din"}))
    c = x[-1]
    interest = sum(model.transducer.weight(torch.cat([c, h, c - h, c * h])) * h for h in x[:-1])
    torch.testing.assert_close(
        model.transducer.norm_out(model.transducer.out(torch.cat([interest, c]))), out
    )


def stu_layer(tokens: int, rows: int, pairs: int) -> int:
    """K and V of the tokens; U, Q and the output of the rows."""
    return 2 * 16 * (32 * tokens + 32 * rows + 16 * rows) + 2 * pairs * 2 * 16


def softmax_block(tokens: int, rows: int, pairs: int) -> int:
    return 2 * 16 * (32 * tokens + 32 * rows + 2 * 12 * rows) + 2 * pairs * 2 * 16


@pytest.mark.parametrize(
    ("encoder", "by_hand"),
    [  # 2 context rows, 4 events, 1 candidate; d 16, 2 heads of 8, ffn 12, 2 layers
        ("hstu_merged", stu_layer(7, 7, 28) + stu_layer(7, 1, 7)),
        ("hstu", stu_layer(11, 11, 66) + stu_layer(11, 1, 11)),
        ("transformer", softmax_block(7, 7, 28) + softmax_block(7, 1, 7)),
        ("sasrec", softmax_block(7, 7, 28) + softmax_block(7, 1, 7)),
        ("din", 2 * 6 * (64 * 12 + 12) + 2 * 32 * 16),
    ],
)
def test_work_by_hand(encoder: str, by_hand: int) -> None:
    # content 8 → 32 → 16, actions 3·8 → 16 → 16, context 2 → 16 and 3 → 16, head 16 → 8 → 2
    around = 2 * 5 * (8 * 32 + 32 * 16 + 24 * 16 + 16 * 16) + 2 * (2 + 3) * 16 + 2 * 8 * (16 + 2)
    assert (
        count_work(make_batch([4], [1]), baseline_config({"encoder": encoder})).flops
        == around + by_hand
    )


@pytest.mark.parametrize("encoder", ENCODERS)
def test_work_is_what_pytorch_counts_but_for_the_mask(encoder: str) -> None:
    """PyTorch counts every product of a layer; attention, which it counts unmasked or not at all,
    is taken out.
    """
    cfg = baseline_config({"encoder": encoder})
    model, batch = RankingModel(cfg, VOCAB, RATES).eval(), make_batch([7, 3], [3, 2])
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(batch)
    counted = counter.get_flop_counts()["Global"]
    linear = counted[torch.ops.aten.addmm] + counted.get(torch.ops.aten.mm, 0)
    work = count_work(batch, cfg)
    width = {"din": 0, "fuxi_alpha": 4 * 8}.get(encoder, 2 * 8)  # of a pair, in each head
    # 2 context rows; of the last layer only the candidates ask
    histories = (16, 8) if encoder == "hstu" else (9, 5)
    of_histories = 0 if encoder == "din" else sum(n * (n + 1) // 2 for n in histories)
    kept = work.kept_pairs - of_histories
    attention = 2 * kept * 2 * width
    assert linear == work.flops - attention
    on_gpu = replace(cfg, train=replace(cfg.train, use_gpu=True))
    assert encoder == "din" or count_work(batch, on_gpu).flops > work.flops


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"attention": {"window": 4}},
            "model.attention.window must be null where model.encoder is hstu, got 4",
        ),
        ({"truncate_after_layer": 1}, "model.truncate_after_layer must be null"),
        ({"candidate_action": "learned"}, "model.candidate_action must be none"),
    ],
)
def test_settings_that_a_baseline_would_ignore_are_refused(settings: dict, message: str) -> None:
    cfg = make_config(**({"encoder": "hstu", "attention": CAUSAL} | settings))
    with pytest.raises(ConfigError, match=message):
        check_model(cfg.model)


def test_ultra_hstu_has_no_relative_bias() -> None:
    with pytest.raises(ConfigError, match=r"model\.relative_bias"):
        check_model(make_config(relative_bias=True).model)
