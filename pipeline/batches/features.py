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
import pyarrow as pa
from safetensors.numpy import load_file, save_file

from pipeline.batches.counts import LabelCounts, search_sorted
from pipeline.batches.labels import label_counts, positive_rows, rows_of_kind
from pipeline.batches.passes import pass_over, run_here
from pipeline.batches.side_codes import item_durations, published_table, side_codes, with_bare_rows
from pipeline.batches.training_rows import TrainingRows, read_rows
from pipeline.config import ColumnFeature, FeatureConfig, RunConfig, UserError
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
        codes = np.empty((num_rows, len(self.request_values)), np.int32)
        for place, (name, values) in enumerate(self.request_values.items()):
            codes[:, place] = _find_rows(values, columns[name])
        return codes

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
        table = with_bare_rows(items, features, "items", "item_id", trained)
        ids, columns, _ = side_codes(table, "item_id", features.item, trained)

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
            of_today = item_durations(table, features.duration_ms_column)[1:]
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
        read_rows, features=features, task_bits=bits, end_ms=end_ms, weighs_order_only=weighs
    )
    buckets = pass_over("reading the training period", look, cfg.sequence_dir, run)
    rows = TrainingRows.join(buckets, cfg.tasks, cfg.split, cfg.examples.negatives)

    items = published_table(cfg.sequence_dir, features, "items", "item_id", rows.items)
    users = published_table(cfg.sequence_dir, features, "users", "user_id", rows.users)
    item_ids, item_columns, item_sizes = side_codes(items, "item_id", features.item, rows.items)
    user_ids, user_columns, user_sizes = side_codes(users, "user_id", features.user, rows.users)

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
        item_duration_ms=item_durations(items, features.duration_ms_column),
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


def _with_unknown(codes: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros((1, codes.shape[1]), np.int32), codes.astype(np.int32)])


def _find_rows(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index + 1 of each `wanted` in the sorted `values`, 0 where it is absent, int64."""
    if len(values) == 0:
        return np.zeros(len(wanted), np.int64)
    index = np.minimum(search_sorted(values, wanted), len(values) - 1)
    return np.where(values[index] == wanted, index + 1, 0)
