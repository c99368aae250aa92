"""An LRU cache of encoded histories, kept between requests.

The key is the content of what was encoded, so an entry is never out of date: an event that joins
the history, or a request as of an earlier time, has another key. No store has to announce its
changes.
"""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import fields

import numpy as np

from pipeline.batches.events import Events
from pipeline.model.inference.cached_scoring import HistoryCache

BYTES_PER_MB = 2**20
# beside the numbers of its tensors: their objects, allocations and the place in the dictionary
ENTRY_BYTES = 1024
LAYER_BYTES = 1024
# of the numbers, where entries of all lengths come and go
BESIDE_NUMBERS = 0.1
NOT_HASHED = ("offsets", "request", "outcomes", "dense")  # the two mappings are, by column


def history_key(history: Events, user_codes: np.ndarray) -> bytes:
    """Digest of one sequence: its rows in all columns, and its user's codes, [1, user columns]."""
    digest = hashlib.blake2b(user_codes.tobytes(), digest_size=16)

    for field in fields(history):
        if field.name not in NOT_HASHED:
            digest.update(getattr(history, field.name).tobytes())

    for columns in (history.request, history.outcomes):
        for name in sorted(columns):
            digest.update(columns[name].tobytes())
    return digest.digest()


def beginning_key(history: Events, user_codes: np.ndarray) -> bytes:
    """`history_key` of its first row alone: the same while only new rows come."""
    first = history.take(
        history.offsets[:1], np.minimum(history.offsets[:1] + 1, history.offsets[1:])
    )
    return history_key(first, user_codes)


def resident_bytes(entry: HistoryCache) -> int:
    """Memory that keeping `entry` costs.

    Resident memory beyond the tensors' numbers, mean of 8,000 entries on CPU (torch 2, glibc):

        layers                 1       2       4       8
        bytes an entry     1,819   2,769   4,664   8,463

    Short histories cost more of it than of numbers. Where entries of all lengths come and go, the
    process grows by a tenth more than that (benchmarks.serving.under_load, cache_memory); what
    holds it was not found.
    """
    numbers = entry.num_bytes + int(BESIDE_NUMBERS * entry.num_bytes)
    return numbers + ENTRY_BYTES + LAYER_BYTES * len(entry.layers)


class CacheBudget:
    """Memory that the caches of all versions share: of all their entries the one that was used
    longest ago goes first.

    For any thread: a shadow ranks in one of its own.
    """

    def __init__(self, max_mb: int) -> None:
        self.max_bytes = max_mb * BYTES_PER_MB
        self.num_bytes = 0
        self.entries: OrderedDict[tuple[HistoryCaches, bytes], HistoryCache] = OrderedDict()
        self.lock = threading.Lock()

    def make_room(self) -> None:
        """Evict until the entries are within the budget; the caller holds the lock."""
        while self.num_bytes > self.max_bytes:
            (owner, key), oldest = self.entries.popitem(last=False)
            size = resident_bytes(oldest)
            self.num_bytes -= size
            owner.num_bytes -= size
            owner.num_entries -= 1
            owner.evictions += 1
            owner.forget_beginning(key)


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
        self._is_closed = False

    def __contains__(self, key: bytes) -> bool:
        """Tell whether `find_entry` would find it; counts nothing."""
        return (self, key) in self.budget.entries

    def find_entry(self, key: bytes) -> HistoryCache | None:
        """The entry, now the most recently used; counts a hit or a miss."""
        budget = self.budget
        with budget.lock:
            found = budget.entries.get((self, key))
            if found is None:
                self.misses += 1
                return None

            self.hits += 1
            budget.entries.move_to_end((self, key))
            return found

    def find_beginning(self, beginning: bytes) -> tuple[bytes, int, HistoryCache] | None:
        """The newest entry of a history with this `beginning_key`: its key, its rows and itself."""
        budget = self.budget
        with budget.lock:
            if beginning not in self._newest:
                return None
            key, num_rows = self._newest[beginning]
            return key, num_rows, budget.entries[self, key]

    def forget_beginning(self, key: bytes) -> None:
        """An entry is gone; the caller holds the lock."""
        beginning = self._beginnings.pop(key, None)
        newest = None if beginning is None else self._newest.get(beginning)
        if beginning is not None and newest is not None and newest[0] == key:
            del self._newest[beginning]

    def keep_entry(
        self, key: bytes, entry: HistoryCache, beginning: bytes = b"", num_rows: int = 0
    ) -> None:
        """Keep `entry` unless it alone is more than there is room for.

        With a `beginning` of its `num_rows` rows, `find_beginning` finds it until another comes.
        """
        budget, size = self.budget, resident_bytes(entry)
        if size > budget.max_bytes:
            return

        with budget.lock:
            if self._is_closed or (self, key) in budget.entries:
                return
            budget.entries[self, key] = entry
            budget.num_bytes += size
            self.num_bytes += size
            self.num_entries += 1
            if num_rows:
                self._newest[beginning] = key, num_rows
                self._beginnings[key] = beginning
            budget.make_room()

    def close(self) -> None:
        """Give the memory back: the model is gone. What it still ranks is not kept."""
        with self.budget.lock:
            self._is_closed = True
            mine = [place for place in self.budget.entries if place[0] is self]
            for place in mine:
                del self.budget.entries[place]
            self.budget.num_bytes -= self.num_bytes
            self.num_bytes = 0
            self.num_entries = 0
            self._newest.clear()
            self._beginnings.clear()

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
