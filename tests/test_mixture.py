"""A mixture of transducers against its definition: which rows a channel reads, and that no label
leaks through it.
"""

from dataclasses import replace

import pytest
import torch

from pipeline.batches.collate import SequenceBatch
from pipeline.config import ChannelConfig, ConfigError
from pipeline.model.artifact import load_model, save_model
from pipeline.model.encoders.encoder import candidate_rows
from pipeline.model.encoders.mixture import filter_rows, newest_rows
from pipeline.model.encoders.transducer import Transducer
from pipeline.model.encoders.ultra_hstu import UltraHSTU
from pipeline.model.ranker import RankingModel
from pipeline.model.tokens import Tokens
from pipeline.model.work import action_flops, count_work, head_flops, input_flops
from tests.worlds.mixture import ENGAGED, EVERY_ROW, SEMI_LOCAL, make_mixture
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

ACTIONS = ("is_click", "is_like", "is_hate")
CLICK, LIKE, HATE = 1, 2, 4


def with_actions(
    batch: SequenceBatch, action_mask: list[int], known_mask: list[int]
) -> SequenceBatch:
    return replace(
        batch,
        action_mask=torch.tensor(action_mask, dtype=torch.int32),
        known_mask=torch.tensor(known_mask, dtype=torch.int32),
    )


def test_filter_by_hand() -> None:
    """[c | a1 a2 a3 a4 | x y] and [c | b1 | z]: rows with a known like or hate."""
    names = ["c", "a1", "a2", "a3", "a4", "x", "y", "c", "b1", "z"]
    batch = with_actions(
        make_batch([4, 1], [2, 1]),
        [LIKE, CLICK, CLICK | HATE, LIKE, 0, 0, CLICK, 0],  # without context
        [7, 7, 7, CLICK, 0, 0, 7, 0],  # of a4 the like is not known
    )
    tokens = Tokens(
        x_TE=torch.arange(10.0)[:, None],
        seq_offsets=torch.tensor([0, 7, 10]),
        num_targets=batch.num_targets,
        # x sees c a1 a2; y sees all four; z sees c b1
        target_visible=torch.tensor([3, 5, 2], dtype=torch.int32),
        max_seq_len=7,
    )
    channel = ChannelConfig(actions=("is_hate", "is_like"))
    rows = filter_rows(tokens, batch, channel, ACTIONS)
    assert [names[int(i)] for i in rows.x_TE[:, 0]] == ["c", "a1", "a3", "x", "y", "c", "z"]
    assert rows.seq_offsets.tolist() == [0, 5, 7]
    assert rows.target_visible is not None
    # x is left with c a1, y with c a1 a3, z with c
    assert rows.target_visible.tolist() == [2, 3, 1]
    # a bound of the lengths: 8 as a power of two, 7 before
    assert (rows.max_seq_len, rows.num_targets.tolist()) == (7, [2, 1])

    newest = newest_rows(rows, replace(channel, max_len=1), num_context=1)
    assert [names[int(i)] for i in newest.x_TE[:, 0]] == ["c", "a3", "x", "y", "c", "z"]
    assert newest.target_visible is not None
    assert newest.target_visible.tolist() == [1, 2, 1]
    assert filter_rows(tokens, batch, ChannelConfig(), ACTIONS) is tokens


def test_mixture_equals_dense_computation() -> None:
    """Rows picked by Python, layers with dense masks, one request: filter, newest rows, own depth,
    mask, truncation.
    """
    engaged_mask, mask = {**SEMI_LOCAL, "window": 1, "full_rows": 1}, {**SEMI_LOCAL, "full_rows": 2}
    cfg = make_mixture(
        "request",
        engaged={**ENGAGED, "max_len": 3, "attention": engaged_mask},
        all={"num_layers": 3, "attention": mask, "truncate_after_layer": 2, "truncate_to": 4},
    )
    model = make_model(cfg)
    batch = with_actions(
        make_batch([9], [2]), [2, 1, 4, 0, 7, 2, 1, 6, 2, 0, 0], [7, 7, 7, 7, 7, 0, 7, 7, 6, 0, 0]
    )
    engaged = [0, 2, 4, 7, 8]
    assert isinstance(model.transducer, UltraHSTU)
    first, second = model.transducer.transducers
    assert isinstance(first, Transducer)
    assert isinstance(second, Transducer)
    assert [len(first.layers), len(second.layers)] == [1, 3]
    whole = model.encoder(batch).x_TE  # 2 context tokens, 9 events, 2 candidates
    x = dense_layer(first.layers[0], whole[[0, 1, *(2 + i for i in engaged[-3:]), 11, 12]])
    y = dense_layer(second.layers[1], dense_layer(second.layers[0], whole))
    y = dense_layer(second.layers[2], y[[0, 1, 7, 8, 9, 10, 11, 12]])
    expected = model.heads(torch.cat([first.norm_out(x[-2:]), second.norm_out(y[-2:])], dim=1))
    torch.testing.assert_close(model(batch), expected.float())


def test_one_channel_over_every_row_is_the_plain_model() -> None:
    plain = make_model(make_config())
    mixture = RankingModel(
        make_mixture(all={"attention": {**SEMI_LOCAL, "full_rows": 2}}), VOCAB, RATES
    )
    mixture.double().eval().load_state_dict(
        {
            name.replace("transducer.", "transducer.transducers.0."): w
            for name, w in plain.state_dict().items()
        }
    )
    batch = make_batch([7, 0, 3], [3, 1, 2])
    assert torch.equal(mixture(batch), plain(batch))


