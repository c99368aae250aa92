"""Retrieval: the next item of a user, found among all items."""

from dataclasses import dataclass
from typing import Literal

from pipeline.config.setting import check_ranges, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalConfig:
    """The retrieval head, which shares the encoder with the tasks, and its training."""

    enabled: bool = setting(
        False,
        doc="Train the model to find the next item among all items. With tasks: [] nothing else is "
        "trained.",
    )
    positives: tuple[str, ...] = setting(
        (),
        doc="Actions of which at least one is known and set on an event that counts as a next "
        "item. Empty: every event.",
    )
    dim: int = setting(64, at_least=1, doc="Width of the vectors of users and items.")
    item_tower: Literal["tokens", "linear"] = setting(
        "tokens",
        doc="What an item's vector is made of. tokens: its row in the history's tokens, without an "
        "action or request. linear: a linear map of the embeddings of its id and columns.",
    )
    score: Literal["cosine", "dot"] = setting(
        "cosine",
        doc="Score of a user and an item: the cosine of their vectors divided by "
        "retrieval.temperature, or their dot product.",
    )
    temperature: float = setting(0.05, above=0, doc="Divisor of the cosines.")
    loss: Literal["full"] = setting(
        "full",
        doc="Items that a next item is told apart from. full: all items of the training period.",
    )
    label_smoothing: float = setting(
        0.0,
        at_least=0,
        below=1,
        doc="Share of the target probability that is spread evenly over all items, for loss: full.",
    )
    weight: float = setting(
        1.0, above=0, doc="Factor of the loss of a next item, where that of a task's label is 1."
    )

    def __post_init__(self) -> None:
        check_ranges(self, "retrieval")
