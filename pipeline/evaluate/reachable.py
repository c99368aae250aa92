"""How good a score could be at all, on logs in which something is planted: the generator knows the
log-odds of each action, given the whole history or its newest rows.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import SourceConfig, SyntheticConfig
from pipeline.logs.imported import read_import_report
from pipeline.logs.planted import best_log_odds, knows_best, planted_action, shown_rows

KEYS = ["user_id", "item_id", "event_time"]


def reachable_task(source: SourceConfig, tasks: Sequence[str]) -> str | None:
    """The task whose best scores are known; None where the logs are no generated ones, nothing is
    planted in them, or the run has another task.
    """
    if source.kind != "synthetic" or not knows_best(source.synthetic):
        return None
    action = planted_action(source.synthetic)
    return action if action in tasks else None


class Reachable:
    """The imported logs at `log_dir`, which `cfg` generated, and the best scores of their rows."""

    def __init__(self, cfg: SyntheticConfig, log_dir: Path) -> None:
        self.cfg = cfg
        files = [log_dir / name for name in read_import_report(log_dir).files]
        columns = [*KEYS, "tie_breaker", str(planted_action(self.cfg))]
        self.log = pa.concat_tables([pq.read_table(file, columns=columns) for file in files])
        items = pq.read_table(log_dir / "items.parquet", columns=["item_id", "category"])
        by_item = items["category"].to_numpy()[np.argsort(items["item_id"].to_numpy())]
        self.rows = shown_rows(self.cfg, self.log, by_item[self.log["item_id"].to_numpy()])

    def rows_between(self, begin_ms: int, end_ms: int) -> tuple[pa.Table, np.ndarray]:
        """`KEYS` of the rows of a period, and their labels, bool."""
        time = self.log["event_time"].to_numpy()
        rows = self.log.filter((time >= begin_ms) & (time < end_ms))
        return rows.select(KEYS), rows[str(planted_action(self.cfg))].to_numpy() > 0

    def scores(self, wanted: pa.Table, newest: int | None = None) -> np.ndarray:
        """Log-odds of the rows of `wanted`, by user_id, item_id and event_time, in its order:
        float64 [rows]. `newest`: from so many rows of the history alone.
        """
        best = best_log_odds(self.cfg, self.rows, newest)
        known = self.log.select(KEYS).append_column("best", pa.array(best))
        numbered = wanted.select(KEYS).append_column("row", pa.array(np.arange(len(wanted))))
        joined = numbered.join(known, KEYS, join_type="left outer").sort_by("row")
        assert len(joined) == len(wanted), "a row of the logs is told apart by these"
        return joined["best"].to_numpy()


def reached_share(model: float, best: float) -> float:
    """Share of the reachable AUC: 0 is a coin's, 1 the best score's.

    >>> round(reached_share(0.7, 0.9), 3)
    0.5
    """
    return (model - 0.5) / (best - 0.5)
