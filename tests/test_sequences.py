"""LOG → SEQUENCE: the vectorised pass against a plain function of one user, and the build from
Parquet to manifest.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import config
from pipeline.config import RunConfig, UserError
from pipeline.logs.cleaning import user_bucket
from pipeline.sequences import build, store, versions
from pipeline.sequences.build import build_sequences
from pipeline.sequences.repeats import RepeatRule
from pipeline.sequences.users import build_bucket
from tests.worlds.logs import FIRST, MERGE, NOON, RULES, config_for, here, log

ROOT = Path(__file__).parents[1]

__all__ = ["here"]  # a fixture


def known_actions(row: dict) -> dict[str, bool]:
    mask = 3 if row["known_mask"] is None else row["known_mask"]
    told = {}
    for bit, name in enumerate(("click", "like")):
        if row[name] is not None and mask >> bit & 1:
            told[name] = bool(row[name])
    return told


def plain_merge(rows: list[dict], last_file: bool) -> tuple[dict, list[int]]:
    """The rows of an event, the first of them first, as one row; and those that contradict."""
    one = rows[0] | {"order_only": bool(rows[0]["order_only"])}
    told: dict[str, bool] = {}
    contradicting = []
    agreeing = []

    for name in ("tab", "request_id", "order_only"):  # column by column, as the docstring says
        for row in rows:
            value = bool(row[name]) if name == "order_only" else row[name]
            if value is None or row["number"] in contradicting:
                continue
            if one[name] is None:
                one[name] = value
            if value != one[name]:
                contradicting.append(row["number"])

    for row in rows:
        if row["number"] not in contradicting:
            agreeing.append(row)
            for name, did in known_actions(row).items():
                told[name] = told.get(name, False) or did

    watched = [(row["source_file"], row["watch_ms"]) for row in agreeing]
    watched = [pair for pair in watched if pair[1] is not None]
    if not last_file:
        watched = [(0, value) for _, value in watched]
    one["watch_ms"] = max(watched)[1] if watched else None

    one |= {"click": told.get("click"), "like": told.get("like"), "known_mask": None}
    return one, contradicting


def plain_user(rows: list[dict], cap: int, rule: RepeatRule) -> tuple[dict, dict[int, str]]:
    """One user's rows as a SEQUENCE row, and the reason of each row left out: PROTOCOL's words, one
    by one.
    """
    last = 2**63 - 1
    rest = ("click", "like", "tab", "request_id", "watch_ms", "order_only", "known_mask")

    def rank(row: dict) -> tuple:
        return (
            row["tie_breaker"],
            *(last if row[name] is None else row[name] for name in rest),
            row["row_digest"],
            row["source_file"],
        )

    def full_rank(row: dict) -> tuple:
        tie, *others = rank(row)
        return (last if tie is None else tie, *others)

    reasons, sources, kept = {}, set(), []
    for row in sorted(rows, key=full_rank):
        source = (row["event_time"], row["item_id"], row["row_digest"])
        if source in sources:
            reasons[row["number"]] = "exact_duplicate"
        sources.add(source)
    events: dict[tuple, list[dict]] = {}
    for row in sorted((row for row in rows if row["number"] not in reasons), key=full_rank):
        events.setdefault((row["event_time"], row["item_id"]), []).append(row)
    for first, *others in events.values():
        if rule.merge and others:
            one, contradicting = plain_merge([first, *others], rule.file_order is not None)
            kept.append(one)
            reasons |= {row["number"]: "merged" for row in others}
            reasons |= dict.fromkeys(contradicting, "contradicts_its_event")
        else:
            kept.append(first)
            reasons |= {row["number"]: "key_duplicate" for row in others}
    kept.sort(
        key=lambda row: (
            row["event_time"],
            last if row["tie_breaker"] is None else row["tie_breaker"],
            row["item_id"],
        )
    )
    requests: dict[tuple, list[dict]] = {}
    for row in kept:
        requests.setdefault((row["event_time"], row["request_id"]), []).append(row)
    together = [
        row
        for (_, _), members in sorted(requests.items(), key=lambda kv: kv[0][0])
        for row in members
    ]
    newest = together[-cap:]
    order = list(dict.fromkeys((row["event_time"], row["request_id"]) for row in newest))
    known = [
        (3 if row["known_mask"] is None else row["known_mask"])
        & ~sum(1 << bit for bit, name in enumerate(("click", "like")) if row[name] is None)
        for row in newest
    ]
    return {
        "first_position": len(together) - len(newest),
        "item_id": [row["item_id"] for row in newest],
        "event_time": [row["event_time"] for row in newest],
        "action_mask": [
            ((row["click"] or 0) | (row["like"] or 0) << 1) & k
            for row, k in zip(newest, known, strict=True)
        ],
        "known_mask": known,
        "watch_ms": [-1 if row["watch_ms"] is None else row["watch_ms"] for row in newest],
        "request_index": [order.index((row["event_time"], row["request_id"])) for row in newest],
        "order_only": [bool(row["order_only"]) for row in newest],
        "tab": [-1 if row["tab"] is None else row["tab"] for row in newest],
    }, reasons


def small(most: int) -> st.SearchStrategy:
    return st.one_of(st.none(), st.integers(0, most))


RULES_OF_REPEATS = [FIRST, MERGE, RepeatRule(file_order={0: 0, 1: 1, 2: 2})]
LOG_ROW = st.fixed_dictionaries(
    {
        "user_id": st.integers(0, 2),
        "item_id": st.integers(0, 2),
        "event_time": st.integers(0, 3),
        "click": small(1),
        "like": small(1),
        "tab": small(2),
        "request_id": small(1),
        "watch_ms": small(1),
        "order_only": st.one_of(st.none(), st.booleans()),
        "known_mask": small(3),
        "tie_breaker": small(2),
        "row_digest": st.integers(0, 2),
        "source_file": st.integers(0, 2),
    }
)


def as_block(rows: list[dict]) -> pa.Table:
    extra = {"user_bucket": 0, "reason": None, "source_row": None}
    return pa.Table.from_pylist([row | extra for row in rows], schema=RULES.schema)


@settings(max_examples=300, deadline=None)
@given(st.lists(LOG_ROW, max_size=24), st.integers(1, 6), st.sampled_from(RULES_OF_REPEATS))
def test_the_vectorised_pass_equals_a_plain_function_of_one_user(
    rows: list[dict], cap: int, rule: RepeatRule
):
    rows = [row | {"number": number} for number, row in enumerate(rows)]
    built = build_bucket(
        as_block([{k: v for k, v in row.items() if k != "number"} for row in rows]),
        RULES,
        cap,
        rule,
    )
    expected, reasons = {}, []
    for user in sorted({row["user_id"] for row in rows}):
        expected[user], left_out = plain_user(
            [row for row in rows if row["user_id"] == user], cap, rule
        )
        reasons += left_out.values()
    found = {row.pop("user_id"): row for row in built.sequences.to_pylist()}
    assert list(found) == list(expected)
    for user, row in found.items():
        row.pop("user_bucket")
        assert row == expected[user]
    assert built.rows_merged == reasons.count("merged")
    quarantined = [reason for reason in reasons if reason != "merged"]
    assert sorted(built.quarantine["reason"].to_pylist()) == sorted(quarantined)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(LOG_ROW, min_size=1, max_size=24),
    st.randoms(use_true_random=False),
    st.sampled_from(RULES_OF_REPEATS),
)
def test_the_order_of_the_rows_changes_nothing(rows: list[dict], random, rule: RepeatRule):
    shuffled = random.sample(rows, len(rows))
    one, other = (build_bucket(as_block(some), RULES, 5, rule) for some in (rows, shuffled))
    assert one.sequences.equals(other.sequences)
    assert one.quarantine.equals(other.quarantine)


def test_user_bucket_is_splitmix64_on_every_machine():
    def splitmix(user: int) -> int:
        h, all_bits = user, 2**64 - 1
        h = ((h ^ h >> 30) * 0xBF58476D1CE4E5B9) & all_bits
        h = ((h ^ h >> 27) * 0x94D049BB133111EB) & all_bits
        return h ^ h >> 31

    users = np.array([0, 1, 2, 12345, 2**40 + 7, 2**63 - 1])
    assert user_bucket(users, 16).tolist() == [splitmix(int(user)) % 16 for user in users]
    share = np.bincount(user_bucket(np.arange(100_000), 16)) / 100_000
    assert np.abs(share - 1 / 16).max() < 0.005


# The build from Parquet files to a manifest. One Ray cluster serves all of it.


def with_sequences(cfg: RunConfig, **changes: object) -> RunConfig:
    return dataclasses.replace(cfg, sequences=dataclasses.replace(cfg.sequences, **changes))


@pytest.mark.cluster
def test_kuairand_counts(kuairand: RunConfig):
    manifest = store.read_manifest(kuairand.sequence_dir)
    assert manifest.quarantined == {
        "exact_duplicate": 4682,
        "key_duplicate": 366,
        "history_not_before_first_event": 3,
    }
    table = store.read_sequences(kuairand.sequence_dir)
    flat = {
        name: table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        for name in table.column_names[3:]
    }
    timed = flat["event_time"][~flat["order_only"]]
    split = kuairand.split
    counts = np.diff(
        [0, *np.searchsorted(np.sort(timed), [split.val_ms, split.test_ms]), len(timed)]
    )
    assert counts.tolist() == [91_989, 39_363, 48_777]
    assert manifest.rows_in == manifest.num_rows + 4682 + 366
    assert manifest.num_users == table.num_rows == len(np.unique(table["user_id"]))


@pytest.mark.cluster
def test_kuairand_users_with_nothing_but_a_history_stay(kuairand: RunConfig):
    table = store.read_sequences(kuairand.sequence_dir)
    data = Path(str(kuairand.source.path))
    events = set(pq.read_table(data / "events.parquet")["user_id"].to_pylist())
    histories = set(pq.read_table(data / "user_history.parquet")["user_id"].to_pylist())
    users = set(table["user_id"].to_pylist())
    assert users == events | histories
    assert histories - events


@pytest.mark.cluster
def test_kuairand_ties_follow_the_file(kuairand: RunConfig):
    table = store.read_sequences(kuairand.sequence_dir)
    events = pq.read_table(Path(str(kuairand.source.path)) / "events.parquet").to_pandas()
    events = events.drop_duplicates().drop_duplicates(["user_id", "item_id", "time_ms"])
    expected = (
        events.sort_values(["user_id", "time_ms"], kind="stable")
        .groupby("user_id")["item_id"]
        .agg(list)
    )
    columns = table.select(["user_id", "item_id", "order_only"]).to_pydict()
    for user, items, order_only in zip(*columns.values(), strict=True):
        timed = [item for item, only in zip(items, order_only, strict=True) if not only]
        assert timed == expected.get(user, [])


@pytest.mark.cluster
def test_the_same_logs_in_any_order_and_any_files_give_the_same_bytes(
    local_ray: None, tmp_path: Path
):
    table = log(rows=600)
    shuffled = table.take(np.random.default_rng(1).permutation(600))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = build_sequences(config_for(tmp_path / "a", table))
    other = build_sequences(config_for(tmp_path / "b", shuffled.slice(0, 100), shuffled.slice(100)))
    assert one.digest == other.digest
    assert [bucket.sha256 for bucket in one.buckets] == [bucket.sha256 for bucket in other.buckets]


def test_build_once_then_nothing_to_do_then_refuse_then_overwrite(
    here: None, tmp_path: Path, monkeypatch
):
    cfg = config_for(tmp_path, log())
    first = build_sequences(cfg)
    with monkeypatch.context() as patch:
        patch.setattr(build, "build_files", lambda *_: pytest.fail("built again"))
        assert build_sequences(cfg) == first
    capped = with_sequences(cfg, max_rows_per_user=3)
    with pytest.raises(
        UserError, match=r"of other settings \(sequences.max_rows_per_user\).*--overwrite"
    ) as refused:
        build_sequences(capped)
    assert str(cfg.sequence_dir) in str(refused.value)
    assert store.read_manifest(cfg.sequence_dir) == first
    second = build_sequences(capped, overwrite=True)
    assert store.read_manifest(cfg.sequence_dir) == second
    assert second.rows_capped == first.num_rows - second.num_rows > 0
    table = store.read_sequences(cfg.sequence_dir)
    assert max(len(items) for items in table["item_id"].to_pylist()) == 3
    assert sum(table["first_position"].to_pylist()) == second.rows_capped


def test_a_build_that_dies_before_the_manifest_leaves_the_last_version(
    here: None, tmp_path: Path, monkeypatch
):
    cfg = config_for(tmp_path, log())
    first = build_sequences(cfg)
    before = store.read_sequences(cfg.sequence_dir)
    capped = with_sequences(cfg, max_rows_per_user=3)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_manifest", die)
        with pytest.raises(KeyboardInterrupt):
            build_sequences(capped, overwrite=True)
    assert store.read_manifest(cfg.sequence_dir) == first
    assert store.read_sequences(cfg.sequence_dir).equals(before)


@pytest.mark.cluster
def test_files_may_differ_in_column_order_and_in_width(local_ray: None, tmp_path: Path):
    narrow = log(rows=50, seed=1)
    narrow = narrow.set_column(0, "user_id", narrow["user_id"].cast(pa.int32()))
    wide = log(rows=50, seed=2).select(["tab", "like", "click", "event_time", "item_id", "user_id"])
    manifest = build_sequences(config_for(tmp_path, narrow, wide, wide.select(log().column_names)))
    assert manifest.rows_in == 150
    assert manifest.quarantined["exact_duplicate"] == 50


def test_bad_rows_are_quarantined_by_reason_with_the_row_as_it_came(here: None, tmp_path: Path):
    bad = {
        "user_id": [None, -1, 1, 1, 1, 1, 1, 1],
        "item_id": [1, 1, None, 1, 1, 1, 1, 1],
        "event_time": [NOON, NOON, NOON, None, NOON // 1000, NOON * 1000, NOON, NOON],
        "click": [0, 0, 0, 0, 0, 0, 2, 0],
        "like": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, float("nan"), 0.5],
        "tab": [0, 0, 0, 0, 0, 0, 0, 0],
    }
    good = log(rows=100)
    good = good.set_column(4, "like", good["like"].cast(pa.float64()))
    cfg = config_for(tmp_path, good, pa.table({name: pa.array(v) for name, v in bad.items()}))
    manifest = build_sequences(cfg)
    assert {
        reason: rows for reason, rows in manifest.quarantined.items() if "duplicate" not in reason
    } == {
        "null_user_id": 1,
        "negative_user_id": 1,
        "null_item_id": 1,
        "null_event_time": 1,
        "event_time_before_range": 1,
        "event_time_in_future": 1,
        "click_not_0_1": 1,
        "like_not_0_1": 1,
    }
    files = [pq.read_table(cfg.sequence_dir / entry.file) for entry in manifest.quarantine]
    quarantine = pa.concat_tables(files).to_pylist()
    clicked = next(row for row in quarantine if row["reason"] == "click_not_0_1")
    assert json.loads(clicked["source_row"])["click"] == 2
    assert len(quarantine) == sum(manifest.quarantined.values())


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "event_time",
            np.where(np.arange(400) % 2, NOON, NOON // 1000),
            r"(?s)event_time_before_range 200.*looks like seconds",
        ),
        (
            "event_time",
            np.where(np.arange(400) % 2, NOON, NOON * 1000),
            r"(?s)event_time_in_future 200.*looks like microseconds",
        ),
        (
            "user_id",
            pa.nulls(400, pa.int64()),
            r"(?s)checks.min_rows is 1, found 0 rows kept\n.*null_user_id 400",
        ),
        (
            "click",
            np.arange(400) % 3,
            r"max_quarantined_share is 0.2, found 33.25%: rows are bad: click_not_0_1 133",
        ),
    ],
)
def test_too_many_bad_rows_fail_the_build_and_publish_nothing(
    here: None, tmp_path: Path, column: str, values: object, message: str
):
    cfg = config_for(tmp_path, log(**{column: values}))
    cfg = dataclasses.replace(cfg, checks=config.CheckConfig(max_quarantined_share=0.2))
    with pytest.raises(UserError, match=message) as refused:
        build_sequences(cfg)
    assert "validation.html" in str(refused.value)
    assert (cfg.run_dir / "report" / "validation.html").exists()
    with pytest.raises(UserError, match="no sequences are published"):
        store.read_manifest(cfg.sequence_dir)
    assert sorted(path.name for path in cfg.sequence_dir.iterdir()) == [
        ".digests.json",
        ".lock",
        "parts",  # what was read
    ]


def test_what_is_refused_before_ray_starts(tmp_path: Path):
    with pytest.raises(UserError, match=r"source.path: no Parquet files"):
        build_sequences(config_for(tmp_path))
    with pytest.raises(UserError, match="the logs are empty, 0 rows in 1 files"):
        build_sequences(config_for(tmp_path, log(rows=0)))
    with pytest.raises(
        UserError,
        match=r"no column 'uid' for user_id \(source.columns.user_id: uid\); found \['user_id'",
    ):
        build_sequences(config_for(tmp_path, log(), columns={"user_id": "uid"}))
    with pytest.raises(UserError, match=r"no column 'click' for click; found \['user_id'"):
        build_sequences(config_for(tmp_path, log().drop_columns(["click"])))
    with pytest.raises(UserError, match=r"no column 'secs', configured as source.columns.watch_ms"):
        build_sequences(config_for(tmp_path, log(), columns={"watch_ms": "secs"}))
    with pytest.raises(UserError, match=r"source.columns: 'userid' is not a column of the logs"):
        build_sequences(config_for(tmp_path, log(), columns={"userid": "user_id"}))
    with pytest.raises(UserError, match=r"holds 2022-05-01, .* no offset: set .* zone: UTC}"):
        build_sequences(config_for(tmp_path, log(event_time=["2022-05-01"] * 400)))
    with pytest.raises(UserError, match="'item_id' must be whole numbers or text, found bool"):
        build_sequences(config_for(tmp_path, log(item_id=[True] * 400)))
    (tmp_path / "in" / "0.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        build_sequences(config_for(tmp_path))
    assert not (tmp_path / "runs").exists()


def test_one_build_at_a_time(tmp_path: Path):
    cfg = config_for(tmp_path, log())
    with (
        versions.lock_folder(cfg.sequence_dir),
        pytest.raises(UserError, match="another job is building sequences"),
    ):
        build_sequences(cfg)


def test_side_tables_are_published_under_our_names(here: None, tmp_path: Path):
    pq.write_table(
        pa.table({"uid": pa.array([3, 1], pa.int32()), "country": ["x", None]}),
        tmp_path / "users.parquet",
    )
    users = {"path": str(tmp_path / "users.parquet"), "id_column": "uid"}
    cfg = config_for(tmp_path, log(), users=users)
    first = build_sequences(cfg)
    table = store.read_side_table(cfg.sequence_dir, "users")
    assert table is not None
    assert table.to_pydict() == {"user_id": [1, 3], "country": [None, "x"]}
    assert store.read_side_table(cfg.sequence_dir, "items") is None
    pq.write_table(pa.table({"uid": [3, 1], "country": ["y", None]}), tmp_path / "users.parquet")
    assert build_sequences(cfg, overwrite=True).digest != first.digest


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"uid": [1, 1]}, "uid 1 stands in several rows"),
        ({"uid": [1, None]}, "'uid' .* is null in 1 rows"),
        ({"uid": ["1", "2"]}, "'uid' .* is text .string., user_id in the logs is a number"),
        ({"id": [1, 2]}, r"no column 'uid' .*found \['id'"),
    ],
)
def test_side_tables_need_one_row_per_id(here: None, tmp_path: Path, ids: dict, message: str):
    pq.write_table(pa.table(ids), tmp_path / "users.parquet")
    cfg = config_for(
        tmp_path, log(), users={"path": str(tmp_path / "users.parquet"), "id_column": "uid"}
    )
    with pytest.raises(UserError, match=message):
        build_sequences(cfg)


def test_the_plan_writes_nothing(tmp_path: Path):
    plan = build.plan_build(config_for(tmp_path, log(rows=300), log(rows=200)))
    assert plan["rows"] == 500
    assert plan["files"] == 2
    assert plan["buckets"] == 3
    assert not (tmp_path / "runs").exists()


def test_lists_of_every_schema_column():
    table = build_bucket(as_block([]), RULES, 5, MERGE).sequences
    assert table.column_names == [
        "user_id",
        "user_bucket",
        "first_position",
        *RULES.events.sequence_lists(),
    ]