def test_no_candidate_learns_of_a_later_label_through_a_filter() -> None:
    """What is done later, known or not, is nothing to a candidate; visible rows are."""
    model, batch = make_model(make_mixture()), make_batch([9], [3])
    batch = replace(batch, target_visible=torch.tensor([2, 5, 9], dtype=torch.int32))
    # row 5: the own row of the candidate that sees five
    batch.action_mask[5], batch.known_mask[5] = CLICK, 7
    before = model(batch)
    for action, known in ((LIKE, 7), (LIKE | HATE, 7), (0, 7), (LIKE, 0)):
        later = replace(
            batch, action_mask=batch.action_mask.clone(), known_mask=batch.known_mask.clone()
        )
        later.action_mask[5], later.known_mask[5] = action, known
        after = model(later)
        torch.testing.assert_close(after[:2], before[:2], rtol=1e-6, atol=1e-7)
        assert (after[2] - before[2]).abs().max() > 1e-4


@pytest.mark.parametrize(
    "change",
    [
        {"attention": {"window": 2, "full_rows": 1}},
        {"max_len": 3},
        {"num_layers": 2, "truncate_after_layer": 1},
    ],
)
def test_a_filter_under_which_later_labels_count_needs_the_request_layout(change: dict) -> None:
    with pytest.raises(
        ConfigError, match=r"train\.layout must be request where model\.channels\.engaged filters"
    ):
        make_mixture(engaged={**ENGAGED, **change})
    # without a filter the number of later rows says nothing of labels
    make_mixture(all={**EVERY_ROW, **change})
    # causal: no row is special
    make_mixture(engaged={**ENGAGED, "attention": {"window": None, "full_rows": 9}})


def test_candidates_are_blind_to_each_other() -> None:
    assert_candidates_are_blind(make_model(make_mixture()))


def test_a_candidate_scores_the_same_in_both_layouts() -> None:
    model, batch = make_model(make_mixture()), make_batch([9], [3])
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


def test_every_weight_learns_and_users_without_such_rows_are_scored() -> None:
    model, batch = make_model(make_mixture()), make_batch([6, 0], [2, 1])
    empty = with_actions(batch, [0] * 9, [7] * 9)
    assert torch.isfinite(model(empty)).all()
    model(batch).square().sum().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_work_of_a_mixture_by_hand() -> None:
    """2 context tokens, 6 events of which 3 are liked, 1 candidate; window 0; 2 liked ones read; 3
    of all left.
    """
    mask = {**SEMI_LOCAL, "window": 0}
    cfg = make_mixture(
        "request",
        liked={"actions": ["is_like"], "max_len": 2, "num_layers": 1, "attention": mask},
        all={"num_layers": 2, "attention": mask, "truncate_after_layer": 1, "truncate_to": 3},
    )
    batch = with_actions(make_batch([6], [1]), [2, 0, 2, 1, 1, 3, 0], [7, 7, 7, 7, 7, 7, 0])
    work = count_work(batch, cfg)
    assert (work.candidates, work.filtered_tokens) == (1, 3)
    assert work.tokens == 6 + 9
    assert work.truncated_tokens == 1 + 3
    # context 1 + 2, each event the prefix and itself, the candidate all and itself
    layers = [(5, 3 + 2 * 3 + 5), (9, 3 + 6 * 3 + 9), (6, 3 + 3 * 3 + 6)]
    assert work.kept_pairs == sum(pairs for _, pairs in layers)
    assert work.causal_pairs == 21 + 45 + 45
    assert work.filtered_token_share == pytest.approx(3 / 18)
    heads, d_model, width = 2, 16, 8
    expected = 0
    # of each stack's last layer the candidate alone, which sees 5 and 6
    for tokens, rows, pairs in [(5, 1, 5), (9, 9, 3 + 6 * 3 + 9), (6, 1, 6)]:
        of_token, of_row = 2 * heads * width, 3 * heads * width
        expected += 2 * d_model * (tokens * of_token + rows * of_row)
        expected += 2 * pairs * heads * 2 * width
    expected += input_flops(cfg.features, cfg.model, batch.num_tokens, 1)
    expected += action_flops(cfg.model, cfg.num_action_bits, batch.num_tokens)
    expected += head_flops(cfg.features, cfg.model, len(cfg.tasks), 1)
    assert work.flops == expected


def test_artifact_of_a_mixture_keeps_scores(tmp_path) -> None:
    cfg = make_mixture()
    model, batch = make_model(cfg).float(), make_batch([5, 2], [2, 1])
    save_model(tmp_path / "model", model, cfg, make_maps(), {})
    loaded = load_model(tmp_path / "model")
    assert loaded.cfg == cfg
    assert torch.equal(loaded.model(batch), model(batch))


def test_sizes_follow_without_reading_the_device() -> None:
    """On the meta device there are no values: whoever asks for one raises."""
    batch = make_batch([4, 0, 9], [2, 1, 3])
    batch = replace(batch, target_visible=torch.tensor([3, 4, 0, 1, 5, 9], dtype=torch.int32))
    model, away = make_model(make_config()), batch.to("meta")
    tokens = model.encoder(batch)
    tensors = {
        name: getattr(tokens, name).to("meta") for name in ("x_TE", "seq_offsets", "num_targets")
    }
    moved = replace(tokens, target_visible=tokens.target_visible.to("meta"), **tensors)
    channel = ChannelConfig(actions=("is_like",), max_len=2)
    for batch_here, tokens_here in ((batch, tokens), (away, moved)):
        rows = newest_rows(
            filter_rows(tokens_here, batch_here, channel, ACTIONS), channel, num_context=2
        )
        assert rows.host_lengths is not None
        found = (
            rows.x_TE.shape,
            rows.max_seq_len,
            rows.host_lengths.tolist(),
            candidate_rows(rows).shape,
        )
        if batch_here is batch:
            assert rows.host_lengths[0].tolist() == rows.seq_offsets.diff().tolist()
            expected = found
    assert found == expected
