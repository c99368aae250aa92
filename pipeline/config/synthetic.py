"""The generator of logs: how many rows of whom, and what is planted in them."""

from dataclasses import dataclass

from pipeline.config.errors import require
from pipeline.config.reading import parse_time
from pipeline.config.setting import check_ranges, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftingConfig:
    """Tastes that drift and come back: phases of one interest each, an interest of long ago
    returns, and some of its tastes have changed by then. The action is `taste`, known in every row.
    """

    interests: int = setting(
        16,
        at_least=1,
        doc="Number of interests; the one of rank r in a user's order has a share "
        "of about 1 / r of the phases, so some return after thousands of rows.",
    )
    categories_per_interest: int = setting(
        8, at_least=1, doc="Categories of an interest, each liked or not by a coin, by each user."
    )
    phase_rows: int = setting(
        16, at_least=1, doc="Rows of a phase: whole requests, in which one interest shows."
    )
    changed_share: float = setting(
        0.1,
        at_least=0,
        at_most=0.5,
        doc="Chance that a taste is another one when its interest returns.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, "source.synthetic.drifting")

    @property
    def num_categories(self) -> int:
        return self.interests * self.categories_per_interest


@dataclass(frozen=True, kw_only=True, slots=True)
class ChainsConfig:
    """Co-visitation chains over sessions: what a user took in an earlier session makes them take
    what follows it in the chain. The action is `taken`, known in every row.
    """

    categories: int = setting(
        256, at_least=2, doc="Categories, all in one chain that leads from each to another."
    )
    session_rows: int = setting(
        16,
        at_least=1,
        doc="Rows of a session: whole requests, each row of another category; at most as many as "
        "there are categories.",
    )
    popularity_exponent: float = setting(
        1.0,
        at_least=0,
        doc="The category of rank r has a share of about 1 / r**popularity_exponent of the rows: "
        "the rare ones were shown last in a session of long ago.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, "source.synthetic.chains")
        rule = "at most source.synthetic.chains.categories"
        fits = self.session_rows <= self.categories
        require(fits, "source.synthetic.chains.session_rows", self.session_rows, rule)


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
    drifting: DriftingConfig | None = setting(
        None, doc="All rows show tastes that drift and return, of categories beside num_categories."
    )
    chains: ChainsConfig | None = setting(
        None, doc="All rows are parts of chains over sessions, of categories beside num_categories."
    )

    def __post_init__(self) -> None:
        check_ranges(self, "source.synthetic")
        parse_time("source.synthetic.start", self.start)

        self._refuse_shortest_history_above_longest()
        self._refuse_requests_across_lasting_phases()
        self._refuse_two_plants()
        self._refuse_requests_across_phases()

    @property
    def planted_categories(self) -> int:
        """Categories beside `num_categories`, of what is planted."""
        if self.drifting is not None:
            return self.drifting.num_categories
        if self.chains is not None:
            return self.chains.categories
        return self.lasting_categories

    @property
    def rows_between_breaks(self) -> int | None:
        """Rows of a phase or a session that is planted, after which a longer time passes."""
        if self.drifting is not None:
            return self.drifting.phase_rows
        return None if self.chains is None else self.chains.session_rows

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

    def _refuse_two_plants(self) -> None:
        plants = {
            "lasting_categories": self.lasting_categories > 0,
            "drifting": self.drifting is not None,
            "chains": self.chains is not None,
        }
        given = [name for name, is_given in plants.items() if is_given]
        rule = f"alone: at most one of {list(plants)}"
        require(len(given) <= 1, "source.synthetic", given, rule)

    def _refuse_requests_across_phases(self) -> None:
        """The phases and sessions of what is planted are whole requests."""
        rows = self.rows_between_breaks
        if rows is None:
            return

        key = "chains.session_rows" if self.drifting is None else "drifting.phase_rows"
        whole = rows % self.candidates_per_request == 0
        rule = f"a multiple of candidates_per_request, {self.candidates_per_request}"
        require(whole, f"source.synthetic.{key}", rows, rule)
