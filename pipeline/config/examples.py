"""What a model is asked in training and evaluation, beside the rows of the logs."""

from dataclasses import dataclass

from pipeline.config.setting import check_ranges, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleConfig:
    """Candidates that the logs do not hold."""

    negatives: int = setting(
        0,
        at_least=0,
        at_most=1000,
        doc="Items drawn by their popularity in the training period beside each positive, in "
        "training, validation and test: for logs without rows of what was shown and not chosen. "
        "None that the user has a row of up to then.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, "examples")
