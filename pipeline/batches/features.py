"""What is learned across users before training: vocabularies, bucket edges, popularity, rates of
labels.

All of it comes from the training period (rows before `split.train_end_ms`); an id or value not seen
there is code 0. The maps are saved beside the weights, and the server looks codes up in them and
nowhere else.
"""

import json
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from safetensors.numpy import load_file, save_file

from pipeline.batches.counts import LabelCounts, distinct_values, search_sorted
from pipeline.batches.passes import pass_over, run_here
from pipeline.config import ColumnFeature, FeatureConfig, RunConfig, SplitConfig, UserError
from pipeline.logs.arrow_errors import reading_file
from pipeline.schema import NAMED_IDS, EventColumns
from pipeline.sequences import arrow_lists, store

if typing.TYPE_CHECKING:  # it imports Ray
    from pipeline.sequences.workers import Workers

HOURS = np.arange(24, dtype=np.int64)
MS_PER_MINUTE = 60_000
# of a dense feature: numbers of users times numbers of groups stay within int64
MOST_GROUPS = 2**40


@dataclass(frozen=True, slots=True)
class FeatureMaps:
    """Ids and values → embedding rows.

    Row 0 of a codes table stands for an id that is not in it.
    """

    item_ids: np.ndarray  # int64 [I], sorted
    # int32 [I + 1, 1 + item codes]: item id, then features.item in order, a list's codes together
    item_codes: np.ndarray
    item_count: np.ndarray  # int64 [I + 1], exposures in the training period
    user_ids: np.ndarray  # int64 [U], sorted
    user_codes: np.ndarray  # int32 [U + 1, user codes], in the same way
    # request column -> int64 values, sorted; code = index + 1
    request_values: dict[str, np.ndarray]
    vocab_sizes: dict[str, int]  # rows of each embedding table, row 0 included
    # task -> positive rate over the known labels of timed training rows
    base_rates: dict[str, float]
    # Of `features.dense`: the positive rate of each task over the rows of a kind (timed,
    # order_only, all), and per feature that is not the user's own the counts of its groups, by step
    # of `features.dense_step_minutes`.
    row_rates: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, LabelCounts] = field(default_factory=dict)
    # float64 [I + 1], 0 where unknown; empty where nothing asks for it.
    item_duration_ms: np.ndarray = field(default_factory=lambda: np.zeros(0))
    # int64 [I + 1]: events of the training period that count as next items; empty without retrieval
    next_count: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    # int64, sorted: items that came after training (`with_new_items`), behind those of `item_ids`
    # in the item tables
    new_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    # of user_id and item_id those that are text in the sequences; the ids here are their codes
    text_ids: tuple[str, ...] = ()

    def refuse_other_ids(self, columns: EventColumns, where: str | Path) -> None:
        """Go on only if the sequences at `where` have ids of the kinds that the model knows.

        Raises:
            UserError: an id is text in one of them and an integer in the other.
        """
        for name in NAMED_IDS:
            if (name in self.text_ids) != (name in columns.text_ids):
                kinds = ("text", "integers") if name in self.text_ids else ("integers", "text")
                raise UserError(
                    f"{name}: the model was trained on ids that are {kinds[0]}, the sequences at "
                    f"{where} have {kinds[1]}: train again on them"
                )

    def item_rows(self, item_id: np.ndarray) -> np.ndarray:
        rows = _find_rows(self.item_ids, item_id)
        if len(self.new_ids) == 0:
            return rows
        new = _find_rows(self.new_ids, item_id)
        return np.where(new > 0, len(self.item_ids) + new, rows)

    def user_rows(self, user_id: np.ndarray) -> np.ndarray:
        return _find_rows(self.user_ids, user_id)

    def request_codes(self, columns: dict[str, np.ndarray], num_rows: int) -> np.ndarray:
        """int32 [N, request columns], `features.request` in order."""
        codes = [_find_rows(values, columns[name]) for name, values in self.request_values.items()]
        return (
            np.stack(codes, axis=1).astype(np.int32) if codes else np.zeros((num_rows, 0), np.int32)
        )

    def groups(
        self,
        by: Sequence[str],
        item_rows: np.ndarray,
        request: dict[str, np.ndarray],
        features: FeatureConfig,
    ) -> np.ndarray:
        """One number per row for its values in the columns `by`, int64 [N]; 0 where any of them is
        unknown.

        `item_rows` as `item_rows()` gives them, `request` the request columns' values.

            by item_id, tab; 4 codes of tab
            codes     (2, 3)   (1, 0)   (5, 1)
            group     11       0        21
        """
        group, known = np.zeros(len(item_rows), np.int64), np.ones(len(item_rows), bool)
        for name in by:
            if name == "item_id":
                # nothing was counted of an item that came after training
                code = np.where(item_rows <= len(self.item_ids), item_rows, 0)
            elif name in features.item:
                code = self.item_codes[item_rows, 1 + first_code(features.item, name)]
            else:
                code = _find_rows(self.request_values[name], request[name])
            group = group * self._num_codes(name, features) + code
            known &= code > 0
        return np.where(known, group, 0)

    def num_groups(self, by: Sequence[str], features: FeatureConfig) -> int:
        """The numbers of `groups` are below this."""
        return math.prod(self._num_codes(name, features) for name in by)

    def _num_codes(self, name: str, features: FeatureConfig) -> int:
        if name == "item_id":
            return len(self.item_ids) + 1
        return self.vocab_sizes[f"item.{name}" if name in features.item else f"request.{name}"]

    def frozen(self) -> "FeatureMaps":
        """With the counts of the whole training period: what evaluation and serving need."""
        return replace(
            self, counts={name: counts.whole_period() for name, counts in self.counts.items()}
        )

    def with_new_items(self, items: pa.Table, features: FeatureConfig) -> "FeatureMaps":
        """The maps with those of `items`, the item table of today, that training did not know.

        Such an item has the unknown id's code 0 and the codes of its columns: the vocabularies are
        made anew from the items of the training rows, as they were for training.

        Raises:
            UserError: the columns of an item that was trained on have changed since.
        """
        trained = self.item_ids[self.item_codes[1:, 0] > 0]
        table = _with_bare_rows(items, features, "items", "item_id", trained)
        ids, columns, _ = _side_codes(table, "item_id", features.item, trained)

        old = _find_rows(self.item_ids, ids)
        is_trained = np.isin(ids, trained)
        changed = (columns[is_trained] != self.item_codes[old[is_trained], 1:]).any(1)
        if changed.any():
            raise UserError(
                f"the item table: columns of {np.count_nonzero(changed)} items that the model was "
                f"trained on have changed since ({ids[is_trained][changed][:5].tolist()}): train "
                "anew"
            )

        new = old == 0
        codes = np.column_stack([np.zeros(np.count_nonzero(new), np.int32), columns[new]])
        durations = self.item_duration_ms
        if len(durations):
            of_today = _durations(table, features.duration_ms_column)[1:]
            durations = np.concatenate([durations, of_today[new]])
        return replace(
            self,
            new_ids=ids[new],
            item_codes=np.concatenate([self.item_codes, codes.astype(np.int32)]),
            item_duration_ms=durations,
        )

    def popular_items(self, num: int) -> np.ndarray:
        """The `num` items most often shown in the training period, most popular first, ties by id,
        int64.
        """
        order = np.lexsort((self.item_ids, -self.item_count[1:]))
        return self.item_ids[order[:num]]

    def save(self, folder: Path) -> None:
        arrays = {
            "item_ids": self.item_ids,
            "item_codes": self.item_codes,
            "item_count": self.item_count,
        }
        arrays |= {"user_ids": self.user_ids, "user_codes": self.user_codes}
        arrays |= {"item_duration_ms": self.item_duration_ms}
        if len(self.next_count):
            arrays["next_count"] = self.next_count
        for name, values in self.request_values.items():
            arrays[f"request.{name}"] = values
        for name, counts in self.counts.items():
            arrays[f"counts.{name}.groups"] = counts.groups
            arrays[f"counts.{name}.cells"] = counts.cells
            arrays[f"counts.{name}.before"] = counts.before

        packed = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(packed, folder / "features.safetensors")

        facts = {
            "request": list(self.request_values),
            "vocab_sizes": self.vocab_sizes,
            "base_rates": self.base_rates,
        }
        facts["row_rates"] = self.row_rates
        facts["counts"] = {}
        for name, counts in self.counts.items():
            facts["counts"][name] = {"start": counts.start, "span": counts.span}
        if self.text_ids:
            facts["text_ids"] = list(self.text_ids)
        (folder / "features.json").write_text(json.dumps(facts, indent=2))

    @classmethod
    def load(cls, folder: Path) -> "FeatureMaps":
        facts = json.loads((folder / "features.json").read_text())
        arrays = load_file(folder / "features.safetensors")

        counts = {}
        for name, bounds in facts["counts"].items():
            counts[name] = LabelCounts(
                groups=arrays.pop(f"counts.{name}.groups"),
                cells=arrays.pop(f"counts.{name}.cells"),
                before=arrays.pop(f"counts.{name}.before"),
                start=bounds["start"],
                span=bounds["span"],
            )

        request_values = {name: arrays.pop(f"request.{name}") for name in facts["request"]}
        return cls(
            request_values=request_values,
            vocab_sizes=facts["vocab_sizes"],
            base_rates=facts["base_rates"],
            row_rates=facts["row_rates"],
            counts=counts,
            text_ids=tuple(facts.get("text_ids", ())),
            **arrays,  # what is left
        )


