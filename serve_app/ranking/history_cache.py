"""An LRU cache of encoded histories, kept between requests.

The key is the content of what was encoded, so an entry is never out of date: an event that joins
the history, or a request as of an earlier time, has another key. No store has to announce its
changes.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from pipeline.batches.events import Events
from pipeline.model.inference.cached_scoring import HistoryCache
from pipeline.model.inference.rooms import PAGE_BYTES, FilledHistory, Room
from serve_app.ranking.history_pages import HistoryPages, PagedHistory

BYTES_PER_MB = 2**20
# beside the pages: objects, and the place in the dictionary
ENTRY_BYTES = 1024
LAYER_BYTES = 256
NOT_HASHED = ("offsets", "request", "outcomes", "dense")  # the two mappings are, by column


def history_key(history: Events, user_codes: np.ndarray) -> bytes:
    """Digest of one sequence: its rows in all columns, and its user's codes, [1, user columns]."""
    digest = hashlib.blake2b(user_codes.tobytes(), digest_size=16)
    for column in _columns_of(history):
        digest.update(np.ascontiguousarray(column).data)  # its bytes, without a copy of them
    return digest.digest()


def beginning_key(history: Events, user_codes: np.ndarray) -> bytes:
    """`history_key` of its first row alone: the same while only new rows come."""
    first = history.take(
        history.offsets[:1], np.minimum(history.offsets[:1] + 1, history.offsets[1:])
    )
    return history_key(first, user_codes)


def shares_rows(before: Events, after: Events, num_dropped: int, front: int) -> bool:
    """Tell whether one history is another that has lost its oldest `num_dropped` rows, and may have
    new ones behind: all others are the same in every column. The first `front` need not be.

        position   before 5 6 7 8      after 7 8 9      num_dropped = 2      7 and 8 are compared
    """
    num_both = len(before.position) - num_dropped
    if not front <= num_both <= len(after.position):
        return False

    for old, new in zip(_columns_of(before), _columns_of(after), strict=True):
        same = old[num_dropped + front :], new[front:num_both]
        if not np.array_equal(*same, equal_nan=old.dtype.kind == "f"):
            return False
    return True


def _columns_of(history: Events) -> list[np.ndarray]:
    """The columns of the rows, those of the two mappings in the order of their names."""
    columns = []
    for field in fields(history):
        if field.name not in NOT_HASHED:
            columns.append(getattr(history, field.name))
    for mapping in (history.request, history.outcomes):
        columns += [mapping[name] for name in sorted(mapping)]
    return columns


def resident_bytes(num_pages: int, num_layers: int, rows: Events | None = None) -> int:
    """Memory that keeping an entry costs: its pages, whole, its objects, and its history's rows
    where these are kept.
    """
    kept = 0 if rows is None else sum(column.nbytes for column in _columns_of(rows))
    return num_pages * PAGE_BYTES + ENTRY_BYTES + num_layers * LAYER_BYTES + kept


class CacheBudget:
    """Memory that the caches of all versions share: of all their entries the one that was used
    longest ago goes first.

    For any thread: a shadow ranks in one of its own.
    """

    def __init__(self, max_bytes: int, *, for_rooms: bool = False) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.pages = HistoryPages(max_bytes, for_rooms=for_rooms)
        self.entries: OrderedDict[tuple[HistoryCaches, bytes], PagedHistory] = OrderedDict()
        self.lock = threading.Lock()

    @classmethod
    def of_mb(cls, max_mb: int, *, for_rooms: bool = False) -> "CacheBudget":
        """Of so many MiB. `for_rooms`: of histories that CUDA graphs read (`hold_entry`)."""
        return cls(max_mb * BYTES_PER_MB, for_rooms=for_rooms)

    def make_room(self, num_bytes: int) -> bool:
        """Evict until so many bytes more are within the budget; False where that cannot be, since
        what is evicted is being read. The caller holds the lock.
        """
        while self.entries and self.num_bytes + num_bytes > self.max_bytes:
            (owner, key), oldest = self.entries.popitem(last=False)
            owner.forget_entry(key, oldest)
            owner.evictions += 1
        return self.num_bytes + num_bytes <= self.max_bytes


@dataclass(frozen=True, slots=True, eq=False)
class HeldHistory:
    """An entry that stays in its pages until it is released, a `StoredHistory`."""

    pages: HistoryPages
    entry: PagedHistory

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.entry.layout.lengths

    def copy_to(self, room: Room) -> None:
        self.pages.copy_to(room, self.entry)

    def read(self) -> HistoryCache:
        return self.pages.read(self.entry)


