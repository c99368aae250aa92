"""Examples and batches: who sees what, against plain loops, and nothing from the future."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from kernels.position_time.reference import age_bucket
from pipeline import config
from pipeline.batches.collate import SequenceBatch, candidates, collate, query_anchored
from pipeline.batches.events import Events, row_gaps
from pipeline.batches.example_batches import example_batch
from pipeline.batches.examples import (
    UserEvents,
    request_examples,
    training_examples,
    user_events,
    whole_examples,
)
from pipeline.batches.features import FeatureMaps
from pipeline.batches.stochastic_length import cut_threshold, stochastic_cuts
from pipeline.schema import EventColumns

DAY = 86_400_000
T_VAL = config.SplitConfig().val_ms


def make_config(**train: object) -> config.RunConfig:
    return config.from_dict(
        {
            "source": {
                "kind": "synthetic",
                "actions": ["is_click", "is_like"],
                "request_columns": ["tab"],
            },
            "tasks": ["is_click", "is_like"],
            "features": {"request": {"tab": {"dim": 2}, "hour": {"dim": 2}}},
            "train": train,
        }
    )


def make_sequences(rng: np.random.Generator, num_users: int = 16, longest: int = 30) -> pa.Table:
    """Users with order_only rows, requests of several rows, times on both sides of t_val; one user
    has no rows.
    """
    rows = []
    for user in range(num_users):
        length = 0 if user == 3 else int(rng.integers(1, longest))
        num_order_only = int(rng.integers(0, length + 1)) if user % 2 else 0
        request = np.sort(rng.integers(0, max(length // 2, 1), length))
        request[:num_order_only] = np.arange(num_order_only) - num_order_only
        request = np.unique(request, return_inverse=True)[1]
        time = T_VAL - DAY + np.cumsum(rng.integers(1, DAY // 3, length + 1))[request]
        rows.append(
            {
                "user_id": 100 + user,
                "user_bucket": 0,
                "first_position": 5 if user == 1 else 0,
                "item_id": rng.integers(0, 50, length).tolist(),
                "event_time": time.tolist(),
                "action_mask": rng.integers(0, 4, length).tolist(),
                "known_mask": rng.integers(0, 4, length).tolist(),
                "watch_ms": [-1] * length,
                "request_index": request.tolist(),
                "order_only": (np.arange(length) < num_order_only).tolist(),
                "tab": rng.integers(0, 3, length).tolist(),
            }
        )
    return pa.Table.from_pylist(rows, schema=EventColumns(request=("tab",)).sequence_schema())


def make_maps(num_items: int = 40) -> FeatureMaps:
    """Items 0..39 known, 40..49 not; no side tables."""
    codes = np.arange(num_items + 1, dtype=np.int32)[:, None]
    return FeatureMaps(
        item_ids=np.arange(num_items),
        item_codes=codes,
        item_count=np.ones(num_items + 1, np.int64),
        user_ids=np.zeros(0, np.int64),
        user_codes=np.zeros((1, 0), np.int32),
        request_values={"tab": np.arange(3), "hour": np.arange(24)},
        vocab_sizes={"item_id": num_items + 1, "request.tab": 4, "request.hour": 25},
        base_rates={"is_click": 0.5, "is_like": 0.5},
    )


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_requests_see_strictly_earlier_rows_only(rng: np.random.Generator) -> None:
    cfg, table = make_config(), make_sequences(rng)
    users = user_events(table, cfg.source, cfg.features)
    examples = request_examples(users, T_VAL, 2**62)
    expected = []
    for number, row in enumerate(table.to_pylist()):
        start = int(users.events.offsets[number])
        for request in sorted(set(row["request_index"])):
            members = [i for i, r in enumerate(row["request_index"]) if r == request]
            time = row["event_time"][members[0]]
            if time >= T_VAL and not row["order_only"][members[0]]:
                seen = sum(t < time for t in row["event_time"])
                expected.append(
                    (number, start, start + seen, start + members[0], start + members[-1] + 1)
                )
    got = [
        tuple(int(getattr(examples, n)[i]) for n in examples.__slots__)
        for i in range(len(examples))
    ]
    assert got == expected
    assert len(got) > 10


@pytest.mark.parametrize("layout", ["user", "request"])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_every_training_row_is_a_target_once(
    rng: np.random.Generator, layout: str, weight: float
) -> None:
    cfg = make_config(layout=layout, history_label_weight=weight, max_targets_per_sequence=5)
    users = user_events(make_sequences(rng), cfg.source, cfg.features)
    examples = training_examples(users, cfg.split, cfg.train, rng)
    targets = np.concatenate(
        [np.arange(b, e) for b, e in zip(examples.target_begin, examples.target_end, strict=True)]
    )
    events = users.events
    wanted = (events.event_time < T_VAL) & (~events.order_only if weight == 0 else True)
    assert sorted(targets) == np.flatnonzero(wanted).tolist()
    batch = example_batch(users, examples, make_maps(), cfg, training=True)
    assert batch.target_visible is not None and batch.label_weight is not None
    begin = np.repeat(examples.history_begin, examples.target_end - examples.target_begin)
    assert (begin + batch.target_visible.numpy() == users.visible_end[targets]).all()
    known = (events.known_mask[targets, None] & np.array([1, 2])) != 0
    expected = known * np.where(events.order_only[targets], weight, 1)[:, None]
    assert np.array_equal(batch.label_weight.numpy(), expected.astype(np.float32))


def batch_rows(batch: SequenceBatch, number: int) -> dict[str, list]:
    """Sequence `number` of a batch, every column."""
    begin, end = batch.seq_offsets[number : number + 2].tolist()
    columns = ("item_codes", "request_codes", "action_mask", "known_mask", "position", "gap_ms")
    return {name: getattr(batch, name)[begin:end].tolist() for name in columns}


def test_both_layouts_give_a_candidate_the_same_columns(rng: np.random.Generator) -> None:
    cfg, table, maps = make_config(), make_sequences(rng), make_maps()
    users = user_events(table, cfg.source, cfg.features)
    by_user = example_batch(
        users, training_examples(users, cfg.split, cfg.train, rng), maps, cfg, training=True
    )
    request_cfg = make_config(layout="request")
    by_request = example_batch(
        users,
        training_examples(users, request_cfg.split, request_cfg.train, rng),
        maps,
        request_cfg,
        training=True,
    )
    names = ("item_codes", "request_codes", "position", "gap_ms")

    def target_rows(batch: SequenceBatch) -> dict[str, torch.Tensor]:
        lengths = torch.diff(batch.seq_offsets)
        within = torch.arange(batch.num_tokens) - torch.repeat_interleave(
            batch.seq_offsets[:-1], lengths
        )
        is_target = within >= torch.repeat_interleave(lengths - batch.num_targets, lengths)
        return {name: getattr(batch, name)[is_target] for name in names}

    left, right = target_rows(by_user), target_rows(by_request)
    for name in names:
        assert torch.equal(left[name], right[name]), name
    assert by_user.labels is not None and by_request.labels is not None
    assert torch.equal(by_user.labels, by_request.labels)


def corrupt_after(table: pa.Table, number: int, visible: int, cfg: config.RunConfig) -> UserEvents:
    """The same users, every row of user `number` from `visible` on turned into something else
    (items, actions).
    """
    rows = table.to_pylist()
    for i in range(visible, len(rows[number]["item_id"])):
        rows[number]["action_mask"][i] ^= 3
        rows[number]["known_mask"][i] ^= 3
        rows[number]["watch_ms"][i] = 77
    return user_events(pa.Table.from_pylist(rows, schema=table.schema), cfg.source, cfg.features)


def assert_nothing_from_the_future(table: pa.Table, cfg: config.RunConfig, build) -> None:
    """Whatever happens at or after a request changes none of its inputs."""
    users = user_events(table, cfg.source, cfg.features)
    examples = request_examples(users, T_VAL, 2**62)
    for i in range(0, len(examples), 3):
        one = examples[i : i + 1]
        own = slice(*users.events.offsets[one.user[0] : one.user[0] + 2])
        # counted from the times: the examples' own bounds are what is on trial
        time = users.events.event_time[own]
        visible = int((time < users.request_time[one.target_begin[0]]).sum())
        changed = corrupt_after(table, int(one.user[0]), visible, cfg)
        before, after = (batch_rows(build(u, one), 0) for u in (users, changed))
        assert before == after


def test_no_feature_of_an_example_is_later_than_its_request(rng: np.random.Generator) -> None:
    cfg, table, maps = make_config(), make_sequences(rng), make_maps()
    build = lambda users, one: example_batch(users, one, maps, cfg, training=False)
    assert_nothing_from_the_future(table, cfg, build)


def test_a_planted_leak_is_found(rng: np.random.Generator) -> None:
    cfg, table, maps = make_config(), make_sequences(rng), make_maps()

    def leaking(users: UserEvents, one) -> SequenceBatch:
        batch = example_batch(users, one, maps, cfg, training=False)
        own = torch.tensor(users.events.action_mask[one.target_begin[0] : one.target_end[0]])
        mask = batch.action_mask.clone()
        mask[-len(own) :] = own  # the candidates carry what they are to predict
        return replace(batch, action_mask=mask)

    with pytest.raises(AssertionError):
        assert_nothing_from_the_future(table, cfg, leaking)


def test_serving_builds_the_batch_that_evaluation_builds(rng: np.random.Generator) -> None:
    cfg, table, maps = make_config(), make_sequences(rng), make_maps()
    users = user_events(table, cfg.source, cfg.features)
    examples = request_examples(users, T_VAL, 2**62)
    offline = example_batch(users, examples, maps, cfg, training=False)
    history = users.events.take(examples.history_begin, examples.history_end)
    rows = users.events.take(examples.target_begin, examples.target_end)
    served = candidates(
        history,
        users.first_position[examples.user],
        rows.item_id,
        rows.offsets,
        users.request_time[examples.target_begin],
        rows.request,
        maps,
        cfg.inputs,
    )
    online = collate(history, served, users.user_id[examples.user], maps, cfg.inputs)
    for number in range(len(examples)):
        assert batch_rows(offline, number) == batch_rows(online, number)


def test_query_anchored_rows_count_back_from_their_request() -> None:
    time = np.array([10, 20, 50, 90, 100, 100, 7, 8, 30, 30])
    order_only = np.array([True, True, *[False] * 8])
    offsets, num_targets = np.array([0, 6, 6, 7, 10]), np.array([2, 0, 1, 2])
    position, age = query_anchored(time, order_only, offsets, num_targets, 4)
    assert position.tolist() == [3, 3, 2, 1, 0, 0, 0, 1, 0, 0]
    assert age.tolist() == [-1, -1, 50, 10, 0, 0, 0, 22, 0, 0]
    minutes = torch.tensor([-1, 0, 59_999, 60_000, 239_999, 240_000, 10**12])
    assert age_bucket(minutes, 100).tolist() == [0, 1, 1, 2, 2, 3, 99]


def test_watch_time_is_bits_of_the_history_alone(rng: np.random.Generator) -> None:
    cfg, table = make_config(), make_sequences(rng)
    features = replace(
        cfg.features, watch_seconds=(2.0, 30.0), watch_shares=(0.5,), duration_ms_column="duration"
    )
    watching = replace(cfg, features=features)
    duration = np.concatenate([[0.0], rng.integers(0, 2, 40) * 40_000.0])
    maps = replace(make_maps(), item_duration_ms=duration)
    users = user_events(table, cfg.source, cfg.features)
    watch_ms = rng.choice([-1, 1999, 2000, 29_999, 30_000], len(users.events.item_id))
    users = replace(users, events=replace(users.events, outcomes={"watch_ms": watch_ms}))
    examples = request_examples(users, T_VAL, 2**62)
    plain = example_batch(users, examples, maps, cfg, training=False)
    batch = example_batch(users, examples, maps, watching, training=False)
    rows = users.events.take(examples.history_begin, examples.history_end)
    place = np.concatenate([np.arange(n) < n - t for n, t in lengths_of(batch)])
    expected_known, expected = [], []
    watched_ms = rows.outcomes["watch_ms"].tolist()
    for watched, item in zip(watched_ms, rows.item_id.tolist(), strict=True):
        length = duration[item + 1] if item < 40 else 0
        known = [watched >= 0, watched >= 0, watched >= 0 and length > 0]
        is_long = [watched >= 2000, watched >= 30_000, watched >= 0.5 * length]
        expected_known.append(sum(4 << i for i in range(3) if known[i]))
        expected.append(sum(4 << i for i in range(3) if known[i] and is_long[i]))
    for name, bits in (("known_mask", expected_known), ("action_mask", expected)):
        before, after = getattr(plain, name).numpy(), getattr(batch, name).numpy()
        np.testing.assert_array_equal(after[place] - before[place], bits)
        assert (after[~place] == 0).all(), "an outcome of the candidate itself"
    assert len(set(expected)) > 3


def lengths_of(batch: SequenceBatch) -> list[tuple[int, int]]:
    return list(zip(batch.seq_offsets.diff().tolist(), batch.num_targets.tolist(), strict=True))


def test_gaps_are_real_times_only() -> None:
    time, order_only = np.array([10, 20, 50, 90, 7]), np.array([True, True, False, False, False])
    offsets = np.array([0, 4, 4, 5])
    assert row_gaps(time, order_only, offsets, end_is_real=True).tolist() == [-1, -1, 30, 40, -1]
    assert row_gaps(time, order_only, offsets, end_is_real=False).tolist() == [-1, -1, -1, 40, -1]


def test_stochastic_length_follows_the_formula() -> None:
    cfg = config.StochasticLengthConfig(alpha=1.6, max_len=256)
    lengths = np.full(20_000, 200)
    cut = stochastic_cuts(lengths, cfg, np.random.default_rng(0))
    assert cut_threshold(cfg) == 84
    assert 1 - cut.mean() == pytest.approx(256**1.6 / 200**2, abs=0.01)
    assert not stochastic_cuts(np.arange(85), cfg, np.random.default_rng(0)).any()


def test_events_take_copies_ranges() -> None:
    names = ("item_id", "event_time", "order_only", "action_mask", "known_mask")
    columns = {name: np.arange(6) for name in (*names, "position", "gap_ms")}
    outcomes = {"price": np.arange(6) / 2}
    events = Events(offsets=np.array([0, 6]), request={}, outcomes=outcomes, **columns)
    taken = events.take(np.array([4, 1, 2]), np.array([6, 1, 4]))
    assert taken.item_id.tolist() == [4, 5, 2, 3]
    assert taken.outcomes["price"].tolist() == [2.0, 2.5, 1.0, 1.5]
    assert taken.offsets.tolist() == [0, 2, 2, 4]


def test_a_request_reads_its_newest_rows_alone() -> None:
    cfg = make_config()
    users = user_events(make_sequences(np.random.default_rng(0)), cfg.source, cfg.features)
    whole = request_examples(users, T_VAL, 2**62)
    short = request_examples(users, T_VAL, 2**62, max_history=4)
    assert whole.num_history.max() > 4
    np.testing.assert_array_equal(short.num_history, np.minimum(whole.num_history, 4))
    np.testing.assert_array_equal(short.history_end, whole.history_end)


def test_the_first_target_of_a_pass_reads_as_many_rows_as_a_request_does() -> None:
    cfg = make_config(max_targets_per_sequence=5)
    users = user_events(make_sequences(np.random.default_rng(0)), cfg.source, cfg.features)
    passes = whole_examples(users, cfg.split, cfg.train, 4)
    before_first = users.visible_end[passes.target_begin]
    begin = users.events.offsets[passes.user]
    np.testing.assert_array_equal(
        before_first - passes.history_begin, np.minimum(before_first - begin, 4)
    )
    assert (passes.num_history > 4).any(), "later targets read the pass before them too"


def test_a_cut_history_is_refused_where_others_count_all_of_it() -> None:
    rates = {"dense": {"own": {"by": ["user"]}}}
    with pytest.raises(config.ConfigError, match=r"examples.max_history must be null with .*'own'"):
        config.from_dict({"examples": {"max_history": 4}, "features": rates})