def first_code(columns: Mapping[str, ColumnFeature], name: str) -> int:
    """Place of a column's first code among those of its side.

    genre (a list of 8), year      genre 0, year 8
    """
    place = 0
    for other, column in columns.items():
        if other == name:
            return place
        place += column.num_codes
    raise KeyError(name)


def fit_features(cfg: RunConfig, run: "Workers" = run_here) -> FeatureMaps:
    """The maps of the published sequences under `cfg.sequence_dir`, each bucket a task of `run`:
    the same maps whoever runs them.

    Raises:
        UserError: a configured column is not in its side table, no row lies in the training
        period, or the labels of a task are all alike there.
    """
    features, bits, end_ms = cfg.features, cfg.task_bits, cfg.split.train_end_ms
    weighs = cfg.train.history_label_weight > 0
    look = partial(
        _read_rows, features=features, task_bits=bits, end_ms=end_ms, weighs_order_only=weighs
    )
    buckets = pass_over("reading the training period", look, cfg.sequence_dir, run)
    rows = _TrainingRows.join(buckets, cfg.tasks, cfg.split, cfg.examples.negatives)
    items = _side_table(cfg.sequence_dir, features, "items", "item_id", rows.items)
    users = _side_table(cfg.sequence_dir, features, "users", "user_id", rows.users)
    item_ids, item_columns, item_sizes = _side_codes(items, "item_id", features.item, rows.items)
    user_ids, user_columns, user_sizes = _side_codes(users, "user_id", features.user, rows.users)

    # an item of the table alone has neither a code of its own nor a count
    id_codes = _find_rows(rows.items, item_ids)
    counts = np.zeros(len(item_ids), np.int64)
    counts[id_codes > 0] = rows.item_count[id_codes[id_codes > 0] - 1]

    request_values = {}
    for name in features.request:
        request_values[name] = HOURS if name == "hour" else rows.request[name]

    text_ids = store.read_manifest(cfg.sequence_dir).text_ids
    maps = FeatureMaps(
        item_ids=item_ids,
        item_codes=_with_unknown(np.column_stack([id_codes.astype(np.int32), item_columns])),
        item_count=np.concatenate([[0], counts]),
        user_ids=user_ids,
        user_codes=_with_unknown(user_columns),
        request_values=request_values,
        vocab_sizes=_table_sizes(len(rows.items), item_sizes, user_sizes, request_values),
        base_rates=rows.base_rates,
        item_duration_ms=_durations(items, features.duration_ms_column),
        text_ids=tuple(name for name in NAMED_IDS if name in text_ids),
    )
    if cfg.retrieval.enabled:
        look = partial(
            _count_next_items,
            maps=maps,
            bits=cfg.positive_bits,
            end_ms=end_ms,
            timed_only=not weighs,
        )
        found = pass_over("counting next items", look, cfg.sequence_dir, run)
        maps = replace(maps, next_count=np.sum(found, axis=0))

    if not features.dense:
        return maps
    _refuse_too_many_groups(maps, features)
    look = partial(_count_labels, maps=maps, features=features, end_ms=end_ms, task_bits=bits)
    counted = pass_over("counting labels", look, cfg.sequence_dir, run)
    return _with_counts(maps, features, counted)


