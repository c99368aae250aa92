"""Features of side tables as people have them: lists, dates, many texts; what cannot be read is
told before the build.
"""

import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import config
from pipeline.batches.features import fit_features
from pipeline.batches.side_codes import category_codes, list_codes, quantile_codes
from pipeline.config import ColumnFeature, ConfigError, RunConfig, UserError
from pipeline.model.tokens import ContentEncoder, mean_rows, plain_table
from pipeline.sequences import build
from tests.worlds.logs import config_for, here, log

__all__ = ["here"]

LISTS = [["a", "b"], ["b", "c", "a"], None, [], ["d", "a", None]]
TRAINING = np.array([True, True, True, True, False])


def chunked(values: list, kind: pa.DataType | None = None) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, kind)])


@pytest.mark.parametrize(
    "column",
    [
        chunked(LISTS),
        chunked(LISTS, pa.large_list(pa.string())),
        chunked([None if one is None else "|".join(map(str, filter(None, one))) for one in LISTS]),
        chunked(["a | b", "b|c|a", None, "", "d|a|a"]),
    ],
)
def test_lists_have_the_codes_of_their_values(column: pa.ChunkedArray):
    codes, size = list_codes(column, TRAINING, ColumnFeature(kind="list", list_length=3))
    # d is not seen in training
    assert codes.tolist() == [[1, 2, 0], [2, 3, 1], [0, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert size == 4
    short, _ = list_codes(column, TRAINING, ColumnFeature(kind="list", list_length=1))
    assert short.tolist() == [[1], [2], [0], [0], [0]]


def test_the_most_frequent_texts_have_a_row():
    column = chunked(["x", "y", "y", "z", "z", "w"])
    seen = np.ones(6, bool)
    codes, size = category_codes(column, seen, ColumnFeature(most_values=2))
    assert (codes.tolist(), size) == ([0, 1, 1, 2, 2, 0], 3)
    codes, size = category_codes(column, seen, ColumnFeature(most_values=3))
    assert (codes.tolist(), size) == ([0, 2, 2, 3, 3, 1], 4)  # w and x are level: the first


def test_dates_have_quantiles():
    days = [datetime.date(2020, 1, day) for day in (1, 2, 3, 4)]
    dates = chunked([*days, None])
    for column in (dates, dates.cast(pa.timestamp("us"))):
        codes, size = quantile_codes(column, np.ones(5, bool), ColumnFeature(buckets=2))
        assert (codes.tolist(), size) == ([1, 1, 2, 2, 0], 3)


def test_times_as_pandas_writes_them_and_hashes_have_quantiles():
    """Nanoseconds since 1970, and 64 bits: more than a float64 tells apart."""
    times = [1_772_603_183_314_258_488 + 10**15 * day for day in range(4)]
    hashes = [5, 2**53 + 1, 2**63 + 5, 2**64 - 1]
    for numbers, kind in ((times, pa.timestamp("ns", "UTC")), (hashes, pa.uint64())):
        column = pa.chunked_array([pa.array([*numbers, None], kind)])
        codes, size = quantile_codes(column, np.ones(5, bool), ColumnFeature(buckets=2))
        assert (codes.tolist(), size) == ([1, 1, 2, 2, 0], 3)


def test_a_list_is_the_mean_of_its_rows():
    table = plain_table("item.genres", 4, 2)
    codes = torch.tensor([[1, 2, 0], [0, 0, 0], [3, 3, 1]], dtype=torch.int32)
    w = table.weight
    expected = torch.stack([(w[1] + w[2]) / 2, torch.zeros(2), (2 * w[3] + w[1]) / 3])
    torch.testing.assert_close(mean_rows(table, codes), expected)
    torch.testing.assert_close(mean_rows(table, codes[:, :1]), w[codes[:, 0].long()])
    # who has no history has no rows
    assert mean_rows(table, codes[:0]).shape == (0, 2)


def with_items(folder: Path, features: dict, items: pa.Table, **more: object) -> RunConfig:
    cfg = config_for(folder, log())
    pq.write_table(items, folder / "items.parquet")
    raw = config.to_dict(cfg)
    raw["source"]["items"] = {"path": str(folder / "items.parquet"), "id_column": "id"}
    raw["features"]["item"] = features
    return config.from_dict(raw | more)


ITEMS = pa.table(
    {
        "id": np.arange(60),
        "genres": [["a", "b"][: number % 3] for number in range(60)],
        "bars": ["|".join("abc"[: number % 3 + 1]) for number in range(60)],
        "day": [datetime.date(2020, 1, 1 + number % 28) for number in range(60)],
        "maker": [{"name": "x"}] * 60,
        "year": [2000.5] * 60,
    }
)


def test_maps_and_tables_of_a_model_follow_the_lists(here: None, tmp_path: Path):
    features = {
        "genres": {"kind": "list", "list_length": 2, "dim": 4},
        "day": {"kind": "quantile", "buckets": 4},
        "bars": {"kind": "list", "list_length": 3, "dim": 2},
    }
    cfg = with_items(
        tmp_path,
        features,
        ITEMS,
        split={"t_val": "2022-04-15T07:00:00+00:00", "t_test": "2022-04-15T07:30:00+00:00"},
    )
    build.build_sequences(cfg)
    maps = fit_features(cfg)
    assert maps.item_codes.shape == (61, 1 + 2 + 1 + 3)
    at = maps.item_rows(np.array([2, 0]))
    assert maps.item_codes[at][:, 1:3].tolist() == [[1, 2], [0, 0]]
    assert maps.item_codes[at][:, 4:].tolist() == [[1, 2, 3], [1, 0, 0]]

    content = ContentEncoder(cfg.features, cfg.model, maps.vocab_sizes, plain_table)
    codes = torch.from_numpy(maps.item_codes[at])
    rows = content.item_features(codes)
    assert rows.shape == (2, 16 + 4 + 8 + 2)
    torch.testing.assert_close(rows[0, 16:20], content.item[0].weight[1:3].mean(0))
    assert rows[1, 16:20].tolist() == [0.0] * 4
    assert content.item_features(codes[:0]).shape == (0, 16 + 4 + 8 + 2)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"maker": {}}, "features.item.maker: must be numbers, text, dates, or lists of them"),
        ({"genres": {}}, "features.item.genres: is a list: set kind: list"),
        ({"genres": {"kind": "quantile"}}, "is a list: set kind: list"),
        ({"bars": {"kind": "quantile"}}, "must be numbers, dates or times where kind is quantile"),
        ({"year": {"kind": "list"}}, "must be lists, or text with a separator"),
        ({"color": {}}, "features.item.color: the items table .* has no such column"),
    ],
)
def test_features_that_cannot_be_read_are_told_in_a_dry_run(
    tmp_path: Path, features: dict, message: str
):
    with pytest.raises(UserError, match=message):
        build.plan_build(with_items(tmp_path, features, ITEMS))


def test_a_table_that_joins_too_little_is_told_at_the_build(here: None, tmp_path: Path):
    elsewhere = ITEMS.set_column(0, "id", pa.array(np.arange(1000, 1060)))
    with pytest.raises(UserError, match=r"source.items: the table has 0.0% of the items"):
        build.build_sequences(with_items(tmp_path, {}, elsewhere))
    some = with_items(tmp_path, {}, ITEMS.slice(0, 10))
    build.build_sequences(some)
    checks = {"min_joined_share": 0.5, "max_quarantined_share": 0.5}
    asked = with_items(tmp_path, {}, ITEMS.slice(0, 10), checks=checks)
    with pytest.raises(UserError, match=r"has \d+.\d% of the items.*min_joined_share is 0.5"):
        build.build_sequences(asked, overwrite=True)


def test_rates_by_a_list_are_refused():
    with pytest.raises(ConfigError, match=r"features.dense.genre.by must be one of"):
        config.FeatureConfig(
            item={"genres": ColumnFeature(kind="list")},
            dense={"genre": config.DenseFeature(by=("genres",))},
        )
