"""A rank request and its answer as columns: what the ranker works on, whatever body they came in or
go out as.

    JSON  → RankRequest ─┐                                          ┌→ RankResponse → JSON
    Arrow ───────────────┴→ RankColumns → ranker → RankedColumns ───┴→ Arrow

The Arrow body is one IPC stream: a column `item_id` (int64, or string) and a column per request
feature (int32, or the logs' own text; null where the request's own holds), and in the schema's
metadata, under `rank`, the rest of the request as the JSON of `RankHead`. The answer has `item_id`,
`score.<task>` (float32) and `place` (int32, 0 is best), and its other fields under `rank`; with
`top_k` its rows are the best alone, and `candidate` (int32) says which of the request's they are.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ValidationError

from pipeline.logs.columns import text_codes as feature_codes
from pipeline.logs.ids import LONGEST_ID, text_codes
from serve_app.client_json import MOST_NAMES, BadJson, read_json
from serve_app.ids import TextId, id_text
from serve_app.schemas import (
    RankExplanation,
    RankHead,
    RankRequest,
    RankResponse,
    Refusal,
    TextValue,
)

MEDIA_TYPE = "application/vnd.apache.arrow.stream"
HEAD = b"rank"  # the metadata key
UNKNOWN = -1  # of a request column
Head = TypeVar("Head", bound=BaseModel)
ID_TYPES = (pa.int64(), pa.string(), pa.large_string())
FEATURE_TYPES = (pa.int32(), pa.string(), pa.large_string())


class BadBody(ValueError):
    """An Arrow body that is no rank request: which part of it, and why."""

    def __init__(self, refusals: list[Refusal]) -> None:
        super().__init__(refusals[0].msg)
        self.refusals = refusals


@dataclass(frozen=True, slots=True)
class RankColumns:
    """C candidates of one request."""

    head: RankHead
    item_id: np.ndarray  # int64 [C]
    # int32 [C], -1 is unknown; a column that is left out is the request's
    features: Mapping[str, np.ndarray]
    item_text: Sequence[str] | None = None  # [C], of ids that are text; `item_id` has their codes
    # of the features that came as text one value each; `features` has their codes
    feature_texts: Mapping[str, TextValue] = field(default_factory=dict)

    @property
    def user_id(self) -> int | None:
        return self.head.user_id

    @property
    def trial_key(self) -> str | None:
        return self.head.trial_key

    def __len__(self) -> int:
        return len(self.item_id)

    def take(self, rows: np.ndarray) -> "RankColumns":
        """These candidates alone."""
        texts = self.item_text
        return replace(
            self,
            item_id=self.item_id[rows],
            features={name: column[rows] for name, column in self.features.items()},
            item_text=None if texts is None else [texts[row] for row in rows.tolist()],
        )

    def feature(self, name: str) -> np.ndarray:
        """int32 [C]"""
        if name in self.features:
            return self.features[name]
        return np.full(len(self), self.head.request_features.get(name, UNKNOWN), np.int32)

    @classmethod
    def of(cls, request: RankRequest) -> "RankColumns":
        """The same as columns.

        Raises:
            BadBody: some item ids are text and some are integers, or the candidates name more than
            `MOST_NAMES` features.
        """
        asked = request.candidates
        items = [candidate.item_id for candidate in asked]
        features: dict[str, np.ndarray] = {}
        texts: dict[str, TextValue] = {}
        for place, candidate in enumerate(asked):
            for name, value in candidate.request_features.items():
                if name not in features:
                    _refuse_one_more(features, place)
                    shared = request.request_features.get(name, UNKNOWN)
                    features[name] = np.full(len(asked), shared, np.int32)
                features[name][place] = value
                if isinstance(value, TextValue):
                    texts.setdefault(name, value)

        head = {name: getattr(request, name) for name in RankHead.model_fields}
        return cls(
            head=RankHead.model_construct(**head),  # validated already
            item_id=np.array(items, np.int64),
            item_text=_texts_of(items),
            features=dict(sorted(features.items())),
            feature_texts=texts,
        )

    @classmethod
    def from_arrow(cls, body: bytes) -> "RankColumns":
        """
        Raises:
            BadBody: not an Arrow stream, a column or type that does not belong there, or a bad
            head.
        """
        table = read_stream(body, "item_id")
        head = read_head(table.schema.metadata or {}, RankHead)
        if table.num_rows == 0:
            raise BadBody([Refusal.of(["body", "item_id"], "at least one candidate", 0)])
        item_id, item_text = read_ids(table, "item_id")
        features, texts = read_features(table, ["item_id"], head.request_features)
        return cls(head, item_id, features, item_text, texts)


@dataclass(frozen=True, slots=True)
class RankedColumns:
    """The answer to a `RankColumns`, its rows in the same order."""

    head: dict[str, Any]  # the fields of `RankResponse` that are not per candidate
    item_id: np.ndarray  # int64 [C]
    scores: dict[str, np.ndarray]  # task -> float32 [C]
    order: np.ndarray  # int64 [C], the rows best first
    ranker_ms: float | None = None  # of the pass that it was part of: a header of its own
    scored_s: float = 0.0  # end of that pass, by `time.perf_counter` of the replica
    # what the request took apart from the pass, by the names of `web.rank.HOPS`
    hops_ms: Mapping[str, float] = field(default_factory=dict)
    item_text: Sequence[str] | None = None  # as of `RankColumns`
    rows: np.ndarray | None = None  # int64 [C]: which of the request's; None: all, in their order
    explanation: RankExplanation | None = None
    role: str = ""  # of the version: champion or canary
    sequences: str = ""  # digest of the published sequences behind the history

    @property
    def model_version(self) -> int:
        return self.head["model_version"]

    @property
    def unknown_items(self) -> int:
        return self.head["unknown_items"]

    @property
    def live_events(self) -> bool:
        return self.head.get("live_events", True)

    def best(self, num: int) -> "RankedColumns":
        """The best `num` rows alone, the best first.

        scores   .1 .4 .4 .2      num = 2
        rows     1 2
        """
        rows = self.order[:num]
        texts = self.item_text
        return replace(
            self,
            item_id=self.item_id[rows],
            scores={task: values[rows] for task, values in self.scores.items()},
            order=np.arange(len(rows)),
            item_text=None if texts is None else [texts[row] for row in rows.tolist()],
            rows=rows,
        )

    def response(self) -> RankResponse:
        """The answer as an object of the HTTP API; fields that were not asked for are unset."""
        extra: dict[str, Any] = {}
        if self.rows is not None:
            extra["candidates"] = self.rows.tolist()
        if self.explanation is not None:
            extra["explanation"] = self.explanation

        return RankResponse.model_construct(
            **self.head,
            item_ids=self.item_id.tolist() if self.item_text is None else list(self.item_text),
            scores={task: values.tolist() for task, values in self.scores.items()},
            order=self.order.tolist(),
            **extra,
        )

    def to_arrow(self) -> bytes:
        """The answer as the Arrow stream that the module describes."""
        head = self.head
        if self.explanation is not None:
            head = head | {"explanation": self.explanation.model_dump(mode="json")}
        return write_stream(self.table().replace_schema_metadata({HEAD: json.dumps(head)}))

    def table(self) -> pa.Table:
        """The rows as columns: `item_id`, `score.<task>`, `place`, and `candidate` with `top_k`."""
        place = np.empty(len(self.order), np.int32)
        place[self.order] = np.arange(len(self.order), dtype=np.int32)

        items = self.item_id if self.item_text is None else pa.array(self.item_text, pa.string())
        columns: dict[str, Any] = {"item_id": items}
        for task, values in self.scores.items():
            columns[f"score.{task}"] = values
        columns["place"] = place
        if self.rows is not None:
            columns["candidate"] = self.rows.astype(np.int32)
        return pa.table(columns)


def write_stream(table: pa.Table) -> bytes:
    """The table as one Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def read_stream(body: bytes, *ids: str) -> pa.Table:
    """The stream's batches: columns `ids` (int64 or text, no nulls) and others of int32 or text.

    Every type and buffer is checked first: a body may claim what it does not hold.

    Raises:
        BadBody: not an Arrow stream, or a column or type that does not belong there.
    """
    try:
        for i, message in enumerate(pa.ipc.MessageReader.open_stream(body)):
            if message.type != ("record batch" if i else "schema") or (
                i and _is_compressed(message)
            ):
                raise BadBody(
                    [Refusal.of(["body"], "a schema and uncompressed record batches", message.type)]
                )
        stream = pa.ipc.open_stream(body)
        _check_schema(stream.schema, ids)
        table = stream.read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadBody(
            [Refusal.of(["body"], f"not an Arrow IPC stream: {error}", f"{len(body)} bytes")]
        ) from None
    # hundreds of columns may name the same bytes, and each would be copied
    if table.nbytes > len(body):
        rule = "columns of bytes of their own"
        raise BadBody([Refusal.of(["body"], rule, f"{table.nbytes} in {len(body)} bytes")])
    for name in ids:
        if table[name].null_count:
            nulls = f"{table[name].null_count} nulls"
            raise BadBody([Refusal.of(["body", name], "no nulls", nulls)])
    return table