def _table_sizes(
    num_items: int,
    items: Mapping[str, int],
    users: Mapping[str, int],
    request: Mapping[str, np.ndarray],
) -> dict[str, int]:
    """Rows of every embedding table; those of the columns of `items` and `users` are given."""
    sizes = {"item_id": num_items + 1}
    for name, size in items.items():
        sizes[f"item.{name}"] = size
    for name, size in users.items():
        sizes[f"user.{name}"] = size
    for name, values in request.items():
        sizes[f"request.{name}"] = len(values) + 1
    return sizes


def _count_next_items(
    table: pa.Table, maps: FeatureMaps, bits: int, end_ms: int, *, timed_only: bool
) -> np.ndarray:
    """int64 [I + 1]: a bucket's events before `end_ms` of each item that count by `bits`, those of
    `retrieval.positives`.
    """
    names = ("event_time", "action_mask", "known_mask")
    time, action, known = (arrow_lists.flat_column(table, name) for name in names)
    chosen = (time < end_ms) & positive_rows(action, known, bits)
    if timed_only:
        chosen &= ~arrow_lists.flat_column(table, "order_only")
    rows = maps.item_rows(arrow_lists.flat_column(table, "item_id")[chosen])
    return np.bincount(rows, minlength=len(maps.item_ids) + 1)


