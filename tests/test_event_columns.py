"""Event columns are declared once: what is published keeps its bytes, files of before are read, and
a number that is declared in YAML alone goes the whole way.
"""

import dataclasses
import hashlib
import re
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from pipeline import config
from pipeline.batches.collate import bucket_codes
from pipeline.batches.events import Events
from pipeline.batches.features import FeatureMaps, fit_features
from pipeline.batches.loader import TrainLoader
from pipeline.batches.steps import step_plan
from pipeline.config import FeatureConfig, HistoryFeature, RunConfig, ServeConfig, UserError
from pipeline.logs.cleaning import LogRules, check_columns, check_presence, normalise
from pipeline.model.artifact import LoadedModel, load_model, save_model
from pipeline.model.ranker import RankingModel
from pipeline.schema import LOG_OPTIONAL, EventColumns, outcome_column
from pipeline.sequences import store
from pipeline.sequences.build import build_sequences
from pipeline.sequences.packed_keys import argsort_rows, sort_key
from pipeline.sequences.repeats import RepeatRule
from pipeline.sequences.users import build_bucket
from pipeline.train import loop
from serve_app.columns import RankColumns
from serve_app.history import redis_events
from serve_app.history.export import export_events
from serve_app.history.live import LiveHistory
from serve_app.history.published import PublishedSequences
from serve_app.history.sqlite_events import SqliteEvents
from serve_app.ranking.ranker import Ranker
from serve_app.replay import PastPeriod, past_requests
from serve_app.schemas import Event, EventsRequest, EventsResponse, RankRequest, Refusal
from tests.worlds.logs import NOON, config_for, here, log

__all__ = ["here"]

PAGE = Path(__file__).parents[1] / "docs" / "extend" / "column.md"

# What stores of before declared columns were ---------------------------------

# sha256 of the manifest, which names every file by its own, as the code before them wrote it
MANIFEST = "f1d4db73ef720d2bde718009081ae6715cab3d1f110d865343ba60e4be0d3e8a"
DIGEST = "2c55e438e1e624dca67fb554afd1d33d2631c68b1e91a98599f447765995f048"
WRITTEN_BY = "25.0.1"  # of pyarrow, whose version is in the bytes


def messy_log() -> pa.Table:
    """Rows that break every rule, repeats of both kinds, ties in time and unknown values."""
    rng = np.random.default_rng(7)
    num = 600

    def some(values: np.ndarray, share: float, dtype: pa.DataType) -> pa.Array:
        return pa.array(values, mask=rng.random(num) < share).cast(dtype)

    table = log(
        num_users=20,
        rows=num,
        seed=3,
        watch_ms=some(rng.integers(-5_000, 90_000, num), 0.3, pa.int64()),
        request_id=some(rng.integers(4, size=num), 0.4, pa.int64()),
        order_only=some(rng.random(num) < 0.1, 0.5, pa.bool_()),
        known_mask=some(rng.integers(5, size=num), 0.6, pa.int32()),
        tie_breaker=some(rng.integers(3, size=num), 0.5, pa.int64()),
    )
    ids = {
        "user_id": some(rng.integers(-1, 20, num), 0.01, pa.int64()),
        "item_id": some(rng.integers(-1, 50, num), 0.01, pa.int64()),
    }
    times = NOON + rng.integers(300, size=num) * 1000 * rng.choice(
        [1] * 7 + [10**10, -(10**10)], num
    )
    clicks = [0, 1, 1, 0, 2]
    changed = ids | {
        "event_time": some(times, 0.01, pa.int64()),
        "click": some(rng.choice(clicks, num, p=[0.4, 0.4, 0.1, 0.08, 0.02]), 0.1, pa.int8()),
        "tab": some(rng.integers(-1, 3, num), 0.2, pa.int32()),
    }
    for name, values in changed.items():
        table = table.set_column(table.column_names.index(name), name, values)
    liked = pa.array(np.ones(30, np.int8))
    again = table.slice(100, 30).set_column(table.column_names.index("like"), "like", liked)
    return pa.concat_tables([table, table.slice(0, 40), again])


