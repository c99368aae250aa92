"""The index: which items there are, what is known of them, and which are nearest to a user."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline import config
from pipeline.batches.features import FeatureMaps
from pipeline.batches.side_codes import side_codes
from pipeline.config import (
    ColumnFeature,
    FeatureConfig,
    IndexConfig,
    RetrievalConfig,
    RunConfig,
    UserError,
)
from pipeline.index import ivf
from pipeline.index.catalogue import Catalogue, make_table
from pipeline.index.exact import ExactIndex, top_rows, top_rows_on_device
from pipeline.index.folder import load_index, load_indexed
from pipeline.index.popularity import count_items
from pipeline.model.artifact import load_model
from pipeline.sequences import store
from tests.worlds.items import FIRST_SEEN, ITEM_IDS, ITEMS, POPULARITY, make_catalogue
from tests.worlds.tiny import DAY_MS, index_model, publish_sequences, save_tiny_model, tiny_config

# The catalogue -----------------------------------------------------------------


def test_columns_keep_their_kind_and_what_is_unknown():
    catalogue = make_catalogue()
    kinds = {name: column.kind for name, column in catalogue.columns.items()}
    assert kinds == {
        "author": "integer",
        "seconds": "number",
        "lang": "text",
        "is_short": "boolean",
        "made": "integer",
    }, "a list has no place in a filter"

    values = {name: column.value(3) for name, column in catalogue.columns.items()}
    assert values == {
        "author": 2,
        "seconds": 40.0,
        "lang": None,
        "is_short": False,
        "made": 4000,
    }
    assert [column.value(7) for column in catalogue.columns.values()] == [None] * 5


def test_columns_as_pandas_writes_them():
    """Times finer than a millisecond, and hashes beyond 63 bits."""
    items = pa.table(
        {
            "item_id": ITEM_IDS[:2],
            "posted": pa.array([1_772_603_183_314_258_488, None], pa.timestamp("ns")),
            "hash": pa.array([2**64 - 1, 7], pa.uint64()),
        }
    )
    table = make_table(ITEM_IDS, POPULARITY, FIRST_SEEN, items, IndexConfig())
    columns = Catalogue(table).columns
    assert [columns["posted"].value(row) for row in (0, 1, 2)] == [1_772_603_183_314, None, None]
    assert [columns["hash"].value(row) for row in (0, 1)] == [str(2**64 - 1), "7"]


def test_the_most_popular_first_ties_by_id():
    assert make_catalogue().popular_rows.tolist() == [1, 3, 6, 0, 7, 5, 2, 4]


def test_ids_that_are_text_are_given_back_as_text():
    texts = pa.array([f"sku-{i}" for i in range(8)])
    table = make_table(ITEM_IDS, POPULARITY, FIRST_SEEN, None, IndexConfig(), texts)
    catalogue = Catalogue(table)
    assert catalogue.own_ids(np.array([3, 0])).tolist() == ["sku-3", "sku-0"]
    assert catalogue.columns == {}, "an id is no column of the item table"
    assert make_catalogue().own_ids(np.array([3, 0])).tolist() == [40, 10]


def test_rows_of_ids_each_once():
    assert make_catalogue().find_rows(np.array([30, 5, 80, 90, 30])).tolist() == [2, 7]


def test_named_columns_alone():
    catalogue = make_catalogue(columns=("lang", "author"), title_column="lang")
    assert sorted(catalogue.columns) == ["author", "lang"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": ("colour",)}, r"index.columns: colour: .* no column 'colour'; it has \['auth"),
        ({"columns": ("tags",)}, "index.columns: 'tags' of the item table is of type list"),
        ({"title_column": "title"}, "index.title_column: .* no column 'title'"),
        (
            {"followed": {"action": "is_follow", "author_column": "maker"}},
            "index.followed.author_column: .* no column 'maker'",
        ),
    ],
)
def test_a_wrong_column_is_named(settings: dict, message: str):
    if "followed" in settings:
        settings = {"followed": config.FollowedConfig(**settings["followed"])}
    with pytest.raises(UserError, match=message):
        make_table(ITEM_IDS, POPULARITY, FIRST_SEEN, ITEMS, IndexConfig(**settings))


def test_a_title_must_travel():
    with pytest.raises(
        UserError, match=r"index.title_column must be one of index.columns, got 't'"
    ):
        IndexConfig(columns=("lang",), title_column="t")


# Search ------------------------------------------------------------------------


def oracle(scores: np.ndarray, num: int, allowed: np.ndarray) -> list[int]:
    rows = np.flatnonzero(allowed)
    return sorted(rows.tolist(), key=lambda row: (-scores[row], row))[:num]


def test_exact_search_is_a_sort_with_ties_by_row():
    rng = np.random.default_rng(0)
    vectors = rng.integers(-2, 3, (200, 3)).astype(np.float32)  # products of integers: many ties
    index = ExactIndex(torch.from_numpy(vectors))
    for num in (1, 7, 50, 500):
        query = rng.integers(-2, 3, 3).astype(np.float32)
        allowed = rng.random(200) < 0.5
        found = index.search(torch.from_numpy(query), num, allowed)
        assert found.tolist() == oracle(vectors @ query, num, allowed)


def test_nothing_allowed_is_nothing_found():
    index = ExactIndex(torch.ones(5, 2))
    assert index.search(torch.ones(2), 3, np.zeros(5, bool)).tolist() == []


@pytest.mark.parametrize("num", [1, 3, 5])
def test_the_best_rows_on_host_and_device(num: int):
    scores = torch.tensor([3.0, 9, -torch.inf, 9, 3])
    expected = [1, 3, 0, 4, 2][:num]
    assert top_rows(scores, num).tolist() == expected
    assert top_rows_on_device(scores, num).tolist() == expected


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, Path]:
    vectors = np.random.default_rng(1).normal(size=(1500, 8)).astype(np.float32)
    path = tmp_path_factory.mktemp("lists") / "lists.faiss"
    ivf.write_lists(vectors, path)
    return torch.from_numpy(vectors), path


def test_all_lists_are_as_good_as_exact(lists: tuple[torch.Tensor, Path]):
    vectors, path = lists
    index = ivf.ListIndex(vectors, path, probes=10_000, exact_up_to=0)
    assert ivf.measure_recall(index, vectors[:20], 50) > 0.99  # a product may round differently

    allowed = np.arange(1500) % 3 == 0
    found = index.search(vectors[0], 40, allowed)
    assert len(np.unique(found)) == 40
    assert allowed[found].all()


def test_few_lists_miss_some_and_say_so(lists: tuple[torch.Tensor, Path]):
    vectors, path = lists
    index = ivf.ListIndex(vectors, path, probes=1, exact_up_to=100)
    assert ivf.measure_recall(index, vectors[:20], 50) < 0.9

    few = np.arange(1500) < 100
    expected = ExactIndex(vectors).search(vectors[0], 40, few)
    assert index.search(vectors[0], 40, few).tolist() == expected.tolist(), "few are compared all"


# Built, loaded, refused ----------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    cfg = tiny_config(tmp_path_factory.mktemp("index") / "runs", index={"popular_days": 2.0})
    publish_sequences(cfg)
    save_tiny_model(cfg, cfg.model_dir)
    index_model(cfg, cfg.model_dir)
    return cfg


def test_popular_is_what_the_last_days_of_training_showed(world: RunConfig):
    end, items = world.split.train_end_ms, np.arange(0, 60, 2)
    found = count_items(world.sequence_dir, items, end, world.source, world.index)

    popularity, first_seen = dict.fromkeys(items.tolist(), 0), {}
    for row in store.read_sequences(world.sequence_dir).to_pylist():
        for item, time, order_only in zip(
            row["item_id"], row["event_time"], row["order_only"], strict=True
        ):
            if item % 2 or order_only or time >= end:
                continue
            first_seen[item] = min(time, first_seen.get(item, time))
            popularity[item] += time >= end - 2 * DAY_MS
    assert found.popularity.tolist() == list(popularity.values())
    assert found.first_seen.tolist() == [first_seen.get(item, np.inf) for item in items.tolist()]
    assert found.popularity.sum() > 0


def test_only_rows_with_the_actions_make_popular(world: RunConfig):
    items = np.arange(60)
    counts = []
    for actions in ((), ("is_like",), ("is_click", "is_like")):
        cfg = IndexConfig(popular_actions=actions)
        end = world.split.train_end_ms
        counts.append(count_items(world.sequence_dir, items, end, world.source, cfg).popularity)
    assert (counts[1] <= counts[2]).all()
    assert (counts[2] <= counts[0]).all()
    assert counts[1].sum() < counts[2].sum() < counts[0].sum()


def test_an_index_is_built_once_for_its_model(world: RunConfig):
    loaded = load_model(world.model_dir)
    index = load_index(loaded, world.model_dir)
    assert index is not None
    assert index.catalogue.item_ids.tolist() == loaded.maps.item_ids.tolist()
    assert index.describe()["search"] == "none"

    digests = world.model_dir / "index" / "artifact.json"
    before = digests.stat().st_mtime_ns
    index_model(world, world.model_dir)
    assert digests.stat().st_mtime_ns == before


def test_the_index_of_another_model_is_refused(world: RunConfig, tmp_path: Path):
    other = save_tiny_model(world, tmp_path / "other", seed=5)
    (world.model_dir / "index").rename(other / "index")
    try:
        with pytest.raises(UserError, match="belongs to another model"):
            load_index(load_model(other), other)
    finally:
        (other / "index").rename(world.model_dir / "index")
    assert load_index(load_model(other), other) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [("catalogue.parquet", "corrupted: catalogue.parquet"), ("artifact.json", "half-written")],
)
def test_a_folder_cut_in_the_middle_is_refused(world: RunConfig, name: str, message: str):
    path = world.model_dir / "index" / name
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=message):
            load_index(load_model(world.model_dir), world.model_dir)
        index_model(world, world.model_dir)  # the next registration makes it whole
        assert load_index(load_model(world.model_dir), world.model_dir) is not None
    finally:
        path.write_bytes(whole)


# Items that came after training -------------------------------------------------


@pytest.fixture(scope="module")
def maps_and_items() -> tuple[FeatureMaps, pa.Table, FeatureConfig]:
    """Maps of items 0, 2, …, 18, of which 18 was never shown; a category, a number, a duration."""
    shown = np.arange(0, 18, 2)
    features = FeatureConfig(
        item={
            "lang": ColumnFeature(dim=2),
            "price": ColumnFeature(dim=2, kind="quantile", buckets=4),
        },
        duration_ms_column="ms",
        watch_shares=(0.5,),
    )
    items = item_table(np.arange(0, 20, 2))
    ids, columns, sizes = side_codes(items, "item_id", features.item, shown)
    codes = np.column_stack([np.append(np.arange(1, 10), 0), columns])
    maps = FeatureMaps(
        item_ids=ids,
        item_codes=np.concatenate([np.zeros((1, 3)), codes]).astype(np.int32),
        item_count=np.ones(11, np.int64),
        user_ids=np.zeros(0, np.int64),
        user_codes=np.zeros((1, 0), np.int32),
        request_values={},
        vocab_sizes={"item_id": 10} | {f"item.{name}": size for name, size in sizes.items()},
        base_rates={},
        item_duration_ms=np.append(0.0, 100.0 * ids),
    )
    return maps, items, features


def item_table(ids: np.ndarray) -> pa.Table:
    return pa.table(
        {
            "item_id": ids,
            "lang": [["de", "en", "fr"][i % 3] for i in ids.tolist()],
            "price": ids.astype(float) ** 2,
            "ms": 100 * ids,
        }
    )


def test_a_new_item_has_the_codes_of_its_columns(maps_and_items):
    maps, _, features = maps_and_items
    today = item_table(np.array([*range(0, 20, 2), 3, 7, 99]))
    today = today.set_column(1, "lang", pa.array([*today["lang"].to_pylist()[:-1], "xx"]))
    grown = maps.with_new_items(today, features)

    rows = grown.item_rows(np.array([2, 18, 3, 7, 99, 5]))
    assert rows.tolist() == [2, 10, 11, 12, 13, 0]
    lang, price = grown.item_codes[rows, 1], grown.item_codes[rows, 2]
    like = grown.item_codes[grown.item_rows(np.array([0, 4, 16])), 1:]
    assert lang.tolist()[2:4] == [like[0, 0], like[1, 0]], "3 as 0, 7 as 4"
    assert grown.item_codes[rows, 0].tolist() == [2, 0, 0, 0, 0, 0]
    assert (lang[4], price[4]) == (0, like[2, 1]), "an unknown word, and the highest prices"
    assert grown.item_duration_ms[rows].tolist() == [200, 1800, 300, 700, 9900, 0]
    np.testing.assert_array_equal(grown.item_codes[:11], maps.item_codes)


def test_trained_items_that_changed_are_refused(maps_and_items):
    maps, items, features = maps_and_items
    words = items["lang"].to_pylist()
    words[1] = "de" if words[1] != "de" else "en"
    with pytest.raises(UserError, match=r"columns of 1 items .* changed since \(\[2\]\): train"):
        maps.with_new_items(items.set_column(1, "lang", pa.array(words)), features)


def test_counts_of_items_stay_with_them(world: RunConfig):
    """New rows lie behind the old ones, so that no group of the counts is another's."""
    loaded = load_model(world.model_dir)
    maps, features = loaded.maps, loaded.cfg.features
    new = int(maps.item_ids.max()) + 1
    items = pa.table({"item_id": np.append(maps.item_ids, new)})
    grown = maps.with_new_items(items, features)

    asked = np.array([maps.item_ids[3], new])
    old = maps.groups(["item_id"], maps.item_rows(asked), {}, features)
    now = grown.groups(["item_id"], grown.item_rows(asked), {}, features)
    assert old.tolist() == now.tolist()
    assert now[1] == 0, "nothing was counted of it"


