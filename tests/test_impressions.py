"""Rows that hold a list of exposures make the sequences that a row for each of them makes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import config
from pipeline.config import ConfigError, Impressions, RunConfig, UserError
from pipeline.logs.impressions import spread_rows, spread_schema
from pipeline.logs.rows import open_rows, rows_by_file
from pipeline.sequences import build, parts, store
from tests.worlds.logs import NOON, config_for, here

__all__ = ["here"]

REQUESTS = 60
rng = np.random.default_rng(0)
SHOWN = [rng.choice(40, rng.integers(0, 5), replace=False).tolist() for _ in range(REQUESTS)]
CLICKED = [rng.integers(0, 2, len(shown)).tolist() for shown in SHOWN]
COMMON = {
    "user_id": np.arange(REQUESTS) % 7,
    "event_time": NOON + np.arange(REQUESTS) * 60_000,
    "tab": np.arange(REQUESTS, dtype=np.int32) % 3,
}
LABELLED = [
    [f"{item}-{click}" for item, click in zip(*row, strict=True)]
    for row in zip(SHOWN, CLICKED, strict=True)
]
NAMES = ["item_id", "click"]


def as_structs() -> list[list[dict[str, int]]]:
    rows = []
    for shown, clicked in zip(SHOWN, CLICKED, strict=True):
        pairs = zip(shown, clicked, strict=True)
        rows.append([{"item_id": item, "click": click} for item, click in pairs])
    return rows


def one_row_each() -> pa.Table:
    """The exposures as most logs have them; items are text, as the parts of a text are."""
    owner = np.repeat(np.arange(REQUESTS), [len(shown) for shown in SHOWN])
    columns = {name: values[owner] for name, values in COMMON.items()}
    items = [str(item) for shown in SHOWN for item in shown]
    clicks = np.concatenate(CLICKED).astype(np.int8)
    return pa.table(columns | {"item_id": items, "click": clicks})


# the lists · how they are read
Form = Callable[[], tuple[dict[str, list], dict]]
FORMS: dict[str, Form] = {
    "text": lambda: (
        {"impressions": [" ".join(row) for row in LABELLED]},
        {"columns": ["impressions"], "names": NAMES},
    ),
    "text with commas": lambda: (
        {"impressions": [", ".join(row).replace("-", ":") for row in LABELLED]},
        {"columns": ["impressions"], "names": NAMES, "separator": ",", "part_separator": ":"},
    ),
    "list of text": lambda: (
        {"impressions": LABELLED},
        {"columns": ["impressions"], "names": NAMES},
    ),
    "structs": lambda: ({"shown": as_structs()}, {"columns": ["shown"]}),
    "lists": lambda: ({"item_id": SHOWN, "click": CLICKED}, {"columns": NAMES}),
}


def config_of(folder: Path, impressions: dict | None, *tables: pa.Table) -> RunConfig:
    folder.mkdir()
    how = {} if impressions is None else {"format": {"impressions": impressions}}
    columns = {"item_id": {"column": "item_id", "text": True}}
    actions = {"click": {"column": "click", "equals": 1}}
    return config_for(folder, *tables, actions=actions, columns=columns, **how)


def sequences(cfg: RunConfig) -> list[dict]:
    build.build_sequences(cfg)
    return store.read_sequences(cfg.sequence_dir).sort_by("user_id").to_pylist()


@pytest.mark.parametrize("form", FORMS)
def test_lists_make_the_sequences_that_a_row_for_each_makes(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(parts, "PART_ROWS", 30)  # several tasks, of row groups
    monkeypatch.setattr(parts, "BATCH_ROWS", 20)
    expected = sequences(config_of(tmp_path / "plain", None, one_row_each()))

    lists, how = FORMS[form]()
    cfg = config_of(tmp_path / "lists", how)
    table = pa.table(COMMON | lists)
    pq.write_table(table, tmp_path / "lists/in/0.parquet", row_group_size=16)
    assert sequences(cfg) == expected

    rows = sum(map(len, SHOWN))
    manifest = store.read_manifest(cfg.sequence_dir)
    assert manifest.rows_in == build.plan_build(cfg)["rows"] == rows
    assert len(manifest.parts) > 1


def test_json_lines_of_lists(here: None, tmp_path: Path) -> None:
    expected = sequences(config_of(tmp_path / "plain", None, one_row_each()))
    cfg = config_of(tmp_path / "lists", {"columns": ["shown"]})
    rows = pa.table(COMMON | {"shown": as_structs()}).to_pylist()
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "lists/in/a.jsonl").write_text(lines)
    assert sequences(cfg) == expected


def test_parts_that_are_missing_are_unknown() -> None:
    how = Impressions(columns=("shown",), names=("item", "clicked"))
    table = pa.table({"user": [1, 2, 3], "shown": ["N1-0 N-2-1", "N3", None]})
    assert spread_rows(table, how).to_pylist() == [
        {"user": 1, "item": "N1", "clicked": "0"},
        {"user": 1, "item": "N-2", "clicked": "1"},
        {"user": 2, "item": "N3", "clicked": None},
    ]
    alone = replace(how, names=())
    assert spread_rows(table, alone)["shown"].to_pylist() == ["N1-0", "N-2-1", "N3"]


def test_lists_that_cannot_be_spread_are_one_message(tmp_path: Path) -> None:
    table = pa.table({"a": [[1, 2]], "b": [[1]], "c": [0]})
    file = tmp_path / "a.parquet"
    pq.write_table(table, file)
    how = Impressions(columns=("a", "b"))
    form = config.FileFormat(impressions=how)
    with pytest.raises(UserError, match=rf"{file}: .*has 2 values in 'a' and 1 in 'b'"):
        spread_rows_of(file, form)
    with pytest.raises(UserError, match=r"no column 'x' for source\.format\.impressions; found"):
        spread_schema(table.schema, Impressions(columns=("x",)))
    text = pa.schema({"a": pa.string(), "c": pa.int64()})
    with pytest.raises(UserError, match="'c' is the name of another column too"):
        spread_schema(text, Impressions(columns=("a",), names=("c", "d")))


def spread_rows_of(file: Path, form: config.FileFormat) -> None:
    assert rows_by_file([str(file)], form) == {str(file): 2}
    with open_rows(str(file), form) as rows:
        list(rows.blocks(10, [0]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"columns": []}, "columns must be at least one column"),
        ({"columns": ["a"], "separator": ""}, "separator must be a text"),
        ({"columns": ["a", "b"], "names": ["c"]}, "names must be empty where"),
    ],
)
def test_settings_of_impressions_that_cannot_be(given: dict, message: str) -> None:
    source = {"kind": "parquet", "path": "x", "format": {"impressions": given}}
    with pytest.raises(ConfigError, match=rf"source\.format\.impressions\.{message}"):
        config.from_dict({"source": source})
    items = {"path": "y", "id_column": "id", "format": {"impressions": {"columns": ["a"]}}}
    with pytest.raises(ConfigError, match=r"source\.items\.format\.impressions must be left out"):
        config.from_dict({"source": {"kind": "parquet", "path": "x", "items": items}})
