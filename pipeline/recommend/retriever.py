"""Candidates for one user from several sources, and the list that is made of their scores.

The server and `jobs.recommend` both call `retrieve` and `choose`, so that their lists agree.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.batches.events import Events
from pipeline.config import ServeConfig
from pipeline.index.folder import LoadedIndex
from pipeline.recommend.diversify import capped_order, marginal_order
from pipeline.recommend.filters import Condition, filter_items, find_column

MODEL, FOLLOWED, POPULAR = "model", "followed", "popular"
SOURCES = (MODEL, FOLLOWED, POPULAR)
LOOK_AHEAD = 10  # times as many popular items as are wanted


@dataclass(frozen=True, slots=True)
class ColumnCap:
    """At most `at_most` items of each value of `column`."""

    column: str
    at_most: int


@dataclass(frozen=True, slots=True)
class MarginalRelevance:
    """As `marginal_order`."""

    weight: float


class NoVectors(ValueError):
    """The index holds no item vectors."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a list of items is to be."""

    num: int
    exclude_seen: bool = True
    exclude_items: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    diversify: ColumnCap | MarginalRelevance | None = None


@dataclass(frozen=True, slots=True)
class Retrieved:
    """C candidates of one user, as rows of the catalogue."""

    rows: np.ndarray  # int64 [C], each once
    # bool [C, 3]: which of SOURCES found it
    sources: np.ndarray
    # float32 [C], the product of the vectors; nan without a vector of the user
    scores: np.ndarray
    num_allowed: int  # items that exclusions and filters left
    by_popularity: bool  # nothing is known of the user: the list is what is popular, in that order

    def first_source(self, place: int) -> str:
        """The source that is named for a candidate."""
        return SOURCES[int(np.argmax(self.sources[place]))]


class Retriever:
    """Candidates and lists from one index.

    Args:
        index: of the model that ranks.
        limits: how many candidates each source gives.
    """

    def __init__(self, index: LoadedIndex, limits: ServeConfig) -> None:
        self.index = index
        self.catalogue = index.catalogue
        self.limits = limits

    def check_wish(self, wish: Wish) -> None:
        """Raises FilterError for a column that is not there, a value that does not fit, or a
        diversity that needs vectors where there are none.
        """
        filter_items(self.catalogue, wish.conditions)
        how = wish.diversify
        if isinstance(how, ColumnCap):
            find_column(self.catalogue, how.column, ("diversify", "per"))
        if isinstance(how, MarginalRelevance) and self.index.vectors is None:
            raise NoVectors

    def retrieve(
        self, wish: Wish, history: Events, actions: tuple[str, ...], user_vector: Tensor | None
    ) -> Retrieved:
        """Candidates for one user, at most `limits.retrieved_candidates`.

        What is followed and what is popular has its part of them, the model's best fill the rest.

        Args:
            history: one sequence, what the user did.
            actions: by the number of their bit in the history's masks.
            user_vector: float32 [d]; None where the model has no retrieval head.
        """
        limits = self.limits
        allowed = self._allowed_items(wish, history)
        num_allowed = int(np.count_nonzero(allowed))
        nothing = np.zeros(0, np.int64)
        if len(history.item_id) == 0:
            rows = self._popular(allowed, limits.retrieved_candidates)
            sources = _membership(rows, nothing, nothing, rows)
            return Retrieved(rows, sources, _unknown(rows), num_allowed, by_popularity=True)

        followed = self._followed(allowed, history, actions)
        if user_vector is None or self.index.vectors is None:
            room = limits.retrieved_candidates - len(followed)
            best, popular = nothing, self._popular(allowed, room)
        else:
            best = self.index.vectors.search(user_vector, limits.retrieved_candidates, allowed)
            popular = self._popular(allowed, limits.popular_candidates)

        others = np.union1d(followed, popular)
        room = limits.retrieved_candidates - len(others)
        fill = best[~np.isin(best, others)][:room]
        rows = np.sort(np.concatenate([others, fill]))
        sources = _membership(rows, best, followed, popular)
        products = self._products(rows, user_vector)
        return Retrieved(rows, sources, products, num_allowed, by_popularity=False)

    def choose(self, wish: Wish, retrieved: Retrieved, scores: np.ndarray) -> np.ndarray:
        """Places among the candidates of the list's items, in its order, int64 [<= wish.num].

        The order is by falling score, ties by item id; of users without history by popularity.

        Args:
            scores: float32 [C], the ranking model's.
        """
        if len(retrieved.rows) == 0:
            return np.zeros(0, np.int64)

        if retrieved.by_popularity:
            scores = -np.arange(len(scores), dtype=np.float32)
        best_first = np.argsort(-scores, kind="stable")  # rows rise, and ids with them
        how = wish.diversify
        if how is None:
            return best_first[: wish.num]

        rows = retrieved.rows
        if isinstance(how, ColumnCap):
            column = self.catalogue.columns[how.column]
            return capped_order(best_first, column, rows, how.at_most, wish.num)

        assert self.index.vectors is not None, "check_wish has refused it"
        vectors = self.index.vectors.vectors[torch.from_numpy(rows)]
        return marginal_order(scores, vectors, how.weight, wish.num)

    def _allowed_items(self, wish: Wish, history: Events) -> np.ndarray:
        """bool [N]"""
        allowed = filter_items(self.catalogue, wish.conditions)
        excluded = wish.exclude_items
        if wish.exclude_seen:
            excluded = np.concatenate([excluded, history.item_id])
        allowed[self.catalogue.find_rows(excluded)] = False
        return allowed

    def _popular(self, allowed: np.ndarray, num: int) -> np.ndarray:
        """The `num` most popular allowed rows."""
        num = max(num, 0)
        popular = self.catalogue.popular_rows
        first = popular[: LOOK_AHEAD * num]  # as a rule enough of these are allowed
        found = first[allowed[first]]
        if len(found) < num:
            found = popular[allowed[popular]]
        return found[:num]

    def _followed(
        self, allowed: np.ndarray, history: Events, actions: tuple[str, ...]
    ) -> np.ndarray:
        """The newest allowed rows of authors that the user follows."""
        source = self.index.settings.followed
        if source is None:
            return np.zeros(0, np.int64)

        bit = 1 << actions.index(source.action)
        follows = (history.action_mask & history.known_mask & bit) != 0
        liked = self.catalogue.find_rows(history.item_id[follows])
        author = self.catalogue.columns[source.author_column]
        authors = np.unique(author.values[liked][author.known[liked]])

        rows = np.flatnonzero(allowed & author.known & np.isin(author.values, authors))
        newest_first = np.argsort(-self.catalogue.recency[rows], kind="stable")
        return rows[newest_first[: self.limits.followed_candidates]]

    def _products(self, rows: np.ndarray, user_vector: Tensor | None) -> np.ndarray:
        """float32 [C]"""
        if user_vector is None or self.index.vectors is None:
            return _unknown(rows)
        vectors = self.index.vectors.vectors
        chosen = vectors[torch.from_numpy(rows).to(vectors.device)]
        return (chosen @ user_vector.to(vectors.device)).cpu().numpy()


def _membership(
    rows: np.ndarray, best: np.ndarray, followed: np.ndarray, popular: np.ndarray
) -> np.ndarray:
    """bool [C, 3]: which of the sources, in the order of SOURCES, has each row."""
    return np.stack([np.isin(rows, found) for found in (best, followed, popular)], axis=1)


def _unknown(rows: np.ndarray) -> np.ndarray:
    return np.full(len(rows), np.nan, np.float32)