class HistoryCaches:
    """One model's encoded histories, within a budget that it may share with other models."""

    def __init__(self, budget: CacheBudget) -> None:
        self.budget = budget
        self.num_bytes = 0
        self.num_entries = 0
        self.hits = 0
        self.misses = 0
        self.appends = 0  # of the misses: new rows onto an entry
        self.evictions = 0
        # by the beginning of a history the newest entry that has it, and its rows; and back
        self._newest: dict[bytes, tuple[bytes, int]] = {}
        self._beginnings: dict[bytes, bytes] = {}
        # of a user with a long history the one entry that is kept of it; and back
        self._only: dict[int, bytes] = {}
        self._only_of: dict[bytes, int] = {}
        self._is_closed = False

    def __contains__(self, key: bytes) -> bool:
        """Tell whether `find_entry` would find it; counts nothing."""
        return (self, key) in self.budget.entries

    def find_entry(self, key: bytes) -> HistoryCache | None:
        """A copy of the entry, now the most recently used; counts a hit or a miss."""
        found = self.read_entry(key)
        with self.budget.lock:
            self.hits += found is not None
            self.misses += found is None
        return found

    def hold_entry(self, key: bytes) -> HeldHistory | None:
        """The entry itself, now the most recently used, until `release_entries`; counts a hit or a
        miss.
        """
        budget = self.budget
        with budget.lock:
            found = budget.entries.get((self, key))
            self.hits += found is not None
            self.misses += found is None
            if found is None:
                return None
            budget.entries.move_to_end((self, key))
            found.readers += 1
            return HeldHistory(budget.pages, found)

    def release_entries(self, held: Sequence[HeldHistory]) -> None:
        """Nobody will read these any more; what was begun on a GPU may be under way still."""
        with self.budget.lock:
            for one in held:
                one.entry.readers -= 1
                self._give_back(one.entry)

    def find_beginning(self, beginning: bytes) -> tuple[bytes, int] | None:
        """The newest entry of a history with this `beginning_key`: its key and its rows."""
        return self._newest.get(beginning)

    def find_former(self, user: int) -> tuple[bytes, Events] | None:
        """The key and the rows of the one entry that is kept of a user with a long history."""
        with self.budget.lock:
            key = self._only.get(user)
            entry = None if key is None else self.budget.entries.get((self, key))
            if key is None or entry is None or entry.rows is None:
                return None
            return key, entry.rows

    def read_entry(self, key: bytes) -> HistoryCache | None:
        """A copy of the entry, now the most recently used, None where there is none; counts
        nothing.
        """
        budget = self.budget
        with budget.lock:
            found = budget.entries.get((self, key))
            if found is None:
                return None
            budget.entries.move_to_end((self, key))
            found.readers += 1

        try:
            return budget.pages.read(found)
        finally:
            with budget.lock:
                found.readers -= 1
                self._give_back(found)

    def keep_entry(
        self,
        key: bytes,
        entry: HistoryCache | FilledHistory,
        beginning: bytes = b"",
        num_rows: int = 0,
        only_of: int | None = None,
        rows: Events | None = None,
    ) -> HeldHistory | None:
        """Keep a copy of `entry` unless it alone is more than there is room for.

        With a `beginning` of its `num_rows` rows, `find_beginning` finds it until another comes.

        Args:
            only_of: a user of whom the entry takes the former one's place: with every event of
                theirs a long history would push as much of others' out.
            rows: of that user's history, by which `find_former` tells what the next one shares.

        Returns:
            Of a `FilledHistory` the entry, held as by `hold_entry`; None where it is not kept.
        """
        budget = self.budget
        holds = isinstance(entry, FilledHistory)
        with budget.lock:
            layout = budget.pages.lay_out(entry)
            size = resident_bytes(layout.num_pages, len(layout.layers), rows)
            is_known = self._is_closed or (self, key) in budget.entries
            if is_known or size > budget.max_bytes or not budget.make_room(size):
                return None
            kept = budget.pages.take(layout)
            kept.rows = rows
            self._count_bytes(size)
        try:
            budget.pages.write(kept, entry)
        except BaseException:  # a GPU without memory for the copy
            with budget.lock:
                kept.is_evicted = True
                self._give_back(kept)
            raise

        with budget.lock:
            if self._is_closed or (self, key) in budget.entries:  # meanwhile
                kept.is_evicted = True
                self._give_back(kept)
                return None
            budget.entries[self, key] = kept
            kept.readers += holds
            self.num_entries += 1
            if only_of is not None:
                self._replace_former(only_of, key)
            if num_rows:
                self._newest[beginning] = key, num_rows
                self._beginnings[key] = beginning
        return HeldHistory(budget.pages, kept) if holds else None

    def forget_entry(self, key: bytes, entry: PagedHistory) -> None:
        """Forget an entry that has left the budget; the caller holds the lock."""
        self.num_entries -= 1
        entry.is_evicted = True
        self._give_back(entry)

        beginning = self._beginnings.pop(key, None)
        newest = None if beginning is None else self._newest.get(beginning)
        if beginning is not None and newest is not None and newest[0] == key:
            del self._newest[beginning]
        if key in self._only_of:
            del self._only[self._only_of.pop(key)]

    def _replace_former(self, user: int, key: bytes) -> None:
        former = self._only.get(user)
        if former is not None:
            self.forget_entry(former, self.budget.entries.pop((self, former)))
        self._only[user] = key
        self._only_of[key] = user

    def _give_back(self, entry: PagedHistory) -> None:
        """Release the pages of an evicted entry that nobody reads."""
        if entry.is_evicted and entry.readers == 0:
            self.budget.pages.release(entry)
            size = resident_bytes(len(entry.pages), len(entry.layers), entry.rows)
            self._count_bytes(-size)

    def _count_bytes(self, num_bytes: int) -> None:
        self.budget.num_bytes += num_bytes
        self.num_bytes += num_bytes

    def close(self) -> None:
        """Give the memory back: the model is gone. What it still ranks is not kept."""
        with self.budget.lock:
            self._is_closed = True
            mine = [place for place in self.budget.entries if place[0] is self]
            for place in mine:
                self.forget_entry(place[1], self.budget.entries.pop(place))

    def cache_stats(self) -> dict[str, int]:
        """Counts since the start, and what is held now."""
        return {
            "history_cache_hits": self.hits,
            "history_cache_misses": self.misses,
            "history_cache_appends": self.appends,
            "history_cache_evictions": self.evictions,
            "history_cache_entries": self.num_entries,
            "history_cache_bytes": self.num_bytes,
        }