@pytest.mark.skipif(pa.__version__ != WRITTEN_BY, reason="another pyarrow writes other bytes")
def test_a_store_without_declared_columns_keeps_its_bytes(here: None, tmp_path: Path) -> None:
    cfg = config_for(tmp_path, messy_log(), columns={name: name for name in LOG_OPTIONAL})
    sequences = dataclasses.replace(
        cfg.sequences, repeats="first", max_rows_per_user=8, latest_time="2026-01-01T00:00:00+00:00"
    )
    checks = dataclasses.replace(cfg.checks, max_quarantined_share=1.0)
    cfg = dataclasses.replace(cfg, sequences=sequences, checks=checks)

    manifest = build_sequences(cfg)
    assert manifest.digest == DIGEST
    assert len(manifest.quarantined) == 13
    assert manifest.rows_capped > 100
    written = (cfg.sequence_dir / store.MANIFEST).read_bytes()
    assert hashlib.sha256(written).hexdigest() == MANIFEST
    for entry in (*manifest.buckets, *manifest.quarantine):
        found = (cfg.sequence_dir / entry.file).read_bytes()
        assert hashlib.sha256(found).hexdigest() == entry.sha256


# Event logs of before --------------------------------------------------------

OLD_FILE = """
CREATE TABLE event (
    user_id INTEGER NOT NULL, event_time INTEGER NOT NULL, item_id INTEGER NOT NULL,
    request_id INTEGER,
    watch_ms INTEGER, actions TEXT NOT NULL, request_features TEXT NOT NULL,
    PRIMARY KEY (user_id, event_time, item_id)
) WITHOUT ROWID;
INSERT INTO "event" VALUES(3,1651766399000,10,77,5300,
    '{"is_click": true, "is_like": false}','{"tab": 1}');
INSERT INTO "event" VALUES(3,1651766399000,11,NULL,NULL,'{}','{}');
INSERT INTO "event" VALUES(1099511627776,1651766400000,12,NULL,0,'{}','{}');
"""
OLD_EVENTS = [
    Event(
        user_id=3,
        item_id=10,
        event_time=1651766399000,
        actions={"is_click": True, "is_like": False},
        request_features={"tab": 1},
        request_id="77",
        watch_ms=5300,
    ),
    Event(user_id=3, item_id=11, event_time=1651766399000),
    Event(user_id=2**40, item_id=12, event_time=1651766400000, watch_ms=0),
]
PRICED = Event(user_id=3, item_id=13, event_time=1651766399000, outcomes={"price": 2.5})


