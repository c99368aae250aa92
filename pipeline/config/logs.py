"""Where the logs come from: the user's Parquet files, a public dataset, or a generator."""

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.errors import require
from pipeline.config.reading import S3, parse_time, split_s3
from pipeline.config.setting import check_ranges, describe, setting
from pipeline.schema import MAX_ACTIONS, RESERVED, EventColumns, outcome_column


@dataclass(frozen=True, kw_only=True, slots=True)
class SideTable:
    """A table of users or items: Parquet with an id column and categorical or numeric columns."""

    path: str = field(
        metadata=describe("Parquet file, folder of Parquet files, or s3://bucket/prefix.")
    )
    id_column: str = field(
        metadata=describe("Column that holds the user_id or item_id of a row, as in the logs.")
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """Generated logs by a Dirichlet process (HSTU, arXiv:2402.17152, appendix C), with times,
    requests, actions and long histories. Read where `source.kind` is synthetic.
    """

    num_users: int = setting(2000, at_least=1, doc="Number of users.")
    num_items: int = setting(20_000, at_least=1, doc="Number of items.")
    num_categories: int = setting(100, at_least=1, doc="Number of item categories.")
    max_history: int = setting(
        256, at_least=1, at_most=16_384, doc="Number of rows of the user with the most."
    )
    length_exponent: float = setting(
        1.0,
        doc="Exponent of Zipf's law: the user of rank r has about max_history / r**exponent rows.",
    )
    min_history: int = setting(
        8, at_least=1, doc="Fewest rows of a user; at most source.synthetic.max_history."
    )
    candidates_per_request: int = setting(
        4, at_least=1, doc="Number of items, and so of rows, that are shown in one request."
    )
    num_days: int = setting(12, at_least=1, doc="Days that the logs cover.")
    start: str = setting(
        "2022-04-24T00:00:00+08:00", doc="Time of the first day, ISO 8601 with its UTC offset."
    )
    rows_per_file: int = setting(
        1_000_000,
        at_least=1,
        doc="Rows that are made, and held in memory, at a time where by_day is true.",
    )
    by_day: bool = setting(
        False, doc="Write one file per day, as logs grow, instead of files of whole users."
    )
    lasting_categories: int = setting(
        0,
        at_least=0,
        doc="Categories, beside num_categories, of tastes that show early in a history and are "
        "asked after much later, each once; 0 makes none.",
    )
    early_rows: int = setting(
        1024, doc="Number of a user's first rows, in which the lasting tastes show."
    )
    quiet_rows: int = setting(
        1280, doc="Number of rows after the early ones, without any sign of the lasting tastes."
    )

    def __post_init__(self) -> None:
        check_ranges(self, "source.synthetic")
        parse_time("source.synthetic.start", self.start)

        self._refuse_shortest_history_above_longest()
        self._refuse_requests_across_lasting_phases()

    def _refuse_shortest_history_above_longest(self) -> None:
        require(
            self.min_history <= self.max_history,
            "source.synthetic.min_history",
            self.min_history,
            "1 to max_history",
        )

    def _refuse_requests_across_lasting_phases(self) -> None:
        """The early and the quiet rows are whole requests."""
        if self.lasting_categories == 0:
            return

        for name in ("early_rows", "quiet_rows"):
            rows = getattr(self, name)
            require(
                rows > 0 and rows % self.candidates_per_request == 0,
                f"source.synthetic.{name}",
                rows,
                "a multiple of candidates_per_request above 0",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class OutcomeColumn:
    """A number that comes with an event, such as a price paid. It is seen in the history only."""

    type: Literal["float", "int"] = setting("float", doc="Type of the numbers.")
    at_least: float | None = setting(
        0.0,
        doc="Smallest number allowed; a row with a smaller one is quarantined. Null, with floats "
        "alone: any number.",
    )

    def __post_init__(self) -> None:
        self._refuse_ints_below_0()

    def _refuse_ints_below_0(self) -> None:
        """An unknown int is stored as -1."""
        usable = self.type == "float" or (self.at_least is not None and self.at_least >= 0)
        rule = "0 or more where type is int"
        require(usable, "source.outcome_columns.*.at_least", self.at_least, rule)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Where the logs are and what their columns are called."""

    kind: Literal["parquet", "kuairand", "synthetic"] = setting(
        "parquet",
        doc="Kind of logs: Parquet files of your own, the public dataset KuaiRand, or generated "
        "ones.",
    )
    path: str | None = setting(
        None,
        doc="Parquet file, folder of Parquet files, or s3://bucket/prefix (docs/guide/data.md); "
        "the dataset's folder for kuairand; unused for synthetic.",
    )
    columns: dict[str, str] = setting(
        {},
        doc="Our name of a log column: its name in your files, for those that differ. An optional "
        "column whose name your files have must be named here: by its own name to be read, by '' "
        "not to be.",
    )
    actions: tuple[str, ...] = setting(
        ("is_click",),
        doc="Columns of 0 and 1, null where unknown, that tell what a user did. The order gives "
        "the bits of the action mask.",
    )
    request_columns: tuple[str, ...] = setting(
        (), doc="Columns of small integers that are known when a request is made, such as a tab."
    )
    outcome_columns: dict[str, OutcomeColumn] = setting(
        {},
        doc="Columns of numbers that come with an event, beside watch_ms: a price, a dwell time. "
        "History rows carry them, candidates do not.",
    )
    users: SideTable | None = setting(None, doc="Table of users; null where there is none.")
    items: SideTable | None = setting(None, doc="Table of items; null where there is none.")
    order_only_end_is_real: bool = setting(
        False,
        doc="The last order_only row of a user carries a real time, not just an order; true for "
        "KuaiRand.",
    )
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    def __post_init__(self) -> None:
        self._refuse_actions_that_do_not_fit_the_mask()
        self._refuse_repeated_columns()
        self._refuse_missing_path()
        self._refuse_unreadable_paths()

    def _refuse_actions_that_do_not_fit_the_mask(self) -> None:
        require(len(self.actions) > 0, "source.actions", self.actions, "at least one action column")

        most = f"at most {MAX_ACTIONS} action columns"
        require(len(self.actions) <= MAX_ACTIONS, "source.actions", self.actions, most)

    def _refuse_repeated_columns(self) -> None:
        names = [*self.actions, *self.request_columns]
        require(
            len(set(names)) == len(names),
            "source.actions + source.request_columns",
            names,
            "free of repeats",
        )
        for name in names:
            free = name not in RESERVED
            rule = "free of names that LOG has for something else (docs/guide/data.md)"
            require(free, "source.actions + source.request_columns", name, rule)
        for name in self.outcome_columns:
            free = name not in RESERVED and name not in names
            require(free, "source.outcome_columns", name, "a name that no other column has")

    def _refuse_missing_path(self) -> None:
        if self.kind != "synthetic":
            rule = f"a path when source.kind is {self.kind}"
            require(self.path is not None, "source.path", self.path, rule)

    def _refuse_unreadable_paths(self) -> None:
        paths = {"source.path": self.path}
        if self.users is not None:
            paths["source.users.path"] = self.users.path
        if self.items is not None:
            paths["source.items.path"] = self.items.path

        for key, path in paths.items():
            if path is None or "://" not in path:
                continue
            rule = "a path of the file system, or s3://bucket/prefix"
            require(path.startswith(S3), key, path, rule)
            split_s3(key, path)

    @property
    def events(self) -> EventColumns:
        """All columns of this source's events."""
        declared = []
        for name, column in self.outcome_columns.items():
            declared.append(outcome_column(name, column.type, column.at_least))
        return EventColumns(self.actions, self.request_columns, tuple(declared))

    @property
    def items_known(self) -> bool:
        """True if there is a table of items; KuaiRand and the generator bring their own."""
        return self.items is not None or self.kind != "parquet"

    @property
    def users_known(self) -> bool:
        """True if there is a table of users; KuaiRand and the generator bring their own."""
        return self.users is not None or self.kind != "parquet"
