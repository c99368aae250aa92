"""All that jobs know of tracking: a session, and in it a tracker.

    with tracking.session(cfg) as tracker:
        with tracker.start_run(cfg, manifest) as run:
            ...
        version = tracker.register_model(run, model_dir)
        decision = tracker.promote_version(version)

Another tracker in MLflow's place is a new `server.py`, `runs.py`, `registry.py`, `evaluation.py`
and `forgetting.py`: everything that speaks to MLflow is in those five.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import RunConfig
from pipeline.figures import Figures
from pipeline.tracking import evaluation, forgetting, registry, runs, server
from pipeline.tracking.gate import Decision
from pipeline.tracking.registry import PinnedModel, RowsAtHand
from pipeline.tracking.runs import Run

if TYPE_CHECKING:
    import numpy as np

    from pipeline.sequences.store import Manifest


@contextmanager
def session(cfg: RunConfig, port: int | None = None) -> Iterator["Tracker"]:
    """A tracker for the length of the block: on the server that the configuration names, or on the
    one that the jobs of its `runs_dir` share, on `port` (None: any free one) where it is started
    here. It ends with the last of them.

    Raises:
        Outage: the server named in the configuration does not answer, or ours does not start.
    """
    with server.mlflow_server(cfg.tracking, cfg.runs_dir, port):
        runs.tell_ends(Path(cfg.runs_dir))
        yield Tracker(cfg)


def plan_session(cfg: RunConfig) -> dict[str, object]:
    """Where runs and versions are, for `--dry-run`.

    Raises:
        Outage: the server named in the configuration does not answer.
    """
    return server.plan_server(cfg.tracking, cfg.runs_dir) | {"model": cfg.model_name}


@dataclass(frozen=True, slots=True)
class Tracker:
    """Runs and model versions of one configuration, while its session lasts."""

    cfg: RunConfig

    @property
    def server_url(self) -> str:
        """Address of the server, for people."""
        return server.current_url()

    @property
    def list_url(self) -> str:
        """Address of the list of runs, for people."""
        return runs.list_url(self.cfg.tracking, server.current_url())

    def start_run(self, cfg: RunConfig, manifest: "Manifest", parent: Run | None = None) -> Run:
        """A new run of the settings `cfg` on these sequences; `with run:` ends it."""
        return runs.start_run(cfg, manifest, parent=parent)

    def training_run(self, manifest: "Manifest", *, restart: bool = False) -> Run:
        """The run of this configuration's training: a new one, or that of the attempt which it goes
        on from.
        """
        return runs.training_run(self.cfg, manifest, restart=restart)

    def trial_run(
        self, cfg: RunConfig, manifest: "Manifest", parent: Run, drawn: Mapping[str, Any]
    ) -> Run:
        """The run of one trial of a search, below the search's own: a new one, or that of the
        attempt which it goes on from. `drawn` are the settings that tell trials apart.
        """
        return runs.training_run(cfg, manifest, parent=parent, drawn=drawn)

    def log_comparison(
        self, models: Sequence[str], compared: Mapping[str, str | None], folder: Path
    ) -> Run:
        """A run with the files of a comparison; `compared` names the runs, and their ids here."""
        return runs.comparison_run(self.cfg.tracking, models, compared, folder)

    def import_result(self, name: str, figures: Figures) -> bool:
        """A run for a JSON of figures that were made elsewhere; False where it is known already."""
        return runs.import_result(self.cfg.tracking, name, figures)

    def log_evaluation(
        self,
        model_dir: Path,
        metrics: Mapping[str, float],
        folder: Path,
        name: str | None = None,
    ) -> str | None:
        """Log an evaluation into the run that trained the model; its id, None where there is none.

        `folder` holds its files, `name` is that of an evaluation of other rows or settings.
        """
        return evaluation.log_evaluation(
            server.current_url(),
            model_dir,
            metrics,
            folder,
            name,
            with_predictions=self.cfg.tracking.log_predictions,
        )

    def forget_users(self, users: "np.ndarray") -> dict[str, int]:
        """Take the users, int64, out of the versions that learned from this configuration's
        sequences, and remove uploaded predictions and this run's reports; how many of each.
        """
        cfg, uri = self.cfg, server.current_url()
        run = cfg.sequence_dir.parent.name
        versions = forgetting.forget_in_versions(cfg.model_name, run, users)
        return {
            "versions": len(versions),
            "uploaded_predictions": evaluation.remove_predictions(uri, cfg.tracking.experiment),
            "uploaded_reports": forgetting.remove_reports(uri, cfg.tracking.experiment, cfg.name),
        }

    def register_model(self, run: Run, model_dir: Path, *, same_as: int | None = None) -> int:
        """Make the evaluated model in `model_dir` a new version; returns its number. `same_as` is a
        version of the very model, whose validation holds for the new one.
        """
        return registry.register_model(self.cfg, run, model_dir, same_as=same_as)

    def register_trained(self) -> int:
        """Version of the model that this configuration trained, registered unless it is already."""
        return registry.register_trained(self.cfg)

    def promote_version(
        self,
        version: int | None = None,
        validated_by: int | None = None,
        *,
        rows: RowsAtHand | None = None,
        force_first: bool = False,
    ) -> Decision:
        """Make a version (None: the newest) the champion, if the gate lets it pass.

        `rows` are those that versions of different rows are scored on; `force_first` lets a first
        champion pass that does not beat the item's smoothed rate.
        """
        cfg = self.cfg
        scorer = None if rows is None else registry.VersionScorer(rows, self._cache)
        return registry.promote_version(
            cfg.tracking,
            cfg.model_name,
            cfg.tasks,
            version,
            validated_by,
            scorer=scorer,
            force_first=force_first,
        )

    def roll_back(self) -> int:
        """Make the champion before this one the champion again; returns its number."""
        return registry.roll_back(self.cfg.model_name)

    def find_champion(self) -> PinnedModel:
        """The champion, by its number: from here on nothing moves under the caller's feet."""
        return registry.find_champion(self.cfg.model_name)

    def download_champion(self) -> tuple[Path, int]:
        """The champion's files under `runs_dir/champions`, checked, and its version."""
        model = self.find_champion()
        return registry.fetch_model(model, self._cache), model.version

    def require_fit(self, model: PinnedModel, manifest: "Manifest") -> None:
        """Refuse a version that cannot read these sequences, before a server is asked to load it.

        Raises:
            UserError: names whose version it is, and what differs.
        """
        registry.require_fit(registry.fetch_model(model, self._cache), model, manifest)

    @property
    def _cache(self) -> Path:
        return Path(self.cfg.runs_dir).absolute() / "champions"