def test_an_sqlite_file_of_before_is_migrated_in_place(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript("PRAGMA journal_mode = WAL;" + OLD_FILE)
    connection.close()

    for events in (SqliteEvents(path), SqliteEvents(path)):  # the second finds it migrated
        assert events.of_user(3)[:2] == OLD_EVENTS[:2]
        assert events.of_user(2**40) == OLD_EVENTS[2:]
        assert events.append(OLD_EVENTS) == ["already_there"] * 3

    events = SqliteEvents(path)
    other_price = PRICED.model_copy(update={"outcomes": {"price": 3.0}})
    assert events.append([PRICED, PRICED, other_price]) == ["accepted", "already_there", "merged"]
    assert SqliteEvents(path).of_user(3)[2] in (PRICED, other_price)


def test_redis_values_of_before_are_read_and_compared(tmp_path: Path) -> None:
    old = '[77, 5300, {"is_click": true, "is_like": false}, {"tab": 1}]'
    field = "1651766399000:10"
    assert redis_events._event(3, field, old) == OLD_EVENTS[0]
    assert redis_events._value(OLD_EVENTS[0]) == old, "the same event is no conflict"

    value = redis_events._value(PRICED)
    assert redis_events._event(3, redis_events._field(PRICED), value) == PRICED


# Rules of a declared column --------------------------------------------------

COLUMNS = EventColumns(
    actions=("click",),
    declared=(
        outcome_column("price", "float", 0),
        outcome_column("change", "float", None),
        outcome_column("visits", "int", 2),
    ),
)
NAMES = {column.name: column.name for column in COLUMNS.log_columns} | {"row_digest": "row_digest"}
RULES = LogRules(NAMES, COLUMNS, earliest_ms=0, latest_ms=10_000, num_buckets=1)


def block(**columns: Any) -> pa.Table:
    num = len(next(iter(columns.values())))
    base = {
        "user_id": np.zeros(num, np.int64),
        "item_id": np.arange(num),
        "event_time": np.full(num, 5),
        "click": np.ones(num, np.int8),
        "price": np.ones(num),
        "change": np.ones(num),
        "visits": np.full(num, 3),
    }
    return pa.table(base | columns)


@pytest.mark.parametrize(
    ("name", "values", "reasons", "kept"),
    [
        (
            "price",
            pa.array([-0.5, 0.0, float("nan"), None, float("inf"), 19.99]),
            ["negative_price", None, None, None, "price_infinite", None],
            [0.0, None, None, 19.99],
        ),
        ("price", pa.array([-3, 3], pa.int16()), ["negative_price", None], [3.0]),
        ("price", pa.array(["1.10", None]).cast(pa.decimal128(5, 2)), [None, None], [1.1, None]),
        ("change", pa.array([-2.0, None]), [None, None], [-2.0, None]),
        ("visits", pa.array([1, None, 2, 7]), ["visits_below_2", None, None, None], [None, 2, 7]),
    ],
)
def test_values_are_checked_and_unknown_ones_stay_unknown(
    name: str, values: pa.Array, reasons: list, kept: list
) -> None:
    rows = block(**{name: values})
    check_columns(rows.schema, RULES, "file")
    clean = normalise(rows, RULES)
    assert clean["reason"].to_pylist() == reasons

    found = build_bucket(clean, RULES, 100, RepeatRule()).sequences[name].to_pylist()[0]
    unknown = [value == -1 if name == "visits" else np.isnan(value) for value in found]
    assert [None if no else value for value, no in zip(found, unknown, strict=True)] == kept


def test_types_that_are_no_numbers_are_refused() -> None:
    for name, values in (("price", ["1"]), ("visits", ["x"]), ("price", [True])):
        with pytest.raises(UserError, match=f"column '{name}' must be"):
            check_columns(block(**{name: values}).schema, RULES, "file")
    with pytest.raises(UserError, match="no column 'price' for price"):
        check_presence({"file": block(click=[1]).drop_columns(["price"]).schema}, RULES)


def test_repeats_are_told_apart_by_numbers_too() -> None:
    """The row with the smallest values of an event stays, in whatever order the rows come."""
    rows = block(item_id=[4] * 5, price=[2.0, None, 0.5, 7.0, 0.0], change=[0.0] * 5)
    first = RepeatRule(merge=False)
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]):
        built = build_bucket(normalise(rows.take(order), RULES), RULES, 100, first)
        assert built.sequences["price"].to_pylist() == [[0.0]]
        assert built.quarantine["reason"].to_pylist() == ["key_duplicate"] * 4

    numbers = [3.0, -1.5, None, 0.0, -np.inf, np.inf, -0.0, 1e-300, -1e300]
    keys = sort_key(pa.table({"x": pa.array(numbers)}), "x")
    ordered = [numbers[i] for i in argsort_rows([keys])]
    assert ordered[-1] is None
    assert ordered[:-1] == sorted(x for x in numbers if x is not None)
    assert keys[3] == keys[6], "-0.0 is 0.0"


def test_buckets_of_known_and_unknown_values() -> None:
    features = FeatureConfig(
        history={"price": HistoryFeature(edges=(5, 20)), "watch_ms": HistoryFeature(edges=(0.5,))}
    )
    assert features.outcomes == ("price", "watch_ms")
    nothing = np.zeros(5, np.int64)
    rows = Events(
        offsets=np.array([0, 5]),
        item_id=nothing,
        event_time=nothing,
        order_only=nothing.astype(bool),
        action_mask=nothing,
        known_mask=nothing,
        position=nothing,
        gap_ms=nothing,
        request={},
        outcomes={
            "price": np.array([np.nan, -4.0, 5.0, 19.99, 20.0]),
            "watch_ms": np.array([-1, 0, 1, 10**9, 0]),
        },
    )
    assert bucket_codes(rows, features).T.tolist() == [[0, 1, 2, 2, 3], [0, 1, 2, 2, 1]]


