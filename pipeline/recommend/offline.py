"""Lists without a server: the evaluation's path from published rows to scores.

user rows → histories as of a time → vectors → candidates → scores of whole sequences → lists
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.batches.collate import candidates, collate
from pipeline.batches.events import offsets_of
from pipeline.config import ServeConfig
from pipeline.index.folder import LoadedIndex
from pipeline.index.histories import PastRows
from pipeline.index.towers import history_batch, user_vectors
from pipeline.model.artifact import LoadedModel
from pipeline.recommend.retriever import Retrieved, Retriever, Wish

UNKNOWN = -1  # of a request column


@dataclass(frozen=True, slots=True)
class UserList:
    """The K items of one user's list, the best first."""

    item_id: np.ndarray  # int64 [K], or text
    score: np.ndarray  # float32 [K], probability of the task that orders the list
    retrieval_score: np.ndarray  # float32 [K], nan where there is none
    source: list[str]
    by_popularity: bool  # nothing is known of the user


@dataclass(frozen=True, slots=True)
class Audience:
    """B users, each at a time of its own."""

    user_id: np.ndarray  # int64 [B]
    time_ms: np.ndarray  # int64 [B], of the request
    past: PastRows  # what each did before
    # request column -> int32 [B]; one that is left out is unknown
    features: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.user_id)

    def part(self, begin: int, end: int) -> "Audience":
        """The users `begin` to `end` - 1."""
        events = self.past.events
        rows = events.take(events.offsets[begin:end], events.offsets[begin + 1 : end + 1])
        some = slice(begin, end)
        return Audience(
            self.user_id[some],
            self.time_ms[some],
            PastRows(rows, self.past.first_position[some]),
            {name: column[some] for name, column in self.features.items()},
        )


class OfflineRecommender:
    """Lists of one model version.

    Args:
        loaded: the model, in the number formats that the server gives it.
        index: of the same version.
        limits: as the server's: candidates of each source, tokens of a pass.
    """

    def __init__(self, loaded: LoadedModel, index: LoadedIndex, limits: ServeConfig) -> None:
        self.loaded = loaded
        self.index = index
        self.limits = limits
        self.retriever = Retriever(index, limits)

    def recommend(self, audience: Audience, wish: Wish, task: str) -> list[UserList]:
        """A list for each user, by falling score of `task`.

        Raises:
            FilterError, NoVectors: the index cannot answer the wish.
        """
        self.retriever.check_wish(wish)
        num_tokens = audience.past.events.lengths + self.limits.retrieved_candidates

        lists: list[UserList] = []
        for begin, end in user_ranges(num_tokens, self.limits.batch_tokens):
            some = audience.part(begin, end)
            retrieved = self._retrieve(some, wish)
            scores = self._score(some, retrieved, task)
            for one, mine in zip(retrieved, scores, strict=True):
                lists.append(self._choose(one, mine, wish))
        return lists

    def _retrieve(self, audience: Audience, wish: Wish) -> list[Retrieved]:
        loaded, events = self.loaded, audience.past.events
        actions = loaded.cfg.source.actions
        head = loaded.model.retrieval

        vectors = None
        if head is not None:
            batch = history_batch(events, audience.user_id, loaded.maps, loaded.cfg.inputs)
            vectors = user_vectors(loaded.model, head, batch)

        found = []
        for number in range(len(audience)):
            history = audience.part(number, number + 1).past.events
            vector = None if vectors is None else vectors[number]
            found.append(self.retriever.retrieve(wish, history, actions, vector))
        return found

    def _score(self, audience: Audience, retrieved: list[Retrieved], task: str) -> list[np.ndarray]:
        """Scores of each user's candidates, float32 [C] each, in one pass of whole sequences."""
        loaded, past = self.loaded, audience.past
        lengths = np.array([len(one.rows) for one in retrieved])
        offsets = offsets_of(lengths)
        rows = np.concatenate([one.rows for one in retrieved])
        if len(rows) == 0:
            return [np.zeros(0, np.float32)] * len(retrieved)

        columns = {}
        for name in past.events.request:
            unknown = np.full(len(audience), UNKNOWN, np.int32)
            columns[name] = np.repeat(audience.features.get(name, unknown), lengths)
        targets = candidates(
            past.events,
            past.first_position,
            self.index.catalogue.item_ids[rows],
            offsets,
            audience.time_ms,
            columns,
            loaded.maps,
            loaded.cfg.inputs,
        )
        batch = collate(past.events, targets, audience.user_id, loaded.maps, loaded.cfg.inputs)
        device = next(loaded.model.parameters()).device
        with torch.no_grad():
            logits = loaded.model(batch.to(device))

        place = loaded.cfg.tasks.index(task)
        return np.split(logits[:, place].sigmoid().cpu().numpy(), offsets[1:-1])

    def _choose(self, retrieved: Retrieved, scores: np.ndarray, wish: Wish) -> UserList:
        places = self.retriever.choose(wish, retrieved, scores)
        return UserList(
            item_id=self.index.catalogue.own_ids(retrieved.rows[places]),
            score=scores[places],
            retrieval_score=retrieved.scores[places],
            source=[retrieved.first_source(place) for place in places.tolist()],
            by_popularity=retrieved.by_popularity,
        )


def user_ranges(num_tokens: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Ranges of users of at most `most` tokens together, one user at least.

    num_tokens   5 5 5 30 5        most 12
    ranges       0..2 2..3 3..4 4..5
    """
    ranges, begin, total = [], 0, 0
    for number, tokens in enumerate(num_tokens.tolist()):
        if total and total + tokens > most:
            ranges.append((begin, number))
            begin, total = number, 0
        total += tokens
    if len(num_tokens):
        ranges.append((begin, len(num_tokens)))
    return ranges
