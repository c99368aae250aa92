"""The index: which items there are, what is known of them, and which are nearest to a user."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline import config
from pipeline.config import IndexConfig, RunConfig, UserError
from pipeline.index import ivf
from pipeline.index.catalogue import Catalogue, make_table
from pipeline.index.exact import ExactIndex, top_rows
from pipeline.index.folder import build_index, load_index
from pipeline.index.popularity import count_items
from pipeline.model.artifact import load_model
from pipeline.sequences import store
from tests.worlds.items import FIRST_SEEN, ITEM_IDS, ITEMS, POPULARITY, make_catalogue
from tests.worlds.tiny import DAY_MS, publish_sequences, save_tiny_model, tiny_config

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
    assert top_rows(torch.tensor([3.0, 9, 3, 9, 3]), 3).tolist() == [1, 3, 0]


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
    build_index(cfg, cfg.model_dir)
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
    build_index(world, world.model_dir)
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
        build_index(world, world.model_dir)  # the next registration makes it whole
        assert load_index(load_model(world.model_dir), world.model_dir) is not None
    finally:
        path.write_bytes(whole)


def test_without_faiss_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install '.\[retrieval\]'"):
        ivf.import_faiss()


def test_facts_of_an_index_are_plain(world: RunConfig):
    index = load_index(load_model(world.model_dir), world.model_dir)
    assert index is not None
    assert json.loads(json.dumps(index.describe())) == index.describe()
    assert isinstance(index.catalogue.table, pa.Table)
