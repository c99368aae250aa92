"""New events onto an encoded history: keys, values and scores are those of encoding it anew."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from kernels.semi_local_attention.reference import semi_local_mask
from pipeline.config import RunConfig
from pipeline.model.inference.appending import append_history, changed_rows, first_changed_row
from pipeline.model.inference.cached_scoring import encode_history, score_candidates
from tests.test_cached import parts_of
from tests.worlds.mixture import ENGAGED, EVERY_ROW, make_mixture
from tests.worlds.model import make_batch, make_config, make_model, tokens_at

SEMI_LOCAL = {"window": 3, "full_rows": 4, "extra_prefix": 1, "scaling_seq_len": 16}
CONFIGS = {
    "causal": make_config(num_layers=3, attention={"window": None, "scaling_seq_len": 16}),
    "semi-local": make_config(num_layers=3, attention=SEMI_LOCAL),
    "window only": make_config(num_layers=3, attention={**SEMI_LOCAL, "full_rows": 0}),
    "truncated for the last layer": make_config(
        num_layers=2, attention=SEMI_LOCAL, truncate_after_layer=1, truncate_to=8
    ),
    "no truncation yet": make_config(
        num_layers=3, attention=SEMI_LOCAL, truncate_after_layer=1, truncate_to=40
    ),
}


def first_row(cfg: RunConfig, num_context: int, num_cached: int, num_rows: int) -> int | None:
    return first_changed_row(cfg.model, num_context, num_cached, num_rows)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_appended_histories_give_the_scores_of_encoding_them_anew(name: str) -> None:
    """A history that grows by one, two, five … rows, from cache to cache."""
    cfg = CONFIGS[name]
    model = make_model(cfg).float()
    batch = make_batch([31], [6])
    history, candidates = parts_of(batch)
    num_context = model.encoder.num_context

    def rows(begin: int, end: int):
        lengths = torch.tensor([0, end - begin])
        return tokens_at(
            history, torch.arange(begin, end), seq_offsets=lengths, max_seq_len=end - begin
        )

    cached, appended = 3, 0
    cache = encode_history(model, rows(0, cached))
    for length in (4, 6, 11, 12, 13, 20, 21, 31):
        first = first_row(cfg, num_context, cached, length)
        anew = encode_history(model, rows(0, length))
        if first is None:
            cache = anew
        else:
            cache = append_history(model, cache, rows(first, length), cached, length)
            appended += 1
        for got, expected in zip(cache.layers, anew.layers, strict=True):
            assert torch.equal(got.offsets, expected.offsets)
            assert_close(got.k_THD, expected.k_THD, rtol=1e-4, atol=1e-5)
            assert_close(got.v_THV, expected.v_THV, rtol=1e-4, atol=1e-5)
        cached = length
    assert appended >= 6

    ids = {id(layer.offsets) for layer in cache.layers}
    assert len(ids) == len({len(layer.k_THD) for layer in cache.layers})
    scores = score_candidates(model, cache, candidates, 100)
    assert_close(scores, model(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 2, 5, None])
@pytest.mark.parametrize("full_rows", [0, 1, 3, 6])
def test_the_first_changed_row_is_the_first_whose_sight_changes(
    window: int | None, full_rows: int
) -> None:
    cfg = make_config(
        attention={
            "window": window, "full_rows": full_rows, "extra_prefix": 1, "scaling_seq_len": 16
        }
    )  # fmt: skip
    num_context, mask = 2, (window, full_rows, 2 + 1)
    for cached in range(1, 14):
        for total in range(cached + 1, 16):
            before = semi_local_mask(num_context + cached, 0, *mask)
            after = semi_local_mask(num_context + total, 0, *mask)
            size = num_context + cached
            changed = (before != after[:size, :size]).any(1).nonzero()[:, 0].tolist()
            expected = changed[0] - num_context if changed else cached
            got = first_row(cfg, num_context, cached, total)
            assert got == (expected if expected > 0 else None), (cached, total)


SLIDING = {
    "semi-local": make_config(
        num_layers=3, attention={"window": 2, "full_rows": 4, "scaling_seq_len": 16}
    ),
    "window only": make_config(
        num_layers=2, attention={"window": 3, "full_rows": 0, "scaling_seq_len": 16}
    ),
    "truncated for the last layer": make_config(
        num_layers=2,
        attention={"window": 2, "full_rows": 3, "scaling_seq_len": 16},
        truncate_after_layer=1,
        truncate_to=6,
    ),
    "truncated into the front": make_config(
        num_layers=2,
        attention={"window": 4, "full_rows": 1, "scaling_seq_len": 16},
        truncate_after_layer=1,
        truncate_to=16,
    ),
    "one layer": make_config(
        num_layers=1, attention={"window": 2, "full_rows": 3, "scaling_seq_len": 16}
    ),
}


@pytest.mark.parametrize("name", SLIDING)
@torch.no_grad()
def test_histories_that_lose_their_oldest_rows_are_those_encoded_anew(name: str) -> None:
    """The first row has no row before it any more, and says so by its gap."""
    cfg = SLIDING[name]
    model = make_model(cfg).float()
    history, _ = parts_of(make_batch([40], [1]))

    def rows(index: list[int], begin: int):
        batch = tokens_at(
            history,
            torch.tensor(index),
            seq_offsets=torch.tensor([0, len(index)]),
            max_seq_len=len(index),
        )
        is_first = torch.tensor(index) == begin
        return replace(batch, gap_ms=batch.gap_ms.masked_fill(is_first, -1))

    begin, end, appended = 0, 24, 0
    cache = encode_history(model, rows(list(range(begin, end)), begin))
    for new_begin, new_end in ((1, 25), (2, 27), (2, 28), (5, 30), (6, 30), (16, 33)):
        every = list(range(new_begin, new_end))
        anew = encode_history(model, rows(every, new_begin))
        num_cached, num_dropped = end - begin, new_begin - begin
        context = model.encoder.num_context
        changed = changed_rows(cfg.model, context, num_cached, len(every), num_dropped)
        begin, end = new_begin, new_end
        if changed is None:
            cache = anew
            continue

        appended += 1
        asked = rows([*every[: changed.front], *every[changed.first :]], new_begin)
        cache = append_history(
            *(model, cache, asked, num_cached, len(every)),
            front=changed.front,
            num_dropped=num_dropped,
        )
        for got, expected in zip(cache.layers, anew.layers, strict=True):
            assert torch.equal(got.offsets, expected.offsets)
            assert_close(got.k_THD, expected.k_THD, rtol=1e-4, atol=1e-5)
            assert_close(got.v_THV, expected.v_THV, rtol=1e-4, atol=1e-5)
    assert appended >= 5


@pytest.mark.parametrize(("window", "full_rows"), [(0, 2), (1, 0), (2, 3), (3, 1)])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_rows_that_are_kept_know_nothing_of_what_has_left(
    window: int, full_rows: int, num_layers: int
) -> None:
    """Against the masks: a row has changed if it sees others, or one that has changed."""
    attention = {"window": window, "full_rows": full_rows, "scaling_seq_len": 16}
    cfg = make_config(num_layers=num_layers, attention=attention)
    num_kept_sizes = 0
    for cached in range(4, 18):
        for dropped in range(1, 4):
            for total in range(cached - dropped, cached - dropped + 3):
                known = cached - dropped
                changed = torch.arange(known) == 0  # its gap
                before = semi_local_mask(cached, 0, window, full_rows)[dropped:]
                after = semi_local_mask(total, 0, window, full_rows)[:known, :known]
                others = (before[:, dropped:] != after).any(1) | before[:, :dropped].any(1)
                for _ in range(num_layers - 1):
                    changed = changed | others | (after & changed).any(1)

                rows = changed_rows(cfg.model, 0, cached, total, dropped)
                if rows is not None:
                    num_kept_sizes += 1
                    assert not changed[rows.front : rows.first].any(), (cached, dropped, total)
    assert num_kept_sizes > 10


def test_where_all_is_encoded_anew() -> None:
    """Truncation that moves with layers behind it, and channels."""
    cut = replace(CONFIGS["no truncation yet"].model, truncate_to=8)
    assert first_changed_row(cut, 2, 7, 8) is not None
    assert first_changed_row(cut, 2, 8, 9) is None
    mixture = make_mixture("request", engaged=ENGAGED, all=EVERY_ROW)
    assert first_changed_row(mixture.model, 2, 20, 21) is None
    # a prefix that has left was seen by all
    prefix = replace(SLIDING["semi-local"].model.attention, extra_prefix=1)
    assert (
        changed_rows(replace(SLIDING["semi-local"].model, attention=prefix), 2, 30, 30, 1) is None
    )
    assert changed_rows(CONFIGS["causal"].model, 2, 30, 30, 1) is None
    assert changed_rows(cut, 2, 30, 30, 1) is None
