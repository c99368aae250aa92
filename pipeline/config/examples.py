"""What a model is asked in training and evaluation, and how much of a history it reads."""

from dataclasses import dataclass

from pipeline.config.setting import check_ranges, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleConfig:
    """Candidates that the logs do not hold, and the length of histories."""

    negatives: int = setting(
        0,
        at_least=0,
        at_most=1000,
        doc="Items drawn by their popularity in the training period beside each positive, in "
        "training, validation and test: for logs without rows of what was shown and not chosen. "
        "None that the user has a row of up to then.",
    )
    max_history: int | None = setting(
        None,
        at_least=1,
        doc="Newest history rows that a request reads, in training, evaluation and serving. In the "
        "user layout the first target of a pass reads so many, the later ones the rows of the pass "
        "before them too. Null: all.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, "examples")

    def read_rows(self, most: int) -> int:
        """Newest history rows that a server reads which reads at most `most`."""
        return most if self.max_history is None else min(most, self.max_history)
