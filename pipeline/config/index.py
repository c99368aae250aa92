"""The item index of a model: what travels with it, and how it is searched."""

from dataclasses import dataclass, field

from pipeline.config.errors import require
from pipeline.config.setting import check_ranges, describe, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class FollowedConfig:
    """Recent items of the authors that a user follows, as a source of recommendations."""

    action: str = field(
        metadata=describe("Action of source.actions that follows an item's author.")
    )
    author_column: str = field(
        metadata=describe("Column of the item table with the author of an item.")
    )
    time_column: str | None = setting(
        None,
        doc="Column of the item table that says how recent an item is, the larger the newer. Null: "
        "the time of the item's first row in the logs.",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig:
    """The items that a registered version can recommend."""

    enabled: bool = setting(
        True,
        doc="Build the index when a version is registered. Without one it ranks but does not "
        "recommend.",
    )
    columns: tuple[str, ...] | None = setting(
        None,
        doc="Columns of the item table that the index takes along, for filters and caps. Null: all "
        "that hold numbers, text, times, or true and false.",
    )
    title_column: str | None = setting(
        None, doc="Column of the item table with a title to show people. Null: none."
    )
    popular_days: float = setting(
        7.0,
        above=0,
        doc="Days at the end of the training period whose rows count for what is popular.",
    )
    popular_actions: tuple[str, ...] = setting(
        (),
        doc="A row makes its item popular where one of these actions happened. Empty: every row "
        "does.",
    )
    followed: FollowedConfig | None = setting(
        None, doc="Recommend recent items of followed authors too; null: not."
    )
    ivf_above: int | None = setting(
        None,
        at_least=1000,
        doc="Search beyond this many items by faiss' inverted lists, which miss a few: pip install "
        "'.[retrieval]'. Null: always exactly.",
    )
    ivf_probes: int = setting(32, at_least=1, doc="Inverted lists that a search reads.")

    def __post_init__(self) -> None:
        check_ranges(self, "index")
        if self.columns is not None and self.title_column is not None:
            listed = self.title_column in self.columns
            rule = "one of index.columns"
            require(listed, "index.title_column", self.title_column, rule)
