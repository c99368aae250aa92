"""What an answer says of its best places, as rows of the served log.

    rank request + scores   ─┐
    recommend request + list ┴→ Served → rows: request, user, item, place, scores, features, version

Ids are codes, with the text beside them where they are text: `user_text`, `item_text`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.logs.ids import text_codes
from serve_app.columns import UNKNOWN, RankColumns, RankedColumns
from serve_app.ids import id_text
from serve_app.recommend.lists import RecommendedList
from serve_app.recommend.schemas import RecommendRequest
from serve_app.schemas import UserHead

SCORE, FEATURE = "score.", "feature."
RANK, RECOMMEND = "rank", "recommend"
FIXED = pa.schema(
    [
        ("request_id", pa.string()),
        ("kind", pa.string()),  # rank or recommend
        ("unit", pa.string()),  # whose trial it is: the user, or the key that the client gave
        ("user_id", pa.int64()),  # null: the request named none
        ("user_text", pa.string()),
        ("event_time", pa.int64()),  # the request's, in ms
        ("served_at", pa.int64()),  # ms
        ("item_id", pa.int64()),
        ("item_text", pa.string()),
        ("place", pa.int32()),  # 0 is best
        ("source", pa.string()),  # of a list: model, followed or popular
        ("version", pa.int32()),
        ("role", pa.string()),
        ("sequences", pa.string()),  # digest of the published sequences behind the history
        ("history_length", pa.int32()),
        ("ranker_ms", pa.float32()),
        ("failure", pa.string()),  # of a request without an answer: why; most else is null then
    ]
)


@dataclass(frozen=True, slots=True)
class ServedPlaces:
    """The K best places of an answer."""

    item_id: np.ndarray  # int64 [K]
    item_text: Sequence[str] | None  # [K], of ids that are text
    scores: Mapping[str, np.ndarray]  # float32 [K] by task
    features: Mapping[str, np.ndarray]  # int32 [K] by request column
    source: Sequence[str] | None  # [K], of a list


@dataclass(frozen=True, slots=True)
class Served:
    """One answer on its way to a file."""

    request: RankColumns | RecommendRequest
    answer: RankedColumns | RecommendedList
    request_id: str
    served_at: int

    @property
    def head(self) -> UserHead:
        """Whose history it is, and when."""
        return head_of(self.request)

    def columns(self) -> tuple[str, ...]:
        """The names of the columns beside FIXED."""
        features = set(self.head.request_features)
        if isinstance(self.request, RankColumns):
            features |= set(self.request.features)

        names = [FEATURE + name for name in sorted(features)]
        names += [SCORE + task for task in self.answer.scores]
        return tuple(names)

    def rows(self, most: int) -> pa.Table:
        """A row for each of its best `most` places."""
        return _served_rows(self, most)

    def places(self, most: int) -> ServedPlaces:
        """The best of them.

        item_id   10 11 12      order  1 2 0      most = 2
        places    11 12
        """
        if isinstance(self.answer, RecommendedList):
            return _list_places(self.answer, self.head, most)
        assert isinstance(self.request, RankColumns)
        return _ranked_places(self.request, self.answer, most)


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A request that got no answer."""

    head: UserHead
    failure: str  # name of the exception
    served_at: int

    def rows(self, most: int) -> pa.Table:
        """One, whatever `most` is."""
        user = self.head.user_id
        known = {
            "unit": unit_of(self.head),
            "user_id": None if user is None else int(user),
            "user_text": id_text(user),
            "event_time": self.head.request_time_ms,
            "served_at": self.served_at,
            "failure": self.failure,
        }
        return pa.Table.from_pylist([known], schema=FIXED)


def unit_of(head: UserHead) -> str | None:
    """Whose trial a request is part of; None: nobody's."""
    if head.trial_key is not None:
        return head.trial_key
    return None if head.user_id is None else str(int(head.user_id))


def head_of(request: RankColumns | RecommendRequest) -> UserHead:
    """The part of a request that both kinds have."""
    return request.head if isinstance(request, RankColumns) else request


def _ranked_places(request: RankColumns, answer: RankedColumns, most: int) -> ServedPlaces:
    # the best, as rows of the answer and as rows of what was asked
    best = answer.order[:most]
    asked = best if answer.rows is None else answer.rows[best]
    texts = request.item_text
    item_text = None
    if texts is not None:
        item_text = [str(texts[int(row)]) for row in asked]

    features = {}
    for name in {*request.head.request_features, *request.features}:
        features[name] = request.feature(name)[asked]
    scores = {task: values[best] for task, values in answer.scores.items()}
    return ServedPlaces(answer.item_id[best], item_text, scores, features, source=None)


def _list_places(answer: RecommendedList, head: UserHead, most: int) -> ServedPlaces:
    items = answer.item_id[:most]
    texts: list[str] | None = None
    if items.dtype == object:
        texts = list(items)
        items = text_codes(texts)

    features = {}
    for name, value in head.request_features.items():
        features[name] = np.full(len(items), value, np.int32)
    scores = {task: values[:most] for task, values in answer.scores.items()}
    return ServedPlaces(items, texts, scores, features, answer.source[:most])


def _served_rows(one: Served, most: int) -> pa.Table:
    places, head, answer = one.places(most), one.head, one.answer
    num = len(places.item_id)

    user = head.user_id
    columns = {
        "request_id": [one.request_id] * num,
        "kind": [RECOMMEND if isinstance(answer, RecommendedList) else RANK] * num,
        "unit": [unit_of(head)] * num,
        "user_id": [user] * num,
        "user_text": [id_text(user)] * num,
        "event_time": [head.request_time_ms] * num,
        "served_at": [one.served_at] * num,
        "item_id": places.item_id,
        "item_text": places.item_text or [None] * num,
        "place": np.arange(num, dtype=np.int32),
        "source": places.source or [None] * num,
        "version": [answer.model_version] * num,
        "role": [answer.role] * num,
        "sequences": [answer.sequences] * num,
        "history_length": [answer.head["history_length"]] * num,
        "ranker_ms": [answer.ranker_ms] * num,
        "failure": [None] * num,
    }
    names = list(FIXED.names)
    arrays = [pa.array(columns[field.name], field.type) for field in FIXED]

    for name in one.columns():
        names.append(name)
        if name.startswith(FEATURE):
            values = places.features[name.removeprefix(FEATURE)]
            arrays.append(pa.array(values, pa.int32(), mask=values == UNKNOWN))
        else:
            arrays.append(pa.array(places.scores[name.removeprefix(SCORE)], pa.float32()))
    return pa.table(arrays, names)