@pytest.mark.parametrize(
    ("outcomes", "loc", "rule"),
    [
        ({"prise": 1}, ["outcomes"], "one of"),
        ({"watch_ms": 1}, ["outcomes"], "field of its own"),
        ({"price": -1}, ["outcomes", "price"], "0 or more"),
        ({"visits": 2.5}, ["outcomes", "visits"], "whole number"),
        ({"visits": 1}, ["outcomes", "visits"], "2 or more"),
    ],
)
def test_posted_numbers_that_the_sequences_have_no_place_for(
    tmp_path: Path, outcomes: dict, loc: list[str], rule: str
) -> None:
    class Nobody:
        digest, columns = "", COLUMNS

        def sequence(self, user_id: int) -> None:
            return None

    log = SqliteEvents(tmp_path / "events.sqlite")
    history = LiveHistory(Nobody(), log, config.from_dict({}).sequences, max_events=10)
    body = {"user_id": 1, "item_id": 2, "event_time": NOON}
    (refusal,) = history.append_all(
        [EventsRequest.model_validate({"events": [body, body | {"outcomes": outcomes}]})]
    )
    assert isinstance(refusal, Refusal)
    assert refusal.loc == ["body", "events", 1, *loc]
    assert rule in refusal.msg
    assert log.of_user(1) == []


# The whole way ---------------------------------------------------------------

T_VAL, T_TEST = "2022-04-15T07:00:00+00:00", "2022-04-15T07:40:00+00:00"
TEST_MS = config.parse_time("t_test", T_TEST)


