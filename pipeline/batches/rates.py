"""Dense features of candidates: smoothed rates of the tasks' labels, in the training period and in
the user's own past.

They ride on candidates only, so that nothing in an encoded history depends on a request, and are
computed here for training, evaluation and serving alike. A training row reads the training period's
counts as of the last full step before its request: its own label, and what came later, is in none
of its features. After the training period, and in a saved model, the counts are the whole period's.

An order_only training row carries none of them, zeros: what was known at its time is not known.
Such rows also lie close to the ones before them, where a user's rates say more than they do about a
later request, and they are many.
"""

import numpy as np

from pipeline.batches.counts import LabelCounts
from pipeline.batches.events import Events
from pipeline.batches.features import MS_PER_MINUTE, FeatureMaps, label_counts, rows_of_kind
from pipeline.config import DenseFeature, RunConfig

# columns that are there whatever `features.dense` names: how much history, and how long ago it
# ended
PACE = 2
# log1p of a count, and log2 of a gap below, brought to about the size of a log-odds
COUNT_SCALE = 4.0
GAP_SCALE = 32.0


def dense_width(cfg: RunConfig) -> int:
    """F: per feature the log-odds of each task's rate over its base and one count; and the pace."""
    num_features = len(cfg.features.dense)
    return num_features * (len(cfg.tasks) + 1) + PACE if num_features else 0


def candidate_features(
    seen: Events, targets: Events, visible: np.ndarray, maps: FeatureMaps, cfg: RunConfig
) -> np.ndarray | None:
    """float32 [C, F], 0 for order_only candidates; None where the configuration names no feature.

    Args:
        seen: B histories, each whole up to what the last of its candidates sees.
        targets: the candidates of the B sequences, `event_time` that of their requests.
        visible: int64 [C], how many rows of its history each candidate sees, all strictly earlier
        than its request.
    """
    if not cfg.features.dense:
        return None
    item_rows = maps.item_rows(targets.item_id)
    step = targets.event_time // (cfg.features.dense_step_minutes * MS_PER_MINUTE)
    own = _OwnPast(seen, targets, visible, maps, cfg)
    columns = []
    for name, feature in cfg.features.dense.items():
        if feature.live:
            counts = own.counts(feature, item_rows)
        else:
            group = maps.groups(feature.by, item_rows, targets.request, cfg)
            counts = maps.counts[name].earlier(group, step)
        columns.append(evidence(counts, np.array(maps.row_rates[feature.rows]), feature.prior))
    gap = np.where(targets.gap_ms < 0, 0, np.log2(1 + np.maximum(targets.gap_ms, 0)) / GAP_SCALE)
    pace = np.stack([np.log1p(targets.position) / COUNT_SCALE, gap], axis=1)
    values = np.concatenate([*columns, pace], axis=1).astype(np.float32)
    return np.where(targets.order_only[:, None], np.float32(0), values)


def evidence(counts: np.ndarray, base: np.ndarray, prior: float) -> np.ndarray:
    """[n, K + 1] from counts [n, 2 K]: log-odds of each smoothed rate over `base` [K], then how
    much was counted.

    A rate is (positive + prior · base) / (known + prior): without a known label it says nothing, a
    log-odds of 0.
    """
    base = np.clip(base, 1e-6, 1 - 1e-6)  # a task never or always seen in the training period
    values = np.empty((len(counts), len(base) + 1))
    most = np.zeros(len(counts), counts.dtype)
    for i, usual in enumerate(base):  # column by column: NumPy is slow along a short last axis
        known, positive = counts[:, i], counts[:, len(base) + i]
        rate = (positive + prior * usual) / (known + prior)
        values[:, i] = np.log(rate / (1 - rate)) - np.log(usual / (1 - usual))
        most = np.maximum(most, known)
    values[:, -1] = np.log1p(most) / COUNT_SCALE
    return values


class _OwnPast:
    """Counts over the rows of the candidate's own user that the candidate sees."""

    def __init__(
        self, seen: Events, targets: Events, visible: np.ndarray, maps: FeatureMaps, cfg: RunConfig
    ) -> None:
        self.seen = seen
        self.targets = targets
        self.visible = visible
        self.maps = maps
        self.cfg = cfg
        self.user = np.repeat(np.arange(len(targets.lengths)), targets.lengths)
        self.labels = label_counts(seen.action_mask, seen.known_mask, cfg)

    def counts(self, feature: DenseFeature, item_rows: np.ndarray) -> np.ndarray:
        """int64 [C, 2 K], over the rows that agree with the candidate in the feature's columns."""
        by = [name for name in feature.by if name != "user"]
        chosen = rows_of_kind(self.seen.order_only, feature.rows)
        older = self._older(feature.within_minutes)
        if not by:  # every row agrees: the same counts without sorting anything
            before = np.zeros((len(self.labels) + 1, self.labels.shape[1]), np.int64)
            np.cumsum(self.labels & chosen[:, None], 0, out=before[1:])
            first = self.seen.offsets[self.user]
            return before.take(first + self.visible, axis=0) - before.take(first + older, axis=0)
        seen = self.seen
        seen_user = np.repeat(np.arange(len(seen.lengths)), seen.lengths)
        place = np.arange(len(seen_user)) - seen.offsets[seen_user]
        group = self.maps.groups(by, item_rows, self.targets.request, self.cfg)
        seen_group = self.maps.groups(by, self.maps.item_rows(seen.item_id), seen.request, self.cfg)
        chosen = chosen & (seen_group > 0)
        size = 1 + max(group.max(initial=0), seen_group.max(initial=0))
        past = LabelCounts.of(
            (seen_user * size + seen_group)[chosen], place[chosen], self.labels[chosen]
        )
        asked = self.user * size + group
        return past.earlier(asked, self.visible) - past.earlier(asked, older)

    def _older(self, within_minutes: float | None) -> np.ndarray:
        """int64 [C]: how many of the rows that a candidate sees are older than so many minutes at
        its request.
        """
        if within_minutes is None or len(self.seen.event_time) == 0:
            return np.zeros_like(self.visible)
        since = self.targets.event_time - int(within_minutes * MS_PER_MINUTE)
        time, lengths = self.seen.event_time, self.seen.lengths
        earliest = min(int(time.min()), int(since.min()))
        span = max(int(time.max()), int(since.max())) - earliest + 1
        # A user's times do not fall, so that users one after another, each a span apart, are one
        # sorted list.
        rows = np.repeat(np.arange(len(lengths)), lengths) * span + (time - earliest)
        begin = (
            np.searchsorted(rows, self.user * span + (since - earliest))
            - self.seen.offsets[self.user]
        )
        return np.minimum(begin, self.visible)