def positive_rows(action_mask: np.ndarray, known_mask: np.ndarray, bits: int) -> np.ndarray:
    """bool [N]: the events that count as next items.

    bits 110                          0: all
    action 010, known 011       true
    action 010, known 001      false
    action 001, known 111      false
    """
    if bits == 0:
        return np.ones(len(action_mask), bool)
    return (action_mask & known_mask & bits) != 0


def label_counts(
    action_mask: np.ndarray, known_mask: np.ndarray, task_bits: Sequence[int]
) -> np.ndarray:
    """bool [N, 2 tasks]: which labels of a row are known, and which are known and positive.

    task_bits 0, 2            known     positive
    action 101, known 001     1 0       1 0
    action 100, known 101     1 1       0 1
    """
    num_tasks = len(task_bits)
    labels = np.empty((len(known_mask), 2 * num_tasks), bool)
    for i, place in enumerate(task_bits):  # column by column: NumPy is slow along a short last axis
        bit = np.int32(1 << place)
        labels[:, i] = (known_mask & bit) != 0
        labels[:, num_tasks + i] = (action_mask & known_mask & bit) != 0
    return labels


def rows_of_kind(order_only: np.ndarray, rows: str) -> np.ndarray:
    """bool [N]: the rows that a dense feature of these `rows` counts."""
    return np.ones_like(order_only) if rows == "all" else order_only == (rows == "order_only")


def _refuse_too_many_groups(maps: FeatureMaps, features: FeatureConfig) -> None:
    """Raises UserError for a dense feature whose combinations of values have no numbers left."""
    for name, feature in features.dense.items():
        by = [column for column in feature.by if column != "user"]
        groups = maps.num_groups(by, features)
        if groups > MOST_GROUPS:
            raise UserError(
                f"features.dense.{name}.by: {list(feature.by)} have {groups:,} combinations of "
                f"values, more than the {MOST_GROUPS:,} that are told apart"
            )


def _with_counts(
    maps: FeatureMaps, features: FeatureConfig, buckets: "Sequence[_BucketLabels]"
) -> FeatureMaps:
    """The maps with what `features.dense` counts over the training period, bucket by bucket."""
    row_rates = {}
    for rows in {feature.rows: None for feature in features.dense.values()}:
        total = np.sum([bucket.totals[rows] for bucket in buckets], axis=0)
        known, positive = np.split(total, 2)
        row_rates[rows] = (positive / np.maximum(known, 1)).tolist()

    counts = {}
    for name, feature in features.dense.items():
        if not feature.live:
            counts[name] = LabelCounts.merge_parts([bucket.counts[name] for bucket in buckets])
    return replace(maps, row_rates=row_rates, counts=counts)


@dataclass(frozen=True, slots=True)
class _BucketLabels:
    """Labels of a bucket's rows in the training period."""

    totals: dict[str, np.ndarray]  # int64 [2 tasks], known and positive, by the kind of rows
    counts: dict[str, LabelCounts]  # of each dense feature that is not the user's own


