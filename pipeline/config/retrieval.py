"""Retrieval: the next item of a user, found among all items."""

from dataclasses import dataclass
from typing import Literal

from pipeline.config.errors import require
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
    loss: Literal["full", "uniform", "popularity", "in_batch"] = setting(
        "full",
        doc="Items that a next item is told apart from. full: all items of the training period. "
        "uniform, popularity: retrieval.negatives of them, drawn anew for each next item, all "
        "alike or as often as they are next items. in_batch: the other next items of the step.",
    )
    negatives: int = setting(
        128, at_least=1, doc="Items drawn for each next item, for loss: uniform and popularity."
    )
    logq_correction: bool = setting(
        True,
        doc="Take from a negative's score the log of how often it is expected, for loss: "
        "popularity and in_batch. Else popular items are learned as wrong.",
    )
    label_smoothing: float = setting(
        0.0,
        at_least=0,
        below=1,
        doc="Share of the target probability that is spread evenly over all items, for loss: full.",
    )
    align_trajectories: float = setting(
        0.0,
        at_least=0,
        doc="Weight of LARES's first alignment: a history's row from a second pass and the row of "
        "another history with the same next item are to be near. It costs that second pass.",
    )
    align_steps: float = setting(
        0.0,
        at_least=0,
        doc="Weight of its second alignment: the rows of an earlier step and of the last, for the "
        "encoder lares.",
    )
    align_temperature: float = setting(
        0.1, above=0, doc="Divisor of the cosines of the alignments."
    )
    reinforce: Literal["none", "recall_10", "ndcg_10"] = setting(
        "none",
        doc="LARES's second stage, in place of the loss of a next item: each history is read "
        "retrieval.reinforce_passes times, and passes whose list of all items has this metric "
        "above their mean are made likelier. For the encoder lares, with train.init: champion.",
    )
    reinforce_passes: int = setting(
        4, at_least=2, doc="Passes over a step's histories, each with noise of its own."
    )
    reinforce_kl: float = setting(
        1.0,
        at_least=0,
        doc="Weight of what holds the model near the champion that the stage began with.",
    )
    weight: float = setting(
        1.0, above=0, doc="Factor of the loss of a next item, where that of a task's label is 1."
    )

    memory: Literal["none", "xbm", "xbn", "axbn"] = setting(
        "none",
        doc="Vectors of earlier steps' items as further negatives, for loss: in_batch. xbm: as "
        "they were. xbn: moved to the mean and spread of the step's vectors. axbn: to a filtered "
        "mean and spread (our reconstruction).",
    )
    memory_size: int = setting(4096, at_least=1, doc="Number of the vectors that are kept.")
    memory_warmup: int = setting(
        0,
        at_least=0,
        doc="Steps that a run takes before it begins to keep vectors: at first they drift fastest.",
    )
    memory_noise: float = setting(
        0.01,
        at_least=0,
        doc="Variance by which mean and spread may wander in a step, for memory: axbn; that of a "
        "measurement is 1 / vectors of the step.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, "retrieval")

        self._refuse_settings_of_another_loss()

    def _refuse_settings_of_another_loss(self) -> None:
        sampled = self.loss in ("uniform", "popularity")
        rule = f"cosine where retrieval.loss is {self.loss}"
        require(not sampled or self.score == "cosine", "retrieval.score", self.score, rule)

        smooth = self.label_smoothing
        rule = f"0 where retrieval.loss is {self.loss}"
        require(self.loss == "full" or smooth == 0, "retrieval.label_smoothing", smooth, rule)

        rule = f"none where retrieval.loss is {self.loss}"
        in_batch = self.loss == "in_batch"
        require(in_batch or self.memory == "none", "retrieval.memory", self.memory, rule)

        if self.reinforce != "none":
            self._refuse_settings_of_the_first_stage()

    def _refuse_settings_of_the_first_stage(self) -> None:
        where = f"where retrieval.reinforce is {self.reinforce}"
        require(self.enabled, "retrieval.enabled", self.enabled, f"true {where}")
        require(self.loss == "full", "retrieval.loss", self.loss, f"full {where}")

        for name in ("label_smoothing", "align_trajectories", "align_steps"):
            value = getattr(self, name)
            rule = f"0 {where}: it belongs to the first stage"
            require(value == 0, f"retrieval.{name}", value, rule)