def _check_schema(schema: pa.Schema, ids: Sequence[str]) -> None:
    if len(schema) > len(ids) + MOST_NAMES:
        rule = f"at most {MOST_NAMES} columns beside {', '.join(ids)}"
        raise BadBody([Refusal.of(["body"], rule, len(schema))])
    for name in ids:
        if schema.names.count(name) != 1 or len(set(schema.names)) != len(schema.names):
            rule = f"one column {name}, and no name twice"
            raise BadBody([Refusal.of(["body"], rule, schema.names)])
    for column in schema:
        allowed = ID_TYPES if column.name in ids else FEATURE_TYPES
        if column.type not in allowed:
            rule = f"must be {' or '.join(map(str, allowed))}"
            raise BadBody([Refusal.of(["body", column.name], rule, column.type)])


def refuse_many_users(num_users: int, most: int) -> None:
    """Raises BadBody for a body of more users than one request may have."""
    if num_users > most:
        raise BadBody([Refusal.of(["body", "requests"], f"at most {most} users", num_users)])


def read_ids(table: pa.Table, name: str) -> tuple[np.ndarray, list[str] | None]:
    """A column of ids that `read_stream` let pass: int64 [n], and the texts where they are text.

    Raises:
        BadBody: one is negative, empty or too long.
    """
    if table.schema.field(name).type == pa.int64():
        ids = table[name].to_numpy()
        if ids.min(initial=0) < 0:
            raise BadBody([Refusal.of(["body", name], "must be 0 or more", int(ids.min()))])
        return ids, None

    texts = table[name].to_pylist()
    for text in texts:
        if not 0 < len(text) <= LONGEST_ID:
            rule = f"must be text of 1 to {LONGEST_ID} characters"
            raise BadBody([Refusal.of(["body", name], rule, text)])
    return text_codes(texts), texts


