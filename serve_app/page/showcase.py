"""Answers to the page's questions, from the versions that a replica has loaded."""

import time
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.index.catalogue import PREFIX
from pipeline.schema import DAY_MS
from pipeline.sequences import store
from pipeline.sequences.dictionary import own_ids
from serve_app.history.live import LiveHistory
from serve_app.history.published import PublishedSequences
from serve_app.history.rows import refuse_other_kind
from serve_app.ids import own_id
from serve_app.page.catalogue import ItemCatalogue, TextColumn, published_column
from serve_app.page.schemas import (
    TRIAL_KEY,
    ExampleUser,
    ItemFacts,
    ItemsQuestion,
    PageStart,
    Question,
    Shown,
    StartQuestion,
    Timeline,
    TimelineRow,
    UserQuestion,
)
from serve_app.ranking.rollout import CANARY, CHAMPION, Rollout, in_share
from serve_app.schemas import RankHead, Refusal

NUM_ROWS = 50  # of a timeline
NUM_CANDIDATES = 20
LONG = 0.99  # share of the users whose histories are no longer than the longest example's
SAMPLED_USERS = 2000  # among which the examples are chosen
FRESH_MS = 7 * DAY_MS  # age of the newest event beyond which a publication is of the past
STEP_MS = 60_000  # the page's present is so long after the newest event of such a one
TRIED_KEYS = 100_000
LATEST_MS = 2**53 - 1


def count_all_events(sequence: pa.RecordBatch) -> int:
    """Events of the user of one SEQUENCE row, of those too that it has no room for."""
    return len(sequence["item_id"][0]) + sequence["first_position"][0].as_py()