def _count_labels(
    table: pa.Table,
    maps: FeatureMaps,
    features: FeatureConfig,
    end_ms: int,
    task_bits: Sequence[int],
) -> _BucketLabels:
    """Those of the bucket's rows before `end_ms`."""
    stored = [name for name in features.request if name != "hour"]
    names = ("item_id", "event_time", "order_only", "action_mask", "known_mask", *stored)
    training = arrow_lists.flat_column(table, "event_time") < end_ms
    flat = {name: arrow_lists.flat_column(table, name)[training] for name in names}

    labels = label_counts(flat["action_mask"], flat["known_mask"], task_bits)
    item_rows = maps.item_rows(flat["item_id"])
    step = flat["event_time"] // (features.dense_step_minutes * MS_PER_MINUTE)

    totals, counts = {}, {}
    for name, feature in features.dense.items():
        of_kind = rows_of_kind(flat["order_only"], feature.rows)
        if feature.rows not in totals:
            totals[feature.rows] = labels[of_kind].sum(0, dtype=np.int64)
        if not feature.live:
            group = maps.groups(feature.by, item_rows, flat, features)
            chosen = of_kind & (group > 0)
            counts[name] = LabelCounts.from_rows(group[chosen], step[chosen], labels[chosen])
    return _BucketLabels(totals, counts)


@dataclass(frozen=True, slots=True)
class _BucketRows:
    """Facts about a bucket's rows in the training period."""

    items: np.ndarray  # int64, sorted
    timed_items: np.ndarray  # int64, sorted: those of timed rows
    timed_count: np.ndarray  # int64: timed rows of each
    users: np.ndarray  # int64, sorted
    request: dict[str, np.ndarray]  # values of each request column in timed rows, sorted
    timed: "TaskCounts"  # labels of timed rows
    weighed: "TaskCounts"  # of the rows that the loss weighs


def _read_rows(
    table: pa.Table,
    features: FeatureConfig,
    task_bits: Sequence[int],
    end_ms: int,
    *,
    weighs_order_only: bool,
) -> _BucketRows:
    """Those of the bucket's rows before `end_ms`."""
    stored = [name for name in features.request if name != "hour"]
    names = ("item_id", "event_time", "order_only", *stored)
    flat = {name: arrow_lists.flat_column(table, name) for name in names}

    training = flat["event_time"] < end_ms
    timed = training & ~flat["order_only"]
    timed_items, timed_count = np.unique(flat["item_id"][timed], return_counts=True)
    user = np.repeat(table["user_id"].to_numpy(), np.diff(arrow_lists.list_offsets(table)))

    request = {}
    for name in stored:
        request[name] = distinct_values(flat[name][timed])
    weighed = training if weighs_order_only else timed
    return _BucketRows(
        items=distinct_values(flat["item_id"][training]),
        timed_items=timed_items,
        timed_count=timed_count,
        users=distinct_values(user[training]),
        request=request,
        timed=TaskCounts.of_rows(table, timed, task_bits),
        weighed=TaskCounts.of_rows(table, weighed, task_bits),
    )


@dataclass(frozen=True, slots=True)
class _TrainingRows:
    """Facts about the rows of the training period; `items` and `users` know order_only rows too."""

    items: np.ndarray  # int64, sorted
    item_count: np.ndarray  # timed rows of each
    users: np.ndarray  # int64, sorted
    request: dict[str, np.ndarray]  # int64 values of each request column, sorted, unknown left out
    base_rates: dict[str, float]

    @classmethod
    def join(
        cls,
        buckets: "Sequence[_BucketRows]",
        tasks: Sequence[str],
        split: SplitConfig,
        negatives: int,
    ) -> "_TrainingRows":
        """Those of all buckets; `negatives` are drawn beside each positive.

        Raises:
            UserError: no label is known, or those of a task are all alike.
        """
        # labels
        timed = weighed = TaskCounts.none(len(tasks))
        for bucket in buckets:
            timed, weighed = timed.add(bucket.timed), weighed.add(bucket.weighed)
        totals, positives = timed.known.astype(float), timed.positive.astype(float)
        if tasks and totals.max() == 0:
            end = "split.t_test" if split.refit else "split.t_val"
            raise UserError(f"no row with a known label lies before {end}: nothing to train on")

        # ids and values
        vocabulary = distinct_values(np.concatenate([bucket.items for bucket in buckets]))
        item_count = np.zeros(len(vocabulary), np.int64)
        for bucket in buckets:
            item_count[np.searchsorted(vocabulary, bucket.timed_items)] += bucket.timed_count

        known_values = {}
        for name in buckets[0].request:
            parts = [bucket.request[name] for bucket in buckets]
            values = distinct_values(np.concatenate(parts)).astype(np.int64)
            known_values[name] = values[values >= 0]

        refuse_one_class(tasks, weighed, split, negatives)

        # each drawn item is one more known label
        totals += negatives * positives
        rates = (positives / np.maximum(totals, 1)).tolist()
        return cls(
            items=vocabulary,
            item_count=item_count,
            users=distinct_values(np.concatenate([bucket.users for bucket in buckets])),
            request=known_values,
            base_rates=dict(zip(tasks, rates, strict=True)),
        )