def test_new_items_travel_with_the_index(world: RunConfig, tmp_path: Path):
    known = load_model(world.model_dir).maps.item_ids
    later = replace(
        world,
        runs_dir=str(tmp_path),
        retrieval=RetrievalConfig(enabled=True, dim=4),
        train=replace(world.train, max_targets_per_sequence=6),
    )
    publish_sequences(later)
    model_dir = save_tiny_model(later, tmp_path / "model")
    table = pa.table({"item_id": pa.array([*known.tolist(), 70, 71], pa.int64())})
    manifest = store.read_manifest(later.sequence_dir)
    items = store.write_table(table, later.sequence_dir, "tables/items")
    tables = manifest.side_tables | {"items": items}
    store.write_manifest(later.sequence_dir, replace(manifest, side_tables=tables))
    index_model(later, model_dir)

    loaded, index = load_indexed(model_dir)
    assert index is not None
    assert index.catalogue.item_ids.tolist() == [*known.tolist(), 70, 71]
    assert loaded.maps.item_rows(np.array([70, 71])).tolist() == [len(known) + 1, len(known) + 2]
    assert index.vectors is not None
    vectors = index.vectors.vectors
    torch.testing.assert_close(vectors[-1], vectors[-2])  # no columns: both the unknown id
    assert not torch.allclose(vectors[0], vectors[-1])


def test_without_faiss_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install '.\[retrieval\]'"):
        ivf.import_faiss()


def test_facts_of_an_index_are_plain(world: RunConfig):
    index = load_index(load_model(world.model_dir), world.model_dir)
    assert index is not None
    assert json.loads(json.dumps(index.describe())) == index.describe()
    assert isinstance(index.catalogue.table, pa.Table)
