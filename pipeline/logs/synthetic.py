"""Synthetic logs of any size: the Dirichlet-process sequences of HSTU (arXiv:2402.17152, appendix
C) with a clock.

As there, every item has one of `num_categories` categories, 40 % of the items are open at first and
the rest open linearly with time; a user has up to 5 categories with a random prior over them and
alpha ~ U(1, 500); row n (from 0) takes a category from the prior with probability alpha / (alpha +
n) and otherwise that of a random earlier row, then a random open item of it. On top of that come
requests of several candidates, in sessions, and three actions:

    is_click   the item's appeal, the tab, the user's habit, and the *interest of the session*, one
    of the user's
               categories: it shows in nothing but the session's earlier actions, so a sequence
               model can learn it
    long_view  a click, the interest of the session, a short video
    is_like    a click, the item's appeal, and the user's first category (`home_category` in the
    USER table)

`lasting_categories`, `drifting` and `chains` add what only a long memory can tell
(`pipeline.logs.planted`).

Users come heaviest first, in files of about `rows_per_file` rows, so memory does not grow with the
logs. With `by_day` each such chunk is cut by day and appended to the files of its days.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import SourceConfig, SyntheticConfig, UserError, parse_time
from pipeline.logs import planted
from pipeline.logs.imported import ImportReport
from pipeline.schema import DAY_MS

ACTIONS = ("is_click", "long_view", "is_like")
REQUEST_COLUMNS = ("tab",)
NUM_TABS = 4
MAX_USER_CATEGORIES = 5
OPEN_AT_FIRST = 0.4
SESSION_SHARE = 0.2  # of requests that open a session: 5 requests each on average
SESSION_GAP_MS = 6 * 3600 * 1000
REQUEST_GAP_MS = 40 * 1000
USERS_AT_ONCE = 2**20  # whose lengths are worked out together


@dataclass(frozen=True)
class Catalogue:
    """All items, and by category what is open at which time."""

    category: np.ndarray  # int64 [items]
    appeal: np.ndarray  # [items] log-odds
    duration_ms: np.ndarray  # int64 [items]
    keys: np.ndarray  # int64 [items], category * items + item, ascending
    starts: np.ndarray  # int64 [categories], where each begins in `keys`
    first_open: np.ndarray  # everyday categories that have an open item from the start
    planted: np.ndarray  # planted ones that have

    @property
    def num_items(self) -> int:
        return len(self.category)


def plan(source: SourceConfig) -> dict[str, object]:
    synthetic = _checked(source)
    chunks = [int(lengths.sum()) for _, lengths in user_chunks(synthetic)]
    files = synthetic.num_days if synthetic.by_day else len(chunks)
    return {
        "rows": sum(chunks),
        "users": synthetic.num_users,
        "items": synthetic.num_items,
        "files": files,
    }


def write_logs(source: SourceConfig, seed: int, folder: Path) -> ImportReport:
    """The LOG, USER and ITEM tables as Parquet under `folder`, the same for the same seed and
    settings.
    """
    synthetic = _checked(source)
    catalogue = make_catalogue(synthetic, np.random.default_rng([seed, 0]))
    items = {"item_id": np.arange(catalogue.num_items), "category": catalogue.category}
    pq.write_table(
        pa.table(items | {"duration_ms": catalogue.duration_ms}), folder / "items.parquet"
    )
    (folder / "log").mkdir()
    users = pa.schema([("user_id", pa.int64()), ("home_category", pa.int64())])
    rows = 0
    with (
        pq.ParquetWriter(folder / "users.parquet", users) as user_file,
        LogWriter(synthetic, folder) as writer,
    ):
        for number, (first_user, lengths) in enumerate(user_chunks(synthetic)):
            rng = np.random.default_rng([seed, 1, number])
            log, homes = make_rows(synthetic, catalogue, first_user, lengths, rng)
            writer.write(log)
            user_file.write_table(homes.cast(users))
            rows += log.num_rows
    return ImportReport(kind="synthetic", rows=rows, files=sorted(writer.open))


class LogWriter:
    """The files of the log: one per chunk of users, or one per day, which then grow chunk by chunk
    all at once.
    """

    def __init__(self, cfg: SyntheticConfig, folder: Path) -> None:
        self.cfg, self.folder = cfg, folder
        self.open: dict[str, pq.ParquetWriter] = {}  # by the name of the file

    def __enter__(self) -> "LogWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.open.values():
            file.close()

    def write(self, log: pa.Table) -> None:
        """One chunk, in the order of time."""
        if not self.cfg.by_day:
            number = len(self.open)
            self._append(f"log/part-{number:05d}.parquet", log)
            self.open[f"log/part-{number:05d}.parquet"].close()
            return
        start = parse_time("source.synthetic.start", self.cfg.start)
        day = (log["event_time"].to_numpy() - start) // DAY_MS
        days, first = np.unique(day, return_index=True)
        for number, begin, end in zip(days.tolist(), first, [*first[1:], len(day)], strict=True):
            self._append(f"log/day-{number:05d}.parquet", log.slice(begin, end - begin))

    def _append(self, name: str, rows: pa.Table) -> None:
        if name not in self.open:
            self.open[name] = pq.ParquetWriter(self.folder / name, rows.schema)
        self.open[name].write_table(rows, row_group_size=2**17)


def user_chunks(cfg: SyntheticConfig) -> Iterator[tuple[int, np.ndarray]]:
    """The users of each file, as (first user, rows of each): whole users, about `rows_per_file`
    rows together.
    """
    for first in range(0, cfg.num_users, USERS_AT_ONCE):
        rank = np.arange(first, min(first + USERS_AT_ONCE, cfg.num_users)) + 1
        wanted = np.floor(cfg.max_history / rank**cfg.length_exponent)
        lengths = np.clip(wanted, cfg.min_history, cfg.max_history).astype(np.int64)
        file = (np.cumsum(lengths) - 1) // cfg.rows_per_file
        cuts = np.flatnonzero(np.diff(file)) + 1
        yield from zip((first + np.r_[0, cuts]).tolist(), np.split(lengths, cuts), strict=True)


def make_catalogue(cfg: SyntheticConfig, rng: np.random.Generator) -> Catalogue:
    num_categories = cfg.num_categories + cfg.planted_categories  # the planted ones last
    category = rng.integers(num_categories, size=cfg.num_items)
    keys = np.sort(category * cfg.num_items + np.arange(cfg.num_items))
    first_open = np.unique(category[: max(1, int(OPEN_AT_FIRST * cfg.num_items))])
    return Catalogue(
        category=category,
        appeal=rng.normal(0, 0.7, cfg.num_items),
        duration_ms=np.exp(rng.normal(10, 0.8, cfg.num_items)).astype(np.int64),
        keys=keys,
        starts=np.searchsorted(keys, np.arange(num_categories) * cfg.num_items),
        first_open=first_open[first_open < cfg.num_categories],
        planted=first_open[first_open >= cfg.num_categories],
    )


def make_rows(
    cfg: SyntheticConfig,
    catalogue: Catalogue,
    first_user: int,
    lengths: np.ndarray,
    rng: np.random.Generator,
) -> tuple[pa.Table, pa.Table]:
    """The LOG rows of consecutive users, in the order of time, and their USER rows."""
    begin = np.cumsum(lengths) - lengths
    owner = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(owner)) - begin[owner]
    own, prior = _priors(catalogue, len(lengths), rng)
    category = own[owner, _dirichlet_process(prior, owner, place, begin, rng)]
    plant = planted.plant_rows(cfg, catalogue.planted, lengths, owner, place, rng)
    if plant is not None:
        category = np.where(plant.category >= 0, plant.category, category)
    new_request = place % cfg.candidates_per_request == 0
    request = np.cumsum(new_request) - 1  # of the chunk
    asker = owner[new_request]
    request_time, session = _times(
        cfg, asker, place[new_request] // cfg.candidates_per_request, rng
    )
    open_items = catalogue.num_items * (
        OPEN_AT_FIRST + (1 - OPEN_AT_FIRST) * _elapsed(cfg, request_time)
    )
    item, fresh = _items(catalogue, category, open_items.astype(np.int64)[request], request, rng)
    session_owner = asker[np.flatnonzero(np.diff(session, prepend=-1))]
    interest = own[session_owner, _draw(prior[session_owner], rng)][session][request]
    tab = rng.integers(NUM_TABS, size=len(request_time))[request]
    liked = category == own[owner, 0]
    habit = rng.normal(0, 0.5, len(lengths))[owner]
    actions, watch_ms = _actions(catalogue, item, tab, category == interest, liked, habit, rng)
    if plant is not None:
        actions[str(planted.planted_action(cfg))] = plant.action
    columns = {
        "user_id": first_user + owner,
        "item_id": item,
        "event_time": request_time[request],
        "request_id": (first_user + owner) << 15 | place // cfg.candidates_per_request,
        **actions,
        "tab": tab.astype(np.int32),
        "watch_ms": watch_ms,
        "tie_breaker": place,
    }
    rows = np.flatnonzero(fresh)
    rows = rows[np.argsort(columns["event_time"][rows], kind="stable")]
    log = pa.table({name: values[rows] for name, values in columns.items()})
    if planted.knows_best(cfg):
        log = planted.with_best(cfg, log, category[rows])
    return log, pa.table(
        {"user_id": first_user + np.arange(len(lengths)), "home_category": own[:, 0]}
    )


def _priors(
    catalogue: Catalogue, num_users: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Each user's categories, [users, 5], and the cumulative prior over them; only the first 1 to 5
    have a share.
    """
    own = rng.choice(catalogue.first_open, (num_users, MAX_USER_CATEGORIES))
    share = rng.exponential(size=own.shape)  # normalised: uniform over the simplex
    share *= np.arange(MAX_USER_CATEGORIES) < rng.integers(
        1, MAX_USER_CATEGORIES + 1, (num_users, 1)
    )
    return own, np.cumsum(share, axis=1) / share.sum(axis=1, keepdims=True)