class Showcase:
    """What the page shows of one rollout; read when it is asked for, and kept.

    Its methods read files and the event store: they run beside the event loop.
    """

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout
        self.champion = rollout.champion
        history = self.champion.store
        assert isinstance(history, LiveHistory), "a server's history takes events"
        assert isinstance(history.published, PublishedSequences)
        self.history = history
        self.published = history.published
        self.settings = self.champion.limits

    @property
    def folder(self) -> Path:
        return self.published.folder

    @property
    def _manifest(self) -> store.Manifest:
        return store.read_manifest(self.folder)

    @cached_property
    def _catalogue(self) -> ItemCatalogue:
        titles = published_column(self.folder, self.settings.page_title_column)
        index = self.champion.index
        if titles is None and index is not None and index.settings.title_column is not None:
            titles = TextColumn(index.catalogue.table, PREFIX + index.settings.title_column)
        pictures = published_column(self.folder, self.settings.page_picture_column)
        return ItemCatalogue(self.champion.maps, titles, pictures)

    def answer(self, question: Question) -> Shown | Refusal:
        """What the page asked for."""
        if isinstance(question, StartQuestion):
            return self.start()
        if isinstance(question, UserQuestion):
            return self.timeline(question)
        return self.describe_items(question)

    # To begin with -----------------------------------------------------------

    def start(self) -> PageStart:
        """Example users, items to rank and the page's present."""
        newest_ms, now_ms = self._manifest.last_event_ms, int(time.time() * 1000)
        is_past = now_ms - newest_ms > FRESH_MS
        items = self._catalogue.mixed_items(min(NUM_CANDIDATES, self.settings.max_candidates))
        return PageStart(
            clock_ms=newest_ms + STEP_MS if is_past else now_ms,
            is_past=is_past,
            users=self._examples,
            candidates=self._own_ids("item_id", items),
            list_length=min(NUM_CANDIDATES, self.settings.max_recommended),
            trial_keys=self._trial_keys(),
        )

    @cached_property
    def _examples(self) -> list[ExampleUser]:
        """Users with few events and with many, of a sample; nobody's where keys are required."""
        settings = self.settings
        if settings.api_keys_file is not None or settings.page_users == 0:
            return []

        users, num_events = self.published.count_events(SAMPLED_USERS)
        users, num_events = users[num_events > 0], num_events[num_events > 0]
        if len(users) == 0:
            return []

        # evenly between a middling and a long history; the very longest are like nobody else's
        order = np.argsort(num_events, kind="stable")
        longest = int(LONG * (len(order) - 1))
        places = np.linspace(len(order) // 2, longest, settings.page_users)
        chosen = order[np.unique(places.round().astype(np.int64))][::-1]
        codes = users[chosen]
        examples = []
        for code, user_id in zip(codes.tolist(), self._own_ids("user_id", codes), strict=True):
            row = self.published.sequence(code)
            assert row is not None, "a user of this publication"
            examples.append(ExampleUser(user_id=user_id, num_events=count_all_events(row)))
        return examples

    def _trial_keys(self) -> dict[str, str]:
        """A key that the champion answers and one that the canary does, to ask both."""
        keys = [f"{TRIAL_KEY}{number}" for number in range(TRIED_KEYS)]
        canary = self.rollout.rankers.get(CANARY)
        if canary is None:
            return {CHAMPION: keys[0]}

        found: dict[str, str] = {}
        for key in keys:
            is_canary = in_share(key, canary.version, self.rollout.share)
            found.setdefault(CANARY if is_canary else CHAMPION, key)
            if len(found) == 2:
                break
        return {role: found[role] for role in (CHAMPION, CANARY) if role in found}

    # A user ------------------------------------------------------------------

    def timeline(self, question: UserQuestion) -> Timeline | Refusal:
        """The newest rows of the user's history, of posted events too."""
        user_id = question.user_id
        text_ids = self.published.columns.text_ids
        refusal = refuse_other_kind(["body", "user_id"], user_id, "user_id", text_ids)
        if refusal is not None:
            return refusal

        head = RankHead(user_id=user_id, request_time_ms=LATEST_MS)
        found = self.champion.find_history(head)
        rows: list[TimelineRow] = []
        codes = np.zeros(0, np.int64)
        num_events = 0
        if found.sequence is not None:
            codes, rows = self._newest_rows(user_id, found.sequence)
            num_events = count_all_events(found.sequence)

        distinct, first = np.unique(codes, return_index=True)
        own = [rows[place].item_id for place in first.tolist()]
        return Timeline(
            user_id=own_id(user_id),
            unknown_user=found.sequence is None,
            num_events=num_events,
            live_events=found.live_events,
            rows=rows,
            items=self._catalogue.describe(distinct, own),
        )

    def _newest_rows(
        self, user_id: int, sequence: pa.RecordBatch
    ) -> tuple[np.ndarray, list[TimelineRow]]:
        """Codes of the items, int64 [n], and the rows."""
        columns = self.published.columns
        values = {}
        for name in columns.sequence_lists():
            flat = sequence[name].flatten().to_numpy(zero_copy_only=False)
            values[name] = flat[-NUM_ROWS:]

        codes = values["item_id"]
        own = self._item_names(user_id, codes)
        rows = []
        for i in range(len(codes)):
            known_mask, action_mask = values["known_mask"][i], values["action_mask"][i]
            actions = {}
            for bit, name in enumerate(columns.actions):
                if known_mask >> bit & 1:
                    actions[name] = bool(action_mask >> bit & 1)

            features = {}
            for column in columns.request_columns:
                if not column.is_unknown(values[column.name][i]):
                    features[column.name] = int(values[column.name][i])

            watch_ms = int(values["watch_ms"][i])
            has_time = not values["order_only"][i]
            rows.append(
                TimelineRow(
                    item_id=own[i],
                    event_time=int(values["event_time"][i]) if has_time else None,
                    actions=actions,
                    watch_ms=watch_ms if watch_ms >= 0 else None,
                    request_features=features,
                )
            )
        return codes, rows

    def _item_names(self, user_id: int, codes: np.ndarray) -> list[int | str]:
        """The ids of a user's items as people have them.

        A text id that nobody has published yet is in the posted event that brought it.
        """
        own = self._own_ids("item_id", codes)
        if None not in own:
            return own

        posted = {}
        for event in self.history.log.of_user(user_id):
            posted[int(event.item_id)] = own_id(event.item_id)
        named = []
        for code, text in zip(codes.tolist(), own, strict=True):
            named.append(posted.get(code, str(code)) if text is None else text)
        return named

    # Items -------------------------------------------------------------------

    def describe_items(self, question: ItemsQuestion) -> list[ItemFacts] | Refusal:
        """Titles, pictures and popularity, in the order of the question."""
        text_ids = self.published.columns.text_ids
        for i, item_id in enumerate(question.item_ids):
            where = ["body", "item_ids", i]
            refusal = refuse_other_kind(where, item_id, "item_id", text_ids)
            if refusal is not None:
                return refusal

        own = [own_id(item_id) for item_id in question.item_ids]
        return self._catalogue.describe(np.array(question.item_ids, np.int64), own)

    def _own_ids(self, column: str, codes: np.ndarray) -> list:
        """Ids as people have them, None for a text that was never published."""
        return own_ids(self.folder, self._manifest, column, codes).to_pylist()