@dataclass(frozen=True, slots=True)
class TaskCounts:
    """Labels of each task, int64 [tasks]."""

    known: np.ndarray
    positive: np.ndarray

    @classmethod
    def none(cls, num_tasks: int) -> "TaskCounts":
        return cls(np.zeros(num_tasks, np.int64), np.zeros(num_tasks, np.int64))

    @classmethod
    def of_rows(cls, table: pa.Table, chosen: np.ndarray, task_bits: Sequence[int]) -> "TaskCounts":
        """Those of the rows of SEQUENCE where `chosen`, bool [N], is true."""
        action = arrow_lists.flat_column(table, "action_mask")[chosen]
        known = arrow_lists.flat_column(table, "known_mask")[chosen]
        counts = label_counts(action, known, task_bits).sum(0, dtype=np.int64)
        return cls(*np.split(counts, 2))

    def add(self, other: "TaskCounts") -> "TaskCounts":
        return TaskCounts(self.known + other.known, self.positive + other.positive)


def refuse_one_class(
    tasks: Sequence[str], counts: TaskCounts, split: SplitConfig, negatives: int
) -> None:
    """Go on only if every task has something to tell apart; `negatives` are drawn beside each
    positive.

    Raises:
        UserError: the labels of a task are all alike in the training period, or there are none.
    """
    end = "split.t_test" if split.refit else "split.t_val"
    for task, known, positive in zip(
        tasks, counts.known.tolist(), counts.positive.tolist(), strict=True
    ):
        if known == 0:
            raise UserError(
                f"tasks: {task} is known in no row of the training period, before {end}: take it "
                "out of tasks"
            )

        alike = f"in all {known:,} rows of the training period, before {end}, that know it"
        if positive == 0:
            raise UserError(
                f"tasks: {task} is 0 {alike}: nothing can be learned of it. Take it out of tasks, "
                "or see in source.columns how it is read"
            )
        if positive == known and negatives == 0:
            raise UserError(
                f"tasks: {task} is 1 {alike}: there is nothing to tell apart. Where the logs hold "
                "positives only, set examples.negatives, to 4 for instance: so many items are "
                "drawn beside each"
            )


def _side_table(
    sequence_dir: Path, features: FeatureConfig, side: str, id_column: str, seen: np.ndarray
) -> pa.Table:
    """The published side table, as `_with_bare_rows`."""
    table = store.read_side_table(sequence_dir, side)
    if table is None:
        table = pa.table({id_column: pa.array(seen, pa.int64())})
    return _with_bare_rows(table, features, side, id_column, seen)


def _with_bare_rows(
    table: pa.Table, features: FeatureConfig, side: str, id_column: str, seen: np.ndarray
) -> pa.Table:
    """The configured columns of a side table, with a bare row for every id of the training rows
    that it does not list, sorted by id.
    """
    columns = list(features.item if side == "items" else features.user)
    keys = dict.fromkeys(columns, f"features.{side[:-1]}")
    if side == "items" and features.duration_ms_column is not None:
        keys.setdefault(features.duration_ms_column, "features.duration_ms_column")
    for name, key in keys.items():
        if name not in table.column_names:
            raise UserError(
                f"{key}: the {side} table has no column {name!r}; it has {table.column_names}"
            )
    table = table.select([id_column, *keys])
    missing = np.setdiff1d(seen, table[id_column].to_numpy())
    if len(missing):
        bare = pa.table({id_column: pa.array(missing, pa.int64())})
        table = pa.concat_tables([table, bare], promote_options="default")
    return table.sort_by(id_column)


def _durations(items: pa.Table, name: str | None) -> np.ndarray:
    """float64 [I + 1], ms, 0 for an unknown item or duration; empty where no column is named."""
    if name is None:
        return np.zeros(0)
    try:
        duration = items[name].cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        raise UserError(
            f"features.duration_ms_column: {name!r} is of type {items[name].type}, not a number"
        ) from None
    return np.concatenate([[0.0], np.nan_to_num(duration)])