def priced_log() -> pa.Table:
    """Requests of two items each; most rows have a price, one of them a bad one."""
    rng = np.random.default_rng(0)
    num = 600
    request = np.arange(num) // 2
    items = rng.permuted(np.tile(np.arange(40), (num // 2, 1)), axis=1)[:, :2]
    price = np.where(rng.random(num) < 0.2, np.nan, rng.choice([1.5, 5.0, 19.99, 60.0, 250.0], num))
    price[5] = -1.0
    return pa.table(
        {
            "user_id": rng.integers(12, size=num // 2)[request],
            "item_id": items.ravel(),
            "event_time": NOON + request * 35_000,
            "click": rng.integers(2, size=num).astype(np.int8),
            "like": rng.integers(2, size=num).astype(np.int8),
            "tab": rng.integers(3, size=num).astype(np.int32),
            "paid_eur": pa.array(price, mask=rng.random(num) < 0.1),
        }
    )


def merged(base: dict, more: dict) -> dict:
    nested = {key: merged(base[key], value) for key, value in more.items() if key in base}
    return base | more | nested if isinstance(more, dict) else more


def priced_config(folder: Path, name: str, table: pa.Table) -> RunConfig:
    """A configuration without the column, and the page's YAML."""
    (folder / name).mkdir()
    pq.write_table(table, folder / name / "log.parquet")
    base = {
        "name": name,
        "runs_dir": str(folder / "runs"),
        "source": {
            "kind": "parquet",
            "path": str(folder / name),
            "actions": ["click", "like"],
            "request_columns": ["tab"],
        },
        "sequences": {"num_buckets": 2},
        "split": {"t_val": T_VAL, "t_test": T_TEST},
        "tasks": ["click"],
        "features": {"request": {"tab": {"dim": 2}}},
        "model": {
            "d_model": 16,
            "num_layers": 2,
            "d_qk": 8,
            "d_v": 8,
            "head_hidden": 8,
            "attention": {"window": 4, "full_rows": 2, "scaling_seq_len": 16},
        },
        "train": {"epochs": 1, "batch_users": 4, "lr": 0.05, "warmup_steps": 0},
        "serve": {"parity_requests": 30, "parity_candidates": 6},
    }
    (page,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return config.from_dict(merged(base, yaml.safe_load(page)))


@pytest.fixture
def early_and_late() -> tuple[pa.Table, pa.Table]:
    table = priced_log()
    late = pc.greater_equal(table["event_time"], TEST_MS)  # pyright: ignore
    return table.filter(pc.invert(late)), table.filter(late)  # pyright: ignore


def as_event(row: dict) -> dict:
    """A row of the logs as it is posted."""
    unknown = row["paid_eur"] is None or np.isnan(row["paid_eur"])
    return {
        "user_id": row["user_id"],
        "item_id": row["item_id"],
        "event_time": row["event_time"],
        "actions": {name: bool(row[name]) for name in ("click", "like")},
        "request_features": {"tab": row["tab"]},
        "outcomes": {} if unknown else {"price": row["paid_eur"]},
    }


def trained(cfg: RunConfig, folder: Path) -> LoadedModel:
    """A model after an epoch, saved and loaded again."""
    maps = fit_features(cfg)
    loader = TrainLoader(cfg, maps, step_plan(cfg))
    check_gradient(cfg, maps, loader)
    model = loop.train(cfg, maps, loader, "data")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # so that scores differ visibly
    save_model(folder, model, cfg, maps, {})
    return load_model(folder)


def check_gradient(cfg: RunConfig, maps: FeatureMaps, loader: TrainLoader) -> None:
    """Every bucket that a history row has gets a gradient; candidates have none."""
    model = RankingModel(cfg, maps.vocab_sizes, maps.base_rates)
    batch = next(iter(loader.batches(0)))
    model(batch).square().sum().backward()
    assert model.encoder.outcome is not None and batch.history_codes is not None
    rows = model.encoder.outcome.rows.grad
    assert rows is not None
    used = torch.unique(batch.history_codes)
    assert len(used) == len(rows) == 5
    assert (rows.abs().sum(1) > 0).all()


def ask(ranker: Ranker, bodies: list[dict]) -> np.ndarray:
    requests = [RankColumns.of(RankRequest.model_validate(body)) for body in bodies]
    for request in requests:
        assert ranker.find_refusal(request) is None
    answers = ranker.rank(requests)
    return np.concatenate([answer.scores["click"] for answer in answers])


def test_a_column_declared_in_yaml_alone_goes_the_whole_way(
    here: None, tmp_path: Path, early_and_late: tuple[pa.Table, pa.Table]
) -> None:
    early, late = early_and_late
    whole_cfg = priced_config(tmp_path, "whole", pa.concat_tables([early, late]))
    early_cfg = priced_config(tmp_path, "early", early)

    # logs → sequences
    manifest = build_sequences(whole_cfg)
    assert manifest.quarantined == {"negative_price": 1}
    assert store.read_manifest(whole_cfg.sequence_dir) == manifest
    build_sequences(early_cfg)

    # batches → model
    loaded = trained(whole_cfg, tmp_path / "model")
    past = past_requests(PastPeriod.of_run(whole_cfg), whole_cfg.serve, loaded)
    expected = np.concatenate([one.scores[:, 0] for one in past])
    bodies = [one.body for one in past]
    assert sum("history" in body for body in bodies) == 15
    assert any(row["outcomes"] for body in bodies for row in body.get("history", []))

    # the rest is posted, and ranked with what was published before
    log = SqliteEvents(tmp_path / "events.sqlite")
    published = PublishedSequences(
        early_cfg.sequence_dir, loaded.cfg.source, loaded.cfg.features, tmp_path / "cache"
    )
    history = LiveHistory(published, log, loaded.cfg.sequences, max_events=1000)
    ranker = Ranker(loaded, history, 1, "priced", ServeConfig())
    before = ask(ranker, bodies)
    events = [as_event(row) for row in late.to_pylist()]
    (answer,) = history.append_all([EventsRequest.model_validate({"events": events})])
    assert isinstance(answer, EventsResponse)
    assert answer.accepted == late.num_rows

    scores = ask(ranker, bodies)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-6)
    assert np.abs(before - expected).max() > 1e-3, "the events count"
    for body in bodies:
        for row in body.get("history", []):
            row["outcomes"] = {"price": 1.0}
    assert np.abs(ask(ranker, bodies) - expected).max() > 1e-3, "the prices count"

    # exported, and read again by the next build
    done = export_events(early_cfg.source, early_cfg.sequences, early_cfg.run_dir, log)
    assert (done.num_events, done.dropped) == (late.num_rows, {})
    build_sequences(early_cfg, append=True)
    for index in range(2):
        one, other = (
            store.read_bucket(cfg.sequence_dir, store.read_manifest(cfg.sequence_dir), index)
            for cfg in (early_cfg, whole_cfg)
        )
        assert one.schema == other.schema
        assert repr(one.to_pylist()) == repr(other.to_pylist())


def test_a_model_and_sequences_that_disagree_are_refused(
    here: None, tmp_path: Path, early_and_late: tuple[pa.Table, pa.Table]
) -> None:
    priced = priced_config(tmp_path, "priced", early_and_late[0])
    plain = dataclasses.replace(
        priced,
        source=dataclasses.replace(priced.source, outcome_columns={}, columns={}),
        features=dataclasses.replace(priced.features, history={}),
    )
    build_sequences(plain)
    with pytest.raises(UserError, match="the model reads 'price'"):
        PublishedSequences(plain.sequence_dir, priced.source, priced.features, tmp_path / "cache")
    with pytest.raises(UserError, match=r"other settings.*source\.outcome_columns"):
        build_sequences(dataclasses.replace(priced, name="priced"), append=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