def read_features(
    table: pa.Table, ids: Sequence[str], shared: Mapping[str, int]
) -> tuple[dict[str, np.ndarray], dict[str, TextValue]]:
    """All columns but `ids`: int32 [n] each, nulls as in `shared`, and a text of those that have
    text.
    """
    features, texts = {}, {}
    for name in table.column_names:
        if name in ids:
            continue
        codes, text = read_feature(table[name])
        unknown = int(shared.get(name, UNKNOWN))
        features[name] = codes.fill_null(unknown).to_numpy()
        if text is not None:
            texts[name] = text
    return features, texts


def read_feature(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, TextValue | None]:
    """A request feature that `read_stream` let pass: int32 codes, null where unknown, and one of
    the texts where it has text.
    """
    if column.type == pa.int32():
        return column, None
    values = column.combine_chunks()
    codes = pa.chunked_array([feature_codes(values).cast(pa.int32())])
    known = values.filter(codes.is_valid())
    return codes, TextValue(known[0].as_py()) if len(known) else None


def _refuse_one_more(features: Mapping[str, np.ndarray], place: int) -> None:
    """Raises BadBody where a candidate names another feature than the most that there may be."""
    if len(features) == MOST_NAMES:
        where = ["body", "candidates", place, "request_features"]
        rule = f"at most {MOST_NAMES} features of all candidates together"
        raise BadBody([Refusal.of(where, rule, MOST_NAMES + 1)])


def _texts_of(items: Sequence[int]) -> list[str] | None:
    """The texts of candidates that are text.

    Raises:
        BadBody: some are text and some are integers.
    """
    kinds = set(map(type, items))
    if TextId not in kinds:
        return None
    texts = []
    for place, item in enumerate(items):
        text = id_text(item)
        if text is None:
            where = ["body", "candidates", place, "item_id"]
            raise BadBody([Refusal.of(where, "must be text like those of the others", item)])
        texts.append(text)
    return texts


def _is_compressed(message: pa.ipc.Message) -> bool:
    """Whether a record batch says so: a few compressed bytes can stand for gigabytes, and pyarrow
    would unpack them.

    Message.header → RecordBatch.compression, by the flatbuffer's tables, which pyarrow has verified
    on reading.
    """
    data = message.metadata.to_pybytes()

    def field(table: int, index: int) -> int:
        """Where a table's field is, 0 if it has none."""
        vtable = table - struct.unpack_from("<i", data, table)[0]
        size = struct.unpack_from("<H", data, vtable)[0]
        offset = (
            struct.unpack_from("<H", data, vtable + 4 + 2 * index)[0] if 4 + 2 * index < size else 0
        )
        return table + offset if offset else 0

    root = struct.unpack_from("<I", data, 0)[0]
    header = field(root, 2)
    return header != 0 and field(header + struct.unpack_from("<I", data, header)[0], 3) != 0


def read_head(metadata: Mapping[bytes, bytes], kind: type[Head]) -> Head:
    """The JSON under `rank` of a schema's metadata.

    Raises:
        BadBody: there is none, or it is no such object.
    """
    if HEAD not in metadata:
        rule = "missing from the schema's metadata"
        raise BadBody([Refusal.of(["body", HEAD.decode()], rule, list(metadata))])
    return read_object(metadata[HEAD], kind, ["body", HEAD.decode()])


def read_object(text: bytes, kind: type[Head], where: Sequence[str]) -> Head:
    """An object of this kind from its JSON, which lies at `where`.

    Raises:
        BadBody: it is no such object.
    """
    try:
        return kind.model_validate(read_json(text))
    except ValidationError as error:
        raise BadBody(refusals_of(error, where)) from None
    except BadJson as error:
        raise BadBody([error.refusal.model_copy(update={"loc": [*where]})]) from None
    except (ValueError, RecursionError) as error:
        raise BadBody([Refusal.of(where, f"not JSON: {error}", f"{len(text)} bytes")]) from None


def refusals_of(error: ValidationError, where: Sequence[str]) -> list[Refusal]:
    """What pydantic found wrong in the object that lies at `where`."""
    found = []
    for one in error.errors():
        found.append(Refusal.of([*where, *one["loc"]], one["msg"], one.get("input")))
    return found