def _draw(cumulative: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One column per row of [n, 5] cumulative probabilities."""
    return (rng.random((len(cumulative), 1)) > cumulative[:, :-1]).sum(axis=1)


def _dirichlet_process(
    prior: np.ndarray,
    owner: np.ndarray,
    place: np.ndarray,
    begin: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Which of the user's categories each row has.

    A category with probability n_c / n is the category of a uniformly drawn earlier row, so each
    row that draws
    nothing new points at an earlier one, and following the pointers to their roots needs log2(n)
    steps for all at once."""
    alpha = rng.uniform(1, 500, len(prior))[owner]
    new = rng.random(len(owner)) < alpha / (alpha + place)
    earlier = begin[owner] + (rng.random(len(owner)) * place).astype(np.int64)
    root = np.where(new, np.arange(len(owner)), earlier)
    while not np.array_equal(root, further := root[root]):
        root = further
    return _draw(prior[owner], rng)[root]


def _times(
    cfg: SyntheticConfig, asker: np.ndarray, number: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The time of each request, strictly later than the user's last, and its session, numbered over
    the chunk.
    """
    opens = (rng.random(len(asker)) < SESSION_SHARE) | (number == 0)
    if cfg.rows_between_breaks is not None:
        opens = number % (cfg.rows_between_breaks // cfg.candidates_per_request) == 0
    gap = rng.exponential(np.where(opens, SESSION_GAP_MS, REQUEST_GAP_MS))
    gap[number == 0] = 0
    firsts = np.flatnonzero(number == 0)
    passed = np.cumsum(gap)
    passed -= passed[firsts][asker]
    whole = np.maximum.reduceat(passed, firsts)
    # room for the millisecond that each request adds
    window = cfg.num_days * 24 * 3600 * 1000 - len(number)
    # a heavy user's sessions are closer together
    scale = np.minimum(1, window / np.maximum(whole, 1))
    start = rng.random(len(firsts)) * (window - whole * scale)
    time = parse_time("source.synthetic.start", cfg.start) + (
        start[asker] + passed * scale[asker]
    ).astype(np.int64)
    return time + number, np.cumsum(opens) - 1


def _elapsed(cfg: SyntheticConfig, time: np.ndarray) -> np.ndarray:
    return (time - parse_time("source.synthetic.start", cfg.start)) / (
        cfg.num_days * 24 * 3600 * 1000
    )


def _items(
    catalogue: Catalogue,
    category: np.ndarray,
    open_items: np.ndarray,
    request: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """A random open item of each row's category, and if no earlier row of the request has it."""
    first = catalogue.starts[category]
    count = np.searchsorted(catalogue.keys, category * catalogue.num_items + open_items) - first
    draw = (rng.random(len(category)) * count).astype(np.int64)
    # an item that the request has already: take the category's next
    for _ in range(MAX_USER_CATEGORIES):
        item = catalogue.keys[first + draw % count] % catalogue.num_items
        fresh = np.zeros(len(item), bool)
        fresh[np.unique(request * catalogue.num_items + item, return_index=True)[1]] = True
        draw += ~fresh
    return item, fresh


def _actions(
    catalogue: Catalogue,
    item: np.ndarray,
    tab: np.ndarray,
    interested: np.ndarray,
    liked: np.ndarray,
    habit: np.ndarray,
    rng: np.random.Generator,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The three actions, int8 [rows], and the watch time."""
    appeal, duration = catalogue.appeal[item], catalogue.duration_ms[item]
    click = _happens(-1.6 + 2.0 * interested + appeal + habit + 0.3 * tab, rng)
    long_view = _happens(-2.0 + 1.5 * click + 1.2 * interested - 0.5 * (np.log(duration) - 10), rng)
    like = _happens(-4.5 + 1.5 * click + 2.0 * liked + 0.5 * appeal, rng)
    watched = np.where(long_view, rng.uniform(0.6, 1.2, len(item)), rng.uniform(0, 0.4, len(item)))
    return dict(zip(ACTIONS, (click, long_view, like), strict=True)), (duration * watched).astype(
        np.int64
    )


def _happens(log_odds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (rng.random(len(log_odds)) < 1 / (1 + np.exp(-log_odds))).astype(np.int8)


def _checked(source: SourceConfig) -> SyntheticConfig:
    own = planted.planted_action(source.synthetic)
    actions = ACTIONS if own is None else (*ACTIONS, own)
    for key, names, known in (
        ("actions", source.actions, actions),
        ("request_columns", source.request_columns, REQUEST_COLUMNS),
    ):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UserError(
                f"source.{key}: the synthetic logs have no {unknown}; they have {list(known)}"
            )
    return source.synthetic