def _side_codes(
    table: pa.Table, id_column: str, columns: dict[str, ColumnFeature], seen: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Ids [n], codes int32 [n, columns] and the vocabulary size of each column, values from the ids
    in `seen`.
    """
    ids = table[id_column].to_numpy()
    training = np.isin(ids, seen)
    encoders = {"quantile": _quantile_codes, "list": _list_codes, "categorical": _category_codes}
    codes, sizes = [np.zeros((len(ids), 0), np.int32)], {}
    for name, feature in columns.items():
        key = f"features.{'item' if id_column == 'item_id' else 'user'}.{name}"
        with reading_file(f"{key} ({feature.kind}, of type {table[name].type})"):
            found, sizes[name] = encoders[feature.kind](table[name], training, feature)
        codes.append(found.reshape(len(ids), feature.num_codes))
    return ids, np.concatenate(codes, axis=1), sizes


def _category_codes(
    column: pa.ChunkedArray, training: np.ndarray, feature: ColumnFeature
) -> tuple[np.ndarray, int]:
    text = column.cast(pa.large_string())
    values = _vocabulary(text.filter(pa.array(training)), feature.most_values)
    # 0: missing or not seen in training
    codes = pd.Index(values.to_pandas()).get_indexer(text.to_pandas()) + 1
    return codes.astype(np.int32), len(values) + 1


def _vocabulary(text: pa.ChunkedArray, most: int | None) -> pa.ChunkedArray | pa.Array:
    """The different texts in their order; the `most` frequent alone, of equals the first."""
    values = text.unique().drop_null().sort()
    if most is None or len(values) <= most:
        return values
    counts = text.drop_null().to_pandas().value_counts()
    ordered = sorted(counts.items(), key=lambda one: (-one[1], str(one[0])))
    return pa.array(sorted(str(value) for value, _ in ordered[:most]), pa.large_string())


def _list_codes(
    column: pa.ChunkedArray, training: np.ndarray, feature: ColumnFeature
) -> tuple[np.ndarray, int]:
    """int32 [n, list_length]: the codes of each row's values, then zeros.

    genres        a|b    b|c|a    null      a, b, c seen: codes 1, 2, 3
    codes         1 2 0  2 3 1    0 0 0     a list_length of 3
    """
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        lists = column.to_pandas().tolist()
    else:
        texts = column.cast(pa.large_string()).to_pylist()
        lists = [None if text is None else text.split(feature.separator) for text in texts]

    # each value once, in its order
    values = np.full((len(lists), feature.list_length), None, object)
    for row, found in enumerate(lists):
        if found is None:
            continue
        texts = dict.fromkeys(str(value).strip() for value in found if value is not None)
        texts.pop("", None)
        kept = list(texts)[: feature.list_length]
        values[row, : len(kept)] = kept

    flat = pa.chunked_array([pa.array(values.ravel().tolist(), pa.large_string())])
    codes, size = _category_codes(flat, np.repeat(training, feature.list_length), feature)
    return codes.reshape(values.shape), size


def _quantile_codes(
    column: pa.ChunkedArray, training: np.ndarray, feature: ColumnFeature
) -> tuple[np.ndarray, int]:
    if pa.types.is_temporal(column.type):
        width = pa.int32() if column.type.bit_width == 32 else pa.int64()
        column = column.cast(width)
    values = column.cast(pa.float64()).to_numpy()  # null becomes nan
    seen = values[training & ~np.isnan(values)]
    inner = np.linspace(0, 1, feature.buckets + 1)[1:-1]
    edges = np.unique(np.quantile(seen, inner)) if len(seen) else np.zeros(0)
    codes = np.where(np.isnan(values), 0, 1 + np.searchsorted(edges, values, side="right"))
    return codes.astype(np.int32), len(edges) + 2


def _with_unknown(codes: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros((1, codes.shape[1]), np.int32), codes.astype(np.int32)])


def _find_rows(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index + 1 of each `wanted` in the sorted `values`, 0 where it is absent, int64."""
    if len(values) == 0:
        return np.zeros(len(wanted), np.int64)
    index = np.minimum(search_sorted(values, wanted), len(values) - 1)
    return np.where(values[index] == wanted, index + 1, 0)
