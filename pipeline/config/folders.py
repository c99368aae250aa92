"""Where the files of a run lie."""

from dataclasses import dataclass
from pathlib import Path

LOG_FOLDER = "logs"  # of a run: what an import writes


@dataclass(frozen=True, slots=True)
class RunFolders:
    """The folders of one run, all below that of all runs; absolute."""

    runs_dir: str  # of all runs
    name: str
    sequences_of: str  # the run whose sequences this one reads

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir).absolute() / self.name

    @property
    def log_dir(self) -> Path:
        """LOG, USER and ITEM Parquet written by an adapter or generator."""
        return self.run_dir / LOG_FOLDER

    @property
    def sequence_dir(self) -> Path:
        """The published sequences: the run's own, or those of `sequences.from_run`."""
        return Path(self.runs_dir).absolute() / self.sequences_of / "sequences"

    @property
    def train_dir(self) -> Path:
        """Checkpoints, feature maps and metrics.jsonl of the training."""
        return self.run_dir / "train"

    @property
    def model_dir(self) -> Path:
        """What the registry holds: model.safetensors, config.json, features.*, metrics.json."""
        return self.run_dir / "model"
